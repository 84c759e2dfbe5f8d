"""QMoE's published scheme and kernel (arXiv 2310.16795), the anchor of ``benchmarks.gpu``.

The code is that of ``qmoe_format.codec.qmoe_scheme``; the kernel is ``gpu_anchor.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import qmoe_scheme
from qmoe_format.gpu.launch import Launch

WARPS = (4, 8, 16, 32)  # rows a block; the benchmark takes the best for each matrix


@dataclass(frozen=True)
class Anchor:
    """A matrix in QMoE's scheme: arrays of numpy, or of the device.

    ``dictionary``  uint32 [2 * 65536]
    ``codewords``   uint16 [number of codewords]
    ``offsets``     int32 [rows + 1]
    ``low_high``    uint32 [rows]: bf16 low, bf16 high << 16
    """

    rows: int
    columns: int
    dictionary: Any
    codewords: Any
    offsets: Any
    low_high: Any


def encode(trits: npt.NDArray[np.int8], low_high: npt.NDArray[np.uint16]) -> Anchor:
    """From int8 [rows, columns] and bf16 bits [rows, 2]."""
    dictionary = qmoe_scheme.qmoe_dictionary().decoder_table()
    codewords, offsets = qmoe_scheme.encode(trits)
    scales = np.ascontiguousarray(low_high, "<u2").view("<u4")[:, 0]
    return Anchor(len(trits), trits.shape[1], dictionary, codewords, offsets, scales)


def source(warps: int) -> str:
    """CUDA text of the kernel with ``warps`` rows a block."""
    text = Path(__file__).with_name("gpu_anchor.cu").read_text()
    return f'#define WARPS {warps}\n#line 1 "gpu_anchor.cu"\n{text}'


def matvec(anchor: Anchor, x: Any, y: Any, warps: int) -> Launch:
    """y = W x: x bf16 bits [columns], y bf16 bits [rows], ``warps`` rows a block."""
    return Launch(
        source=source(warps),
        kernel="anchor_matvec",
        grid=(-(-anchor.rows // warps), 1, 1),
        block=(32 * warps, 1, 1),
        shared_bytes=4 * (anchor.columns + 32),
        arguments=(
            anchor.dictionary,
            anchor.codewords,
            anchor.offsets,
            anchor.low_high,
            x,
            y,
            np.int32(anchor.rows),
            np.int32(anchor.columns),
        ),
    )


def upload(anchor: Anchor, copies: int) -> list[Anchor]:
    """Copies on the device, at addresses of their own."""
    import cupy

    dictionary = cupy.asarray(anchor.dictionary)

    def repeated(array: npt.NDArray[Any]) -> Any:
        return cupy.tile(cupy.asarray(array), (copies, 1))

    arrays = [repeated(a) for a in (anchor.codewords, anchor.offsets, anchor.low_high)]
    return [
        Anchor(anchor.rows, anchor.columns, dictionary, *(array[i] for array in arrays))
        for i in range(copies)
    ]


def bits(x: Any) -> Any:
    """The memory of a bf16 tensor of torch as a uint16 array of CuPy."""
    import cupy
    import torch

    return cupy.asarray(x.view(torch.int16)).view(cupy.uint16)


def execute(launch: Launch) -> None:
    """On torch's current stream."""
