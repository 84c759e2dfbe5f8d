"""Conversion without text; files of all kinds and types are in ``tests/cli/test_convert.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.conversion.options import ConvertOptions
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.uncalibrated import convert_uncalibrated


def test_large_experts_are_coded_one_at_a_time(switch: Callable[..., Path], tmp_path: Path) -> None:
    files = []
    for number, resources in enumerate((Resources(2), Resources(2, large_expert=1))):
        files.append(tmp_path / f"{number}.qmoe")
        with open_checkpoint(switch(rows=40, columns=60, name=str(number))) as checkpoint:
            convert_uncalibrated(checkpoint, files[-1], ConvertOptions(), resources)
    assert files[0].read_bytes() == files[1].read_bytes()
