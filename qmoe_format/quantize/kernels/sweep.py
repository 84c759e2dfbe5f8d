"""A round of descent, by rows that do not depend on each other.

Few levels move. A move of column i in a row by d changes the row's gradient by -d H_i, but nothing
asks for the gradient of a block of columns before its turn. So moves are written down, and a block
fetches those that were made since its last turn:

    gradient, rows by blocks        moves of a row
    [ A | B | C | D ]               A: (3, +d) | C: (130, -d), (141, +d)

``sweep`` turns to A, B, C, D, and each applies the moves before it; ``settle`` applies to each
those after it. So the gradient passes through the cache twice a round, whatever moves, and of H
only the 64 columns of the block are needed at a time.
"""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import inlined, kernel
from qmoe_format.codec.kernels.simd import load_vector, store_vector, vector_sum, zero_vector
from qmoe_format.codec.kernels.unaligned import pointer
from qmoe_format.quantize.kernels.gptq_block import BLOCK, LANES
from qmoe_format.quantize.kernels.rounding import rounded
from qmoe_format.quantize.kernels.vectors import (
    broadcast,
    chosen,
    lanes_different,
    lanes_greater,
    least,
    load_levels,
    magnitude,
    transpose,
    where_greater,
)

_ZERO, _ONE = np.float32(0), np.float32(1)


@inlined
def _four(values, start):
    return (
        load_vector(values, start),
        load_vector(values, start + 16),
        load_vector(values, start + 32),
        load_vector(values, start + 48),
    )


@inlined
def _store_four(values, start, four):
    store_vector(values, start, four[0])
    store_vector(values, start + 16, four[1])
    store_vector(values, start + 32, four[2])
    store_vector(values, start + 48, four[3])


@inlined
def _gather_four(tile, start):
    return (
        load_vector(tile, start),
        load_vector(tile, start + 256),
        load_vector(tile, start + 512),
        load_vector(tile, start + 768),
    )


@inlined
def _scatter_four(tile, start, four):
    store_vector(tile, start, four[0])
    store_vector(tile, start + 256, four[1])
    store_vector(tile, start + 512, four[2])
    store_vector(tile, start + 768, four[3])


@inlined
def _stretched(target, gradient, ratio):
    a, b, c, d = target
    e, f, g, h = gradient
    return a + (e - a) * ratio, b + (f - b) * ratio, c + (g - c) * ratio, d + (h - d) * ratio


@inlined
def _moved(four, hessian, columns, block, moves, sizes, begin, end):
    a, b, c, d = four
    for i in range(begin, end):
        start, size = moves[i] * columns + block, sizes[i]
        a = a - load_vector(hessian, start) * size
        b = b - load_vector(hessian, start + 16) * size
        c = c - load_vector(hessian, start + 32) * size
        d = d - load_vector(hessian, start + 48) * size
    return a, b, c, d


