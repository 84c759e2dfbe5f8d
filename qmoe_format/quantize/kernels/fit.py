"""Sums that scales are refitted by, and what follows from new scales: one pass over each array."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import kernel
from qmoe_format.codec.kernels.simd import load_vector, store_vector, vector_sum, zero_vector
from qmoe_format.codec.kernels.unaligned import pointer
from qmoe_format.quantize.kernels.vectors import broadcast, load_levels
from qmoe_format.quantize.padding import LANES


@kernel
def row_sums(
    _, levels, scale, column_scale, target, gradient, exact, seen, weights, sums, begin, end
):
    """Dot products of each row q of Q, into ``sums``, float64 ``[rows, 4]``.

    They are with target - gradient (Q H), ``exact``, ``seen`` and ``weights``.
    """
    columns = levels.shape[1]
    lv, cs, t, g = pointer(levels), pointer(column_scale), pointer(target), pointer(gradient)
    x, s, w = pointer(exact), pointer(seen), pointer(weights)
    for row in range(begin, end):
        a, b, c, d = zero_vector(), zero_vector(), zero_vector(), zero_vector()
        for column in range(0, columns, LANES):
            at = row * columns + column
            q = load_levels(lv, at) * load_vector(cs, column)
            a = a + q * (load_vector(t, at) - load_vector(g, at))
            b = b + q * load_vector(x, at)
            c = c + q * load_vector(s, at)
            d = d + q * load_vector(w, at)
        for place, total in enumerate((a, b, c, d)):
            sums[row, place] = np.float64(vector_sum(total)) * scale[row]


@kernel
def aim_at(_, exact, seen, longer, ratio, target, gradient, begin, end):
    """Multiply target - gradient by ``ratio``, and make the target ``exact`` + longer ``seen``."""
    columns = exact.shape[1]
    x, s, t, g = pointer(exact), pointer(seen), pointer(target), pointer(gradient)
    for row in range(begin, end):
        far, change = broadcast(longer[row]), broadcast(ratio[row])
        for at in range(row * columns, (row + 1) * columns, LANES):
            product = load_vector(t, at) - load_vector(g, at)
            aim = load_vector(x, at) + load_vector(s, at) * far
            store_vector(t, at, aim)
            store_vector(g, at, aim - product * change)
