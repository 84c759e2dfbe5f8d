"""Kernels of packed matrices: packing levels, and products."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.addresses import (
    bytes_at,
    codes_at,
    fetch_add,
    floats_at,
    shorts_at,
    words_at,
)
from qmoe_format.codec.kernels.byte_dot import (
    ZERO_OF_FOUR,
    ZERO_OF_TWO,
    add_scaled_sums,
    dot_four_bits,
    dot_four_magnitudes,
    dot_two_bits,
    dot_two_magnitudes,
)
from qmoe_format.codec.kernels.jit import callback, called, inlined, kernel
from qmoe_format.codec.kernels.rounding import BLOCK, round_block
from qmoe_format.codec.kernels.unaligned import advance, pointer, prefetch

GROUP = 4  # rows that are multiplied side by side: each alone would wait for its own sums
# The largest magnitude in codes of as many bits, which is added to each level.
LIMITS = {2: ZERO_OF_TWO, 4: ZERO_OF_FOUR}
_ZERO, _BLOCK = np.uint64(0), np.uint64(BLOCK)
_ALL = np.uint64(0xFFFF)
_AHEAD = np.uint64(4096)  # bytes: what the processor does not prefetch by itself


class Product(NamedTuple):
    """One row of the table of products: addresses and sizes, all int64.

    The first eleven are of the matrix. ``x`` and ``out`` have ``tokens`` rows, and strides in
    elements; the others are room for x as ``round_all`` leaves it.
    """

    codes: Any  # uint8 [groups of rows, blocks, GROUP, 32 * bits]: in the order of reading
    bits: Any
    rows: Any
    columns: Any
    blocks: Any
    begins: Any  # int64 [rows + 1]: of each row's exceptions
    places: Any  # uint16 [exceptions + 16]: their columns
    excess: Any  # int8 [exceptions + 16]: what their codes leave out
    two_scales: Any  # whether negative levels have a scale of their own
    row_scale: Any  # float32 [rows, 2]: of levels, and of their magnitudes if ``two_scales``
    column_scale: Any  # float32 [columns]
    x: Any  # float32 [tokens, columns]
    x_stride: Any
    tokens: Any
    scaled: Any  # float32 [tokens, columns]: x times column scales, rounded
    rounded: Any  # int8 [tokens, blocks, BLOCK]: the same over its block's unit
    units: Any  # float32 [tokens, blocks]
    offsets: Any  # float32 [tokens]: the sum of rounded x, times what is added to levels
    out: Any  # float32 [tokens, rows]
    out_stride: Any


FIELDS = len(Product._fields)
SCRATCH = slice(14, 18)  # from ``scaled`` on


@kernel
def count_beyond(first, last, levels, counts):
    """``counts`` int64 [rows, 2]: levels beyond the limits of 2 and of 4 bits."""
    for row in range(first, last):
        two = four = 0
        for level in levels[row]:
            two += abs(level) > ZERO_OF_TWO
            four += abs(level) > ZERO_OF_FOUR
        counts[row, 0], counts[row, 1] = two, four


@kernel
def pack_rows(first, last, levels, bits, limit, codes, begins, places, excess):
    """Pack ``levels`` int8 [rows, columns]; the other arguments as in ``Product``."""
    columns = levels.shape[1]
    fields = 8 // bits
    for row in range(first, last):
        for block in range(codes.shape[1]):
            for i in range(BLOCK // 64):
                start = block * BLOCK + 64 * i
                target = codes[row // GROUP, block, row % GROUP, 64 * (i // fields) :]
                shift = bits * (i % fields)
                for j in range(min(64, columns - start)):
                    level = min(max(levels[row, start + j], -limit), limit)
                    target[j] |= np.uint8((level + limit) << shift)
        at = begins[row]
        if at < begins[row + 1]:
            for column in range(columns):
                level = levels[row, column]
                if abs(level) > limit:
                    places[at] = column
                    excess[at] = level - min(max(level, -limit), limit)
                    at += 1


@inlined
def _product(table, i):
    """Row ``i`` of the table, to whose first number ``table`` points."""
    p = advance(table, np.uint64(i * FIELDS))
    return Product(
        p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13],
        p[14], p[15], p[16], p[17], p[18], p[19],
    )  # fmt: skip


@called
def round_products(table, count):
    """``round_all`` for kernels."""
    for i in range(count):
        p = _product(table, i)
        x, column_scale, scaled = floats_at(p.x), floats_at(p.column_scale), floats_at(p.scaled)
        rounded, units, offsets = bytes_at(p.rounded), floats_at(p.units), floats_at(p.offsets)
        for token in range(p.tokens):
            for column in range(p.columns):
                value = x[token * p.x_stride + column] * column_scale[column]
                scaled[token * p.columns + column] = value
            offset = np.float32(0)
            for block in range(p.blocks):
                start, place = block * BLOCK, token * p.blocks + block
                count = min(BLOCK, p.columns - start)
                unit, total = round_block(
                    scaled, token * p.columns + start, count, rounded, place * BLOCK
                )
                units[place] = unit
                offset += unit * np.float32(total)
            offsets[token] = offset * np.float32(ZERO_OF_TWO if p.bits == 2 else ZERO_OF_FOUR)


@kernel
def round_all(table):
    """Round the x of all products to int8."""
    round_products(pointer(table), len(table))


def _as_function(dot):
    """Functions can be handed to others in a kernel, instructions cannot."""

    @inlined
    def function(codes, place, x, start):
        return dot(codes, place, x, start)

    return function


_two, _two_magnitudes = map(_as_function, (dot_two_bits, dot_two_magnitudes))
_four, _four_magnitudes = map(_as_function, (dot_four_bits, dot_four_magnitudes))


@inlined
def _sums(dot, dot_magnitudes, p, row, token):
    """Of the codes of GROUP rows times rounded x, then of their magnitudes if those are needed."""
    codes, block_bytes = codes_at(p.codes), np.uint64(32 * p.bits)
    x = advance(bytes_at(p.rounded), np.uint64(token * p.blocks) * _BLOCK)
    units = advance(floats_at(p.units), np.uint64(token * p.blocks))
    place, start = np.uint64(row) * np.uint64(p.blocks) * block_bytes, _ZERO
    a = b = c = d = simd.zero_vector()
    e = f = g = h = simd.zero_vector()
    for block in range(np.uint64(p.blocks)):
        unit = units[block]
        for i in range(GROUP):
            prefetch(codes, place + _AHEAD + np.uint64(i) * block_bytes)
        if p.two_scales:
            e = add_scaled_sums(e, dot_magnitudes(codes, place, x, start), unit)
            second = place + block_bytes
            f = add_scaled_sums(f, dot_magnitudes(codes, second, x, start), unit)
            third = second + block_bytes
            g = add_scaled_sums(g, dot_magnitudes(codes, third, x, start), unit)
            h = add_scaled_sums(h, dot_magnitudes(codes, third + block_bytes, x, start), unit)
        a = add_scaled_sums(a, dot(codes, place, x, start), unit)
        place += block_bytes
        b = add_scaled_sums(b, dot(codes, place, x, start), unit)
        place += block_bytes
        c = add_scaled_sums(c, dot(codes, place, x, start), unit)
        place += block_bytes
        d = add_scaled_sums(d, dot(codes, place, x, start), unit)
        place += block_bytes
        start += _BLOCK
    sums = simd.vector_sum(a), simd.vector_sum(b), simd.vector_sum(c), simd.vector_sum(d)
    sizes = simd.vector_sum(e), simd.vector_sum(f), simd.vector_sum(g), simd.vector_sum(h)
    return sums, sizes


@inlined
def _exceptions(p, row, token):
    """What the exceptions of a row add to its sums, of levels and of magnitudes."""
    begins = words_at(p.begins)
    at, end = begins[row], begins[row + 1]
    levels = magnitudes = np.float32(0)
    if at < end:
        x = advance(floats_at(p.scaled), np.uint64(token * p.columns))
        places, excess = shorts_at(p.places), bytes_at(p.excess)
        sums = sizes = simd.zero_vector()
        while at < end:
            these = _ALL >> np.uint64(max(16 - (end - at), 0))
            some = simd.gather_some(x, _ZERO, places, np.uint64(at), these)
            sums = simd.add_times_levels(sums, some, excess, np.uint64(at))
            if p.two_scales:
                sizes = simd.add_times_magnitudes(sizes, some, excess, np.uint64(at))
            at += 16
        levels, magnitudes = simd.vector_sum(sums), simd.vector_sum(sizes)
    return levels, magnitudes


@inlined
def _multiply(dot, dot_magnitudes, p, first, last):
    out, offsets, scales = floats_at(p.out), floats_at(p.offsets), floats_at(p.row_scale)
    for group in range(first, last):
        row = GROUP * group
        for token in range(p.tokens):
            sums, sizes = _sums(dot, dot_magnitudes, p, row, token)
            for i in range(min(GROUP, p.rows - row)):
                levels, magnitudes = _exceptions(p, row + i, token)
                value = (sums[i] - offsets[token] + levels) * scales[2 * (row + i)]
                if p.two_scales:
                    value += (sizes[i] + magnitudes) * scales[2 * (row + i) + 1]
                out[token * p.out_stride + row + i] = value


@called
def _multiply_part(table, count, part, parts):
    for i in range(count):
        p = _product(table, i)
        groups = (p.rows + GROUP - 1) // GROUP
        first, last = groups * part // parts, groups * (part + 1) // parts
        if p.bits == 2:
            _multiply(_two, _two_magnitudes, p, first, last)
        else:
            _multiply(_four, _four_magnitudes, p, first, last)


# What ``multiply_all`` finds at an address, each an int64: parts of the products taken and done,
# all parts, the address of the table of products, and its rows.
TAKEN, DONE, PARTS, TABLE, COUNT = map(np.uint64, range(5))


@inlined
def multiply_parts(taken, done, parts, table, count):
    """Take parts of all products while there are any.

    Returns whether the last one of all was done here.
    """
    last = False
    part = fetch_add(taken, 1)
    while part < parts:
        _multiply_part(table, count, part, parts)
        last = fetch_add(done, 1) == parts - 1
        part = fetch_add(taken, 1)
    return last


@callback
def multiply_all(job):
    """All products, of x as ``round_all`` left it."""
    f = words_at(job)
    multiply_parts(advance(f, TAKEN), advance(f, DONE), f[PARTS], words_at(f[TABLE]), f[COUNT])
