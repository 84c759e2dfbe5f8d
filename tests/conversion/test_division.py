"""How experts are divided among groups, batches and threads does not change the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.conversion.options import Calibration, ConvertOptions
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.quantize_block import quantize_block
from qmoe_format.conversion.staging import Staging
from qmoe_format.conversion.survey import survey_block
from qmoe_format.conversion.uncalibrated import convert_uncalibrated
from qmoe_format.progress import Counter
from qmoe_format.quantize.rate import Rate
from tests.conversion.conftest import EXPERTS, HIDDEN, NORMS, TOKENS, Block

OPTIONS = ConvertOptions(calibration=Calibration("never read"), bits_per_weight=1.0)


def quantized(experts: BlockExperts, folder: Path) -> tuple[Any, ...]:
    """Survey, record, outputs and files of a block."""
    folder.mkdir()
    counter = Counter(None, 0)
    outputs = torch.zeros(TOKENS, HIDDEN)
    staging = Staging(folder, list(experts.stacks.values()), OPTIONS.methods)
    record = quantize_block(experts, OPTIONS, Rate(0.01, 1.0), {}, staging, outputs, counter)
    survey = survey_block(experts, NORMS, OPTIONS, counter)
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    return survey, record, outputs.tolist(), files


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_calibrated(block: Block, tmp_path: Path, family: str) -> None:
    survey, *result = quantized(block(family), tmp_path / "wanted")
    for resources in (
        Resources(1, group_bytes=1),
        Resources(1, group_bytes=4000),
        Resources(3),
        Resources(1, batch_elements=1),
        Resources(2, large_expert=1),
    ):
        experts = block(family, resources)
        same_survey, *same = quantized(experts, tmp_path / repr(resources))
        assert same == result, resources
        if experts.experts_in_memory >= EXPERTS:  # otherwise it samples fewer
            assert same_survey == survey, resources


def test_uncalibrated(switch: Callable[..., Path], tmp_path: Path) -> None:
    files = []
    for number, resources in enumerate((Resources(2), Resources(2, large_expert=1))):
        files.append(tmp_path / f"{number}.qmoe")
        with open_checkpoint(switch(rows=40, columns=60, name=str(number))) as checkpoint:
            convert_uncalibrated(checkpoint, files[-1], ConvertOptions(), resources)
    assert files[0].read_bytes() == files[1].read_bytes()
