"""The scales of a row, for kernels."""

from __future__ import annotations

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.jit import inlined


@inlined
def low_high(scales, row):
    """What levels of -1 and 1 stand for; ``scales`` bf16 [rows, 1 or 2]."""
    high = simd.from_bf16(scales[row, scales.shape[1] - 1])
    low = simd.from_bf16(scales[row, 0])
    return -low if scales.shape[1] == 1 else low, high
