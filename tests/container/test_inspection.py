"""What an attachment may say about the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qmoe_format
from qmoe_format.container.inspection import SOURCE_NAME, describe
from tests.refusals import refusal

GOOD = '{"format": "fp8", "expert_bytes": 0, "other_bytes": 40, "other_weights": 12}'


def write(path: Path, source: str) -> Path:
    with qmoe_format.Writer(path) as writer:
        writer.add_attachment(SOURCE_NAME, source.encode())
        writer.add_tensor("norm.weight", np.ones(10, np.float32), "F32")
    return path


def test_the_size_of_the_source(tmp_path: Path) -> None:
    with qmoe_format.open(write(tmp_path / "m.qmoe", GOOD)) as file:
        report = describe(file)
    assert report["source_format"] == "fp8"
    assert report["totals"]["others"]["source_bytes"] == 40
    assert report["totals"]["others"]["weights"] == 12


@pytest.mark.parametrize(
    "source",
    [
        "[]",
        "[" * 100_000,
        GOOD.replace("40", "1e999"),
        GOOD.replace("40", "1" + 4000 * "0"),
        GOOD.replace("40", "-40"),
        GOOD.replace("fp8", r"\u001b[2J"),
    ],
)
def test_sizes_that_make_no_sense(tmp_path: Path, source: str) -> None:
    with qmoe_format.open(write(tmp_path / "m.qmoe", source)) as file:
        assert SOURCE_NAME in refusal(lambda: describe(file), "malformed")
