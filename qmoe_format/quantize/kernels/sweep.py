"""A round of descent, by rows that do not depend on each other.

Few levels move. A move of column i by d changes a row's gradient by -d H_i, but nothing asks for
the gradient of a block of columns before its turn. So moves are written down, and a block fetches
those that were made since its last turn:

    gradient, rows by blocks        moves of a row
    [ A | B | C | D ]               A: (3, +d)   C: (130, -d), (141, +d)

Blocks A, B, C, D have their turns, and each applies the moves before it; then ``_settle`` applies
to each those after it. So the gradient passes through the cache twice a round, whatever moves, and
of H only the 64 columns of one block are needed at a time.

A tile is a block's part of 32 rows, transposed: 64 vectors with a row in each lane.
"""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import inlined, kernel
from qmoe_format.codec.kernels.unaligned import pointer
from qmoe_format.quantize.kernels.rounding import rounded
from qmoe_format.quantize.kernels.vectors import (
    broadcast,
    chosen,
    greater,
    lanes_different,
    lanes_greater,
    least,
    load_levels,
    load_vector,
    magnitude,
    store_vector,
    transpose,
    vector_sum,
    zero_vector,
)
from qmoe_format.quantize.padding import BLOCK, GROUP, LANES

_ONE = np.float32(1)
_TILE = LANES * LANES  # floats that are transposed together


@kernel
def sweep(
    turns, levels, gradient, target, ratio, hessian, factors, scale, column_scale, first, further,
    ternary, sums, begin, end,
):  # fmt: skip
    """Change ``levels`` and ``gradient`` in the rows from ``begin`` to ``end``.

    Args:
        turns: a tuple: the blocks' first columns in the order of their turns, int64 ``[blocks]``;
            for each turn the block's columns, 0 to 63, in groups of 16, int64 ``[blocks, 64]``;
            scratch space: columns and sizes of moves, int32 and float32 ``[rows, columns]``, their
            counts, int32 ``[rows]``, and the counts after each turn, int32 ``[blocks, rows]``; and
            whether target - G is yet to be multiplied by ``ratio``, and whether to compute q.target
            and q.G.
        levels: int8 ``[rows, columns]``.
        gradient: G, float32 ``[rows, columns]``.
        target: float32 ``[rows, columns]``.
        ratio: float32 ``[rows]``.
        hessian: float32 ``[columns, columns]``.
        factors: ``inverse_factor`` of the Hessian of each group, in the order of turns, float32
            ``[groups, 16, 16]``.
        scale, first, further: of rows, see ``Multiples``, float32 ``[rows]``.
        column_scale: float32 ``[columns]``.
        ternary: whether levels end at 1.
        sums: the result, float64 ``[rows, 4]``: q.target, q.G, and how much the number of non-zeros
            and the sum of magnitudes of levels have changed.
    """
    order, members, moves, sizes, counts, marks, stretched, _ = turns
    columns = levels.shape[1]
    tile = np.empty(BLOCK * LANES, np.float32)
    before = np.empty(BLOCK * LANES, np.float32)
    after = np.empty(GROUP * LANES, np.float32)
    best = np.empty(GROUP * LANES, np.float32)
    t, old, new, x = pointer(tile), pointer(before), pointer(after), pointer(best)
    g, h, u, aims = pointer(gradient), pointer(hessian), pointer(factors), pointer(target)
    lv, mv, sz = pointer(levels), pointer(moves), pointer(sizes)
    s, p1, p2 = pointer(scale), pointer(first), pointer(further)
    counts[begin:end] = 0
    sums[begin:end] = 0
    for turn in range(order.shape[0]):
        block = order[turn]
        for row in range(begin, end, LANES):
            for lane in range(LANES):
                j = row + lane
                at, made = j * columns + block, j * columns
                halves = _halves(g, at, LANES)
                if stretched:
                    a, b = _halves(aims, at, LANES)
                    halves = a + (halves[0] - a) * ratio[j], b + (halves[1] - b) * ratio[j]
                halves = _moved(halves, h, columns, block, mv, sz, made, made + counts[j])
                _store_halves(t, lane * LANES, _TILE, halves)
                for k in range(0, BLOCK, LANES):
                    store_vector(old, (k + lane) * LANES, load_levels(lv, at + k))
            for k in range(0, BLOCK, LANES):
                transpose(t, k * LANES)
                transpose(old, k * LANES)
            scales, prices = load_vector(s, row), (load_vector(p1, row), load_vector(p2, row))
            for part in range(0, BLOCK, GROUP):
                own, values = members[turn, part : part + GROUP], column_scale[block:]
                factor = (turn * BLOCK + part) * GROUP
                gain = _best(t, old, scales, values, own, u, factor, new, x)
                better = _round_group(
                    old, scales, values, own, u, factor, prices, ternary, gain, new, x
                )
                for i in range(GROUP if better else 0):
                    was = load_vector(old, own[i] * LANES)
                    now = chosen(better, load_vector(new, i * LANES), was)
                    moving = lanes_different(now, was)
                    if moving == 0:
                        continue
                    column = block + own[i]
                    step = (now - was) * (scales * column_scale[column])
                    for k in range(BLOCK):
                        rest = load_vector(t, k * LANES) - step * h[column * columns + block + k]
                        store_vector(t, k * LANES, rest)
                    store_vector(old, own[i] * LANES, now)
                    store_vector(x, 0, step)
                    for lane in range(LANES):
                        if (moving >> lane) & 1:
                            j = row + lane
                            level = np.int8(before[own[i] * LANES + lane])
                            sums[j, 2] += (level != 0) - (levels[j, column] != 0)
                            sums[j, 3] += abs(level) - abs(levels[j, column])
                            levels[j, column] = level
                            moves[j, counts[j]], sizes[j, counts[j]] = column, best[lane]
                            counts[j] += 1
            for k in range(0, BLOCK, LANES):
                transpose(t, k * LANES)
            for lane in range(LANES):
                j = row + lane
                _store_halves(g, j * columns + block, LANES, _halves(t, lane * LANES, _TILE))
                marks[turn, j] = counts[j]
    _settle(turns, levels, gradient, target, hessian, scale, column_scale, sums, begin, end)
    return tile[0] + before[0] + after[0] + best[0]  # they live until here


