"""Matrices padded to whole tiles of the kernels: zeros change no sum."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

LANES = 32  # rows that kernels work on together
BLOCK = 64  # columns, likewise
GROUP = 16  # columns that descent decides together


def padded(matrices: Tensor) -> Tensor:
    """W ``[experts, rows, columns]`` with zeros below and to the right; contiguous."""
    rows, columns = matrices.shape[1:]
    if rows % LANES or columns % BLOCK:
        return pad(matrices, (0, -columns % BLOCK, 0, -rows % LANES))
    return matrices.contiguous()


def padded_square(matrices: Tensor) -> Tensor:
    """Hessians or their factors ``[experts, columns, columns]`` with ones on the new diagonal."""
    columns = matrices.shape[1]
    if columns % BLOCK:
        extra = -columns % BLOCK
        matrices = pad(matrices, (0, extra, 0, extra))
        matrices.diagonal(dim1=1, dim2=2)[:, columns:] = 1
    return matrices.contiguous()


def padded_rows(values: Tensor) -> Tensor:
    """Something of each row ``[experts, rows]``, with ones for the new rows."""
    return pad(values, (0, -values.shape[1] % LANES), value=1.0).contiguous()


def padded_columns(values: Tensor) -> Tensor:
    """Something of each column ``[experts, columns]``, with ones for the new columns."""
    return pad(values, (0, -values.shape[1] % BLOCK), value=1.0).contiguous()
