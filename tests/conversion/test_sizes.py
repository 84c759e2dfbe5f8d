"""Sizes up to three bits per weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qmoe_format
from qmoe_format.container.inspection import describe
from qmoe_format.conversion.report import read_report

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
from tests.tiny_models import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its matrices are so large that scales and dictionaries take less than a tenth of a bit."""
    path = tmp_path_factory.mktemp("wide")
    return save_model(path, "mixtral", hidden_size=256, intermediate_size=512, num_local_experts=2)


@pytest.mark.parametrize("bits", [0.5, 1.2, 3.0])
def test_as_many_bits_as_asked_for(
    folder: Path, converted: Callable[..., Path], bits: float
) -> None:
    file = converted(folder, bits_per_weight=bits, samples=16)
    with qmoe_format.open(file) as opened:
        opened.verify()
        total = describe(opened)["totals"]["experts"]["total_bits_per_weight"]
        report = read_report(opened)
    assert total == pytest.approx(bits, rel=0.02)
    assert report["totals"]["total_bits_per_weight"] == pytest.approx(total, rel=1e-5)
