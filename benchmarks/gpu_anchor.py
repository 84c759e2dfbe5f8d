"""QMoE's published scheme and kernel (arXiv 2310.16795), the anchor of ``benchmarks.gpu``.

The encoder is ``benchmarks.qmoe_scheme``, the kernel ``gpu_anchor.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import qmoe_scheme
from qmoe_format.checkpoints.published_qmoe.dictionary import kernel_table, sequences
from qmoe_format.gpu.launch import Kernel, Launch

WARPS = (4, 8, 16, 32)  # rows per block; the benchmark takes the best for each matrix


@dataclass(frozen=True)
class Anchor:
    """A matrix in QMoE's scheme: numpy's arrays, or tensors on a device.

    Attributes:
        dictionary: uint32 [2 * 65536].
        codewords: uint16 [number of codewords].
        offsets: uint32 [rows + 1].
        low_high: uint32 [rows], bf16 low, bf16 high << 16.
    """

    rows: int
    columns: int
    dictionary: Any
    codewords: Any
    offsets: Any
    low_high: Any


def encode(levels: npt.NDArray[np.int8], low_high: npt.NDArray[np.uint16]) -> Anchor:
    """Encode levels int8 [rows, columns] with scales bf16 [rows, 2]."""
    dictionary = kernel_table(*sequences()).ravel()
    codewords, offsets = qmoe_scheme.encode(levels)
    scales = np.ascontiguousarray(low_high, "<u2").view("<u4")[:, 0]
    return Anchor(len(levels), levels.shape[1], dictionary, codewords, offsets.view("<u4"), scales)


@cache
def source(warps: int) -> str:
    """CUDA text for ``warps`` rows per block."""
    text = Path(__file__).with_name("gpu_anchor.cu").read_text()
    return f'#define WARPS {warps}\n#line 1 "gpu_anchor.cu"\n{text}'


def matvec(anchor: Anchor, x: Any, y: Any, warps: int) -> Launch:
    """y [rows] = W x [columns], both bf16, with ``warps`` rows per block."""
    kernel = Kernel("anchor_matvec", source(warps), 32 * warps, 4 * (anchor.columns + 32))
    arrays = (anchor.dictionary, anchor.codewords, anchor.offsets, anchor.low_high, x, y)
    sizes = (np.int32(anchor.rows), np.int32(anchor.columns))
    return Launch(kernel, -(-anchor.rows // warps), (*arrays, *sizes))


def upload(anchor: Anchor, copies: int, device: torch.device) -> list[Anchor]:
    """Copies on ``device``, at different addresses."""
    dictionary = torch.from_numpy(anchor.dictionary.view(np.int32)).to(device)
    repeated = [
        torch.from_numpy(array.view(signed)).to(device).repeat(copies, 1)
        for array, signed in (
            (anchor.codewords, np.int16),
            (anchor.offsets, np.int32),
            (anchor.low_high, np.int32),
        )
    ]
    return [
        Anchor(anchor.rows, anchor.columns, dictionary, *(array[i] for array in repeated))
        for i in range(copies)
    ]
