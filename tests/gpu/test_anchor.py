"""The benchmark's anchor kernel is right for any shape."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import gpu_anchor
from qmoe_format.dtypes import to_float32
from tests.gpu import shim


def bf16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Truncated, not rounded: any bf16 numbers will do."""
    bits: npt.NDArray[np.uint32] = values.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


@shim.needs_compiler
@pytest.mark.parametrize("zeros", [0.0, 0.885, 1.0])
@pytest.mark.parametrize(
    ("rows", "columns", "warps"), [(9, 768, 4), (4, 1023, 4), (1, 1, 4), (33, 70, 32)]
)
def test_product(rows: int, columns: int, warps: int, zeros: float) -> None:
    rng = np.random.default_rng(rows)
    levels = rng.choice([-1, 0, 1], (rows, columns), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    low_high = bf16(rng.random((rows, 2)) * [-1, 1])
    x = bf16(rng.standard_normal(columns))
    y = np.full(rows, 0x7FC0, np.uint16)
    anchor = gpu_anchor.encode(levels.astype(np.int8), low_high)
    shim.execute(gpu_anchor.matvec(anchor, x, y, warps))

    low, high = to_float32(low_high, "BF16").astype(np.float64).T[:, :, None]
    weights = np.where(levels < 0, low, np.where(levels > 0, high, 0))
    vector = to_float32(x, "BF16").astype(np.float64)
    exact, terms = weights @ vector, np.abs(weights) @ np.abs(vector)
    half = np.where(exact == 0, 0, np.ldexp(1.0, np.frexp(exact)[1] - 9))  # of a last place of bf16
    error = np.abs(to_float32(y, "BF16") - exact)
    assert (error <= half + columns * 2.0**-22 * terms).all()