@inlined
def _best(tile, old, scales, column_scale, own, u, factor, y, x):
    """The best real values x = q + U^T y of a group, with y = U G; returns what they gain, y.y."""
    gain = zero_vector()
    for i in range(GROUP):
        total = zero_vector()
        for k in range(i, GROUP):
            total = total + load_vector(tile, own[k] * LANES) * u[factor + i * GROUP + k]
        store_vector(y, i * LANES, total)
        gain = gain + total * total
    for i in range(GROUP):
        value = load_vector(old, own[i] * LANES) * (scales * column_scale[own[i]])
        for k in range(i + 1):
            value = value + load_vector(y, k * LANES) * u[factor + k * GROUP + i]
        store_vector(x, i * LANES, value)
    return gain


@inlined
def _round_group(old, scales, column_scale, own, u, factor, prices, ternary, gain, new, x):
    """Round x to levels as in GPTQ; returns the rows that they are better for, a bit each."""
    first, further = prices
    one = broadcast(_ONE)
    inverses = one / scales
    cost, highest = zero_vector(), zero_vector()
    differ = 0
    for i in range(GROUP):
        spread, size = u[factor + i * GROUP + i], column_scale[own[i]]
        value, inverse = scales * size, inverses * (_ONE / size)
        here = load_vector(x, i * LANES)
        level = rounded(here, value, inverse, spread * spread, first, further, ternary)
        error = (here - level * value) * (_ONE / spread)
        was = load_vector(old, own[i] * LANES)
        differ |= lanes_different(level, was)
        store_vector(new, i * LANES, level)
        high, low = magnitude(level), magnitude(was)
        nonzero = least(high, one) - least(low, one)
        cost = cost + error * error + first * nonzero
        if not ternary:
            cost = cost + further * (high - low - nonzero)
        highest = greater(highest, low)
        for k in range(i + 1, GROUP):
            later = load_vector(x, k * LANES) - error * u[factor + i * GROUP + k]
            store_vector(x, k * LANES, later)
    better = lanes_greater(gain, cost)
    if ternary:  # levels beyond 1 are from GPTQ, which may have been allowed them, and have to go
        better |= lanes_greater(highest, one)
    return better & differ


@inlined
def _settle(turns, levels, gradient, target, hessian, scale, column_scale, sums, begin, end):
    """Apply to each block the moves after its turn, and write the first two of ``sums``."""
    order, _, moves, sizes, counts, marks, _, summing = turns
    columns = levels.shape[1]
    g, h, aims, lv = pointer(gradient), pointer(hessian), pointer(target), pointer(levels)
    mv, sz, cs = pointer(moves), pointer(sizes), pointer(column_scale)
    for turn in range(order.shape[0]):
        block = order[turn]
        for j in range(begin, end):
            at, made = j * columns + block, j * columns
            if marks[turn, j] < counts[j]:
                last = made + counts[j]
                halves = _halves(g, at, LANES)
                halves = _moved(halves, h, columns, block, mv, sz, made + marks[turn, j], last)
                _store_halves(g, at, LANES, halves)
            if summing:
                aim, own = zero_vector(), zero_vector()
                for k in range(0, BLOCK, LANES):
                    q = load_levels(lv, at + k) * load_vector(cs, block + k)
                    aim = aim + q * load_vector(aims, at + k)
                    own = own + q * load_vector(g, at + k)
                sums[j, 0] += vector_sum(aim) * scale[j]
                sums[j, 1] += vector_sum(own) * scale[j]


@inlined
def _halves(values, start, step):
    """The two halves of a row's part of a block."""
    return load_vector(values, start), load_vector(values, start + step)


@inlined
def _store_halves(values, start, step, halves):
    store_vector(values, start, halves[0])
    store_vector(values, start + step, halves[1])


@inlined
def _moved(halves, hessian, columns, block, moves, sizes, begin, end):
    """A row's gradient in a block after some moves."""
    left, right = halves
    for i in range(begin, end):
        start, size = moves[i] * columns + block, sizes[i]
        left = left - load_vector(hessian, start) * size
        right = right - load_vector(hessian, start + LANES) * size
    return left, right