@kernel
def sweep(
    levels, gradient, target, ratio, hessian, factors, scale, column_scale, first, further, ternary,
    order, members, moves, sizes, counts, marks, begin, end,
):  # fmt: skip
    """Change ``levels`` in the rows from ``begin`` to ``end``, and note the moves.

    Args:
        levels: int8 ``[rows, columns]``.
        gradient: G, float32 ``[rows, columns]``; before, target - G is multiplied by ``ratio``.
        target: float32 ``[rows, columns]``.
        ratio: float32 ``[rows]``.
        hessian: float32 ``[columns, columns]``.
        factors: ``inverse_factor`` of the Hessian of each group of 16 columns, in the order of
            turns, float32 ``[groups, 16, 16]``.
        scale, first, further: of rows, see ``Multiples``, float32 ``[rows]``.
        column_scale: float32 ``[columns]``.
        ternary: whether levels end at 1.
        order: the blocks' first columns, int64 ``[blocks]``.
        members: of each block in this order, 0 to 63 in the order of groups, int64 ``[blocks, 64]``.
        moves, sizes: columns and sizes of moves, int32 and float32 ``[rows, most]``.
        counts: of moves, int32 ``[rows]``.
        marks: ``counts`` after each block, int32 ``[blocks, rows]``.
    """
    columns, most = levels.shape[1], moves.shape[1]
    tile = np.empty(BLOCK * LANES, np.float32)
    before = np.empty(BLOCK * LANES, np.float32)
    after = np.empty(LANES * LANES, np.float32)
    best = np.empty(LANES * LANES, np.float32)
    t, old, new, x = pointer(tile), pointer(before), pointer(after), pointer(best)
    g, h, u, aims = pointer(gradient), pointer(hessian), pointer(factors), pointer(target)
    lv, mv, sz = pointer(levels), pointer(moves), pointer(sizes)
    s, p1, p2 = pointer(scale), pointer(first), pointer(further)
    one = broadcast(_ONE)
    for turn in range(order.shape[0]):
        block = order[turn]
        for row in range(begin, end, LANES):
            full = 0
            for lane in range(LANES):
                j = row + lane
                at = j * columns + block
                four = _stretched(_four(aims, at), _four(g, at), ratio[j])
                four = _moved(four, h, columns, block, mv, sz, j * most, j * most + counts[j])
                for k in range(0, BLOCK, LANES):
                    store_vector(old, (k + lane) * LANES, load_levels(lv, at + k))
                _scatter_four(t, lane * LANES, four)
                if counts[j] + BLOCK > most:
                    full |= 1 << lane
            for k in range(0, BLOCK, LANES):
                transpose(t, k * LANES)
                transpose(old, k * LANES)
            scales, firsts, furthers = load_vector(s, row), load_vector(p1, row), load_vector(p2, row)
            inverses = one / scales
            for part in range(0, BLOCK, LANES):
                factor = (turn * BLOCK + part) * LANES
                gain = zero_vector()
                for i in range(LANES):
                    total = zero_vector()
                    for k in range(i, LANES):
                        own = load_vector(t, members[turn, part + k] * LANES)
                        total = total + own * u[factor + i * LANES + k]
                    store_vector(new, i * LANES, total)
                    gain = gain + total * total
                for i in range(LANES):
                    member = members[turn, part + i]
                    sum = load_vector(old, member * LANES) * (scales * column_scale[block + member])
                    for k in range(i + 1):
                        sum = sum + load_vector(new, k * LANES) * u[factor + k * LANES + i]
                    store_vector(x, i * LANES, sum)
                cost = zero_vector()
                differ = 0
                for i in range(LANES):
                    member = members[turn, part + i]
                    spread = u[factor + i * LANES + i]
                    value = scales * column_scale[block + member]
                    inverse = inverses * (_ONE / column_scale[block + member])
                    own = load_vector(x, i * LANES)
                    level = rounded(own, value, inverse, spread * spread, firsts, furthers, ternary)
                    error = (own - level * value) * (_ONE / spread)
                    was = load_vector(old, member * LANES)
                    differ |= lanes_different(level, was)
                    store_vector(new, i * LANES, level)
                    is_now, was_then = magnitude(level), magnitude(was)
                    nonzero = least(is_now, one) - least(was_then, one)
                    cost = cost + error * error + firsts * nonzero
                    if not ternary:
                        cost = cost + furthers * (is_now - was_then - nonzero)
                    for k in range(i + 1, LANES):
                        later = load_vector(x, k * LANES) - error * u[factor + i * LANES + k]
                        store_vector(x, k * LANES, later)
                better = lanes_greater(gain, cost) & differ & ~full
                if better == 0:
                    continue
                for i in range(LANES):
                    member = members[turn, part + i]
                    was = load_vector(old, member * LANES)
                    now = chosen(better, load_vector(new, i * LANES), was)
                    moving = lanes_different(now, was)
                    if moving == 0:
                        continue
                    column = block + member
                    step = (now - was) * (scales * column_scale[column])
                    store_vector(old, member * LANES, now)
                    store_vector(x, 0, step)
                    for k in range(BLOCK):
                        rest = load_vector(t, k * LANES) - step * h[column * columns + block + k]
                        store_vector(t, k * LANES, rest)
                    for lane in range(LANES):
                        if (moving >> lane) & 1:
                            j = row + lane
                            moves[j, counts[j]] = column
                            sizes[j, counts[j]] = best[lane]
                            levels[j, column] = np.int8(before[member * LANES + lane])
                            counts[j] += 1
            for k in range(0, BLOCK, LANES):
                transpose(t, k * LANES)
            for lane in range(LANES):
                j = row + lane
                _store_four(g, j * columns + block, _gather_four(t, lane * LANES))
                marks[turn, j] = counts[j]
    return tile[0] + before[0] + after[0] + best[0]  # they live until here


@kernel
def settle(
    levels, gradient, target, hessian, scale, column_scale, order, moves, sizes, counts, marks,
    sums, begin, end,
):  # fmt: skip
    """Apply to each block the moves after its turn.

    Args:
        sums: float64 ``[rows, 4]``, to be written: q.target, q.G, the number of non-zeros, and the sum of
            magnitudes of levels.
    """
    columns, most = levels.shape[1], moves.shape[1]
    g, h, aims, lv = pointer(gradient), pointer(hessian), pointer(target), pointer(levels)
    mv, sz, cs = pointer(moves), pointer(sizes), pointer(column_scale)
    sums[begin:end] = 0
    for turn in range(order.shape[0]):
        block = order[turn]
        for j in range(begin, end):
            at = j * columns + block
            four = _four(g, at)
            first, last = j * most + marks[turn, j], j * most + counts[j]
            if last > first:
                four = _moved(four, h, columns, block, mv, sz, first, last)
                _store_four(g, at, four)
            aim, own = zero_vector(), zero_vector()
            ones, total = zero_vector(), zero_vector()
            for k in range(4):
                level = load_levels(lv, at + k * LANES)
                q = level * load_vector(cs, block + k * LANES)
                aim = aim + q * load_vector(aims, at + k * LANES)
                own = own + q * load_vector(g, at + k * LANES)
                size = magnitude(level)
                ones = ones + where_greater(size, zero_vector(), broadcast(_ONE))
                total = total + size
            sums[j, 0] += vector_sum(aim) * scale[j]
            sums[j, 1] += vector_sum(own) * scale[j]
            sums[j, 2] += vector_sum(ones)
            sums[j, 3] += vector_sum(total)
