"""Sums that scales are refitted by, and what follows from new scales: one pass over each array."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import kernel
from qmoe_format.codec.kernels.unaligned import pointer
from qmoe_format.quantize.kernels.vectors import (
    WIDTH,
    broadcast,
    load_levels,
    load_vector,
    store_vector,
    vector_sum,
    zero_vector,
)

CHUNK = 256  # rows


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
        for column in range(0, columns, WIDTH):
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
        for at in range(row * columns, (row + 1) * columns, WIDTH):
            product = load_vector(t, at) - load_vector(g, at)
            aim = load_vector(x, at) + load_vector(s, at) * far
            store_vector(t, at, aim)
            store_vector(g, at, aim - product * change)


@kernel
def column_sums(_, levels, scale, target, gradient, ratio, sums, begin, end):
    """Sums over rows, of which A = diag(r) T: A_i . G_i and A_i . A_i of each column i.

    Before, target - gradient is multiplied by ``ratio``.

    Args:
        sums: float32 ``[rows / CHUNK, 2, columns]``, to be written: of each CHUNK of rows, so that
            their order does not depend on threads.
    """
    columns = levels.shape[1]
    lv, t, g, out = pointer(levels), pointer(target), pointer(gradient), pointer(sums)
    for row in range(begin, end):
        first = row // CHUNK * 2 * columns
        if row % CHUNK == 0:
            sums[row // CHUNK] = 0
        size, change = broadcast(scale[row]), broadcast(ratio[row])
        for column in range(0, columns, WIDTH):
            at = row * columns + column
            aim = load_vector(t, at)
            own = aim + (load_vector(g, at) - aim) * change
            store_vector(g, at, own)
            a = load_levels(lv, at) * size
            aims, squares = first + column, first + columns + column
            store_vector(out, aims, load_vector(out, aims) + a * own)
            store_vector(out, squares, load_vector(out, squares) + a * a)


@kernel
def moves(columns, levels, scale, steps, result, begin, end):
    """What changes in Q where some columns' scales do: float32 ``[rows, number of columns]``."""
    for row in range(begin, end):
        for place in range(columns.shape[0]):
            result[row, place] = levels[row, columns[place]] * scale[row] * steps[place]


@kernel
def moved_sums(columns, move, change, sums, begin, end):
    """Dot products of the moves with the change of the gradient: float64 ``[rows]``."""
    for row in range(begin, end):
        total = 0.0
        for place in range(columns.shape[0]):
            total += move[row, place] * change[row, columns[place]]
        sums[row] = total


@kernel
def take_columns(order, matrix, result, begin, end):
    """The columns ``order`` of ``matrix``. Torch's ``index_select`` takes ten times as long."""
    for row in range(begin, end):
        for place in range(order.shape[0]):
            result[row, place] = matrix[row, order[place]]


@kernel
def take_both(order, matrix, result, begin, end):
    """The rows and columns ``order`` of ``matrix``."""
    for row in range(begin, end):
        source = order[row]
        for place in range(order.shape[0]):
            result[row, place] = matrix[source, order[place]]


@kernel
def group_factors(groups, factors, hessian, begin, end):
    """``hessian.inverse_factor`` of the Hessian of each group of columns, in float64.

    A group that is not positive definite gets NaN, with which no level is better than another.

    Args:
        groups: int64 ``[groups, GROUP]``.
        factors: float32 ``[groups, GROUP, GROUP]``, to be written.
        hessian: float32 ``[columns, columns]``.
    """
    size = groups.shape[1]
    v, u = np.empty((size, size)), np.zeros((size, size))
    for group in range(begin, end):
        for i in range(size):
            for j in range(i, size):
                v[i, j] = hessian[groups[group, i], groups[group, j]]
        for j in range(size - 1, -1, -1):  # H = V V^T, V upper
            for i in range(j, -1, -1):
                rest = v[i, j]
                for k in range(j + 1, size):
                    rest -= v[i, k] * v[j, k]
                v[i, j] = np.sqrt(rest) if i == j else rest / v[j, j]
        for j in range(size):  # U = V^-1
            u[j, j] = 1 / v[j, j]
            for i in range(j - 1, -1, -1):
                total = 0.0
                for k in range(i + 1, j + 1):
                    total += v[i, k] * u[k, j]
                u[i, j] = -total / v[i, i]
        for i in range(size):
            for j in range(size):
                factors[group, i, j] = u[i, j]
