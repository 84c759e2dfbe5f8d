"""``qmoe unpack``: what it prints, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.qmoe"
    with qmoe_format.Writer(path) as writer:
        writer.add_attachment("config.json", b"{}")
        writer.add_tensor("norm", np.ones(3, np.float32), "F32")
    return path


@pytest.mark.parametrize(
    ("options", "needed"), [([], ""), (["--compressed"], "after import qmoe_format.runtime")]
)
def test_how_to_load_the_folder(
    file: Path, tmp_path: Path, qmoe: Any, options: list[str], needed: str
) -> None:
    done = qmoe("unpack", file, tmp_path / "folder", *options)
    assert done.code == 0, done.err
    assert "from_pretrained" in done.out
    assert needed in done.out


def test_an_error_is_one_line(file: Path, tmp_path: Path, qmoe: Any) -> None:
    for folder, code in ((tmp_path, "argument"), (tmp_path / ("long" * 100), "io")):
        done = qmoe("unpack", file, folder)
        assert done.code == 1
        assert done.err.startswith(f"error[{code}]: ")
        assert done.err.count("\n") == 1
