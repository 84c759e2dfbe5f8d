"""Models whose experts are integers in groups of columns: loaded, run and saved like others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import qmoe_format
from qmoe_format.codec import GroupedMatrix, pack_groups
from tests.runtime.conftest import Converted
from tests.runtime.models import from_pretrained, generated, logits


def grouped(weights: np.ndarray, group_size: int) -> GroupedMatrix:
    """Weights float32 [rows, columns] as the nearest of 16 values."""
    rows, columns = weights.shape
    size = group_size or columns
    steps = np.zeros((rows, -(-columns // size) * size), np.float32)
    steps[:, :columns] = weights
    by_group = steps.reshape(rows, -1, size)
    scales = (np.abs(by_group).max(2) / 7).view(np.uint32) >> 16
    unit = (scales << 16).view(np.float32)[:, :, None]
    codes = np.clip(np.round(by_group / np.where(unit > 0, unit, 1)), -8, 7) + 8
    return pack_groups(
        codes.reshape(rows, -1)[:, :columns].astype(np.uint8),
        scales.astype(np.uint16),
        4,
        group_size=group_size,
    )


@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral", "llama4_text", "gpt_oss"])
@torch.no_grad()
def test_a_model_runs_as_its_dequantized_weights_do(
    model_type: str, converted: Callable[[str], Converted], tmp_path: Path
) -> None:
    path = tmp_path / "grouped.qmoe"
    with (
        qmoe_format.open(converted(model_type).file) as file,
        qmoe_format.Writer(path) as writer,
    ):
        for name in file.attachments:
            writer.add_attachment(name, file.attachment(name))
        for name, entry in file.tensors.items():
            if not entry.stack:
                writer.add_tensor(name, file.read(name), entry.dtype)
                continue
            with writer.add_stack(
                name, entry.shape, entry.dtype, "int-group", entry.members,
                transposed=entry.transposed,
            ) as stack:  # fmt: skip
                for expert in range(entry.shape[0]):
                    stack.append(grouped(file.read_expert(name, expert), 32 * (expert % 2)))
    with qmoe_format.open(path) as file:
        file.verify()
    model = qmoe_format.load_model(path)
    dense = from_pretrained(qmoe_format.unpack(path, tmp_path / "dense"))
    folder = from_pretrained(qmoe_format.unpack(path, tmp_path / "folder", compressed=True))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(folder), logits(model))
    assert generated(model) == generated(dense)
