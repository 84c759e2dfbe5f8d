"""GPTQ within a block of columns."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import kernel
from qmoe_format.codec.kernels.unaligned import pointer
from qmoe_format.quantize.kernels.rounding import rounded
from qmoe_format.quantize.kernels.vectors import (
    broadcast,
    load_vector,
    store_levels,
    store_vector,
    transpose,
)
from qmoe_format.quantize.padding import BLOCK, LANES

_ONE = np.float32(1)


@kernel
def gptq_block(
    block, rest, factor, levels, errors, scale, column_scale, first, further, ternary, begin, end
):
    """Round the columns of a block in the rows from ``begin`` to ``end``.

    Args:
        block: its first column.
        rest: what is to be rounded, float32 ``[rows, columns]``.
        factor: U, float32 ``[columns, columns]``.
        levels: the result, int8 ``[rows, columns]``.
        errors: the result, errors over U_ii, float32 ``[rows, columns]``.
        scale, first, further: of rows, see ``Multiples``, float32 ``[rows]``.
        column_scale: float32 ``[columns]``.
        ternary: whether levels end at 1.
    """
    columns = rest.shape[1]
    tile = np.empty(BLOCK * LANES, np.float32)
    chosen = np.empty(BLOCK * LANES, np.float32)
    x, t, q, e = pointer(rest), pointer(tile), pointer(chosen), pointer(errors)
    u, out = pointer(factor), pointer(levels)
    s, a, b = pointer(scale), pointer(first), pointer(further)
    for row in range(begin, end, LANES):
        for lane in range(LANES):
            for i in range(0, BLOCK, LANES):
                part = load_vector(x, (row + lane) * columns + block + i)
                store_vector(t, (i + lane) * LANES, part)
        for i in range(0, BLOCK, LANES):
            transpose(t, i * LANES)
        scales, firsts, furthers = load_vector(s, row), load_vector(a, row), load_vector(b, row)
        inverses = broadcast(_ONE) / scales
        for i in range(BLOCK):
            here = (block + i) * columns + block
            spread = factor[block + i, block + i]
            value = scales * column_scale[block + i]
            inverse = inverses * (_ONE / column_scale[block + i])
            own = load_vector(t, i * LANES)
            level = rounded(own, value, inverse, spread * spread, firsts, furthers, ternary)
            error = (own - level * value) * (_ONE / spread)
            store_vector(q, i * LANES, level)
            store_vector(t, i * LANES, error)
            for k in range(i + 1, BLOCK):
                later = load_vector(t, k * LANES) - error * u[here + k]
                store_vector(t, k * LANES, later)
        for i in range(0, BLOCK, LANES):
            transpose(t, i * LANES)
            transpose(q, i * LANES)
        for lane in range(LANES):
            for i in range(0, BLOCK, LANES):
                at = (i + lane) * LANES
                there = (row + lane) * columns + block + i
                store_vector(e, there, load_vector(t, at))
                store_levels(out, there, load_vector(q, at))
    return tile[0] + chosen[0] + errors[0, 0]  # they live until here
