"""Codewords as a byte for each weight, 1 where it is not 0: the first stage where zeros are few.

``scan`` takes a step for each non-zero. Here each entry takes one vector of bytes, whatever it
holds, made of its bits by one instruction of AVX-512 and a few of AVX2. What lies behind the entry
in its pattern, zeros and its length, is overwritten by the next one:

    entries   0010  01  00010
    stores    0 0 1 0 0 0 0 0
                      0 1 0 0 0 0 0 0
                          0 0 0 1 0 0 0 0

Then the signs of 64 weights at a time are deposited at the bytes that are not 0. Rows come in
slabs, a few whole ones or a part of one, so that all of this stays in the first-level cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types, uint64

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.byte_dot import load_bytes
from qmoe_format.codec.kernels.jit import called, inlined, instruction, keep_apart
from qmoe_format.codec.kernels.scan import (
    EIGHT,
    ENDS_EARLY,
    LANE,
    OK,
    ONE,
    REASONS,
    SEVEN,
    THREE,
    TWO,
    ZERO,
    as_entries,
    beginning,
    segment_at,
)
from qmoe_format.codec.kernels.tables import LENGTH_BITS, LONG
from qmoe_format.codec.kernels.unaligned import advance, load8, load32, load64, pointer, store64

SLAB = 8192  # weights, a multiple of the blocks of x; rows of fewer than half come together
ROOM = SLAB + 5 * 256  # bytes of a slab, and of the entries that reach beyond it

_AT_ONCE = 4  # codewords from one load of 64 bits, 7 of which may belong to others
_WIDEST = np.uint64(57 // _AT_ONCE)
_FOUR, _SIXTEEN, _WORD = np.uint64(_AT_ONCE), np.uint64(16), np.uint64(64)
_LONG = np.uint64(LONG)
_LONGEST = np.uint64(64 - LENGTH_BITS)  # that a pattern has room for
BLOCK = np.uint64(256)  # weights whose signs are found at a time
_TWELVE = np.uint64(12)  # of profile ``fast``
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class Patterns(NamedTuple):
    """What each codeword stands for."""

    words: Any  # pointer to ``Tables.patterns``
    entries: Any  # ``scan.Entries``


@inlined
def as_patterns(entries, words):
    return Patterns(pointer(words), as_entries(*entries))


class Part(NamedTuple):
    """A row, or ``SLAB`` weights of it, or their rest."""

    codes: Any  # pointer to uint8: 1 or 0 for each weight, and anything behind them
    row: Any
    column: Any  # uint64, the first one
    columns: Any  # uint64
    data: Any  # pointer to the bytes of the segment
    left: Any  # bits of it that may be signs
    end: Any  # bits of it


def _vector_at(builder, values, place, count):
    kind = ir.VectorType(ir.IntType(8), count)
    return builder.bitcast(builder.gep(values, [place]), kind.as_pointer())


@instruction(lambda: types.uint8())
def _one(builder):
    """1, which the compiler takes for any number. Otherwise it loads a vector of ones for each
    entry, where choosing bytes of one in a register is enough."""
    byte = ir.IntType(8)
    return builder.asm(ir.FunctionType(byte, [byte]), "", "=r,0", [byte(1)], side_effect=False)


@instruction(
    lambda words, *_: uint64(words, uint64, types.uint8, types.CPointer(types.uint8), uint64)
)
def _expand_entry(builder, words, codeword, one, codes, place):
    """Write a pattern's bits as bytes, each 0 or ``one``, and return its length."""
    word = builder.load(builder.gep(words, [codeword]))
    count = word.type.width
    bits = builder.bitcast(word, ir.VectorType(ir.IntType(1), count))
    target = _vector_at(builder, codes, place, count)
    ones = simd.splat(builder, one, count)
    none = ir.Constant(target.type.pointee, [0] * count)
    builder.store(builder.select(bits, ones, none), target).align = 1
    length = builder.lshr(word, word.type(count - LENGTH_BITS))
    return builder.zext(length, ir.IntType(64)) if count < 64 else length


@instruction(lambda *_: types.void(types.CPointer(types.uint8), uint64, uint64))
def _move(builder, codes, target, source):
    loaded = load_bytes(builder, codes, source)
    builder.store(loaded, _vector_at(builder, codes, target, 64)).align = 1


@instruction(lambda *_: uint64(types.CPointer(types.uint8), uint64))
def ones_at(builder, codes, place):
    """The bits of 64 bytes that are not 0."""
    loaded = load_bytes(builder, codes, place)
    ones = builder.icmp_unsigned("!=", loaded, ir.Constant(loaded.type, [0] * 64))
    return builder.bitcast(ones, ir.IntType(64))


@called
def _expand_long(entries, codeword, codes, place):
    """``_expand_entry`` for any length."""
    keep_apart()
    length = entries.steps[codeword] & LANE
    for zeros in range(ZERO, length, EIGHT):
        store64(codes, place + zeros, ZERO)
    first = np.uint64(entries.words) * codeword
    for k in range(np.uint64(entries.ones[codeword])):
        lanes = entries.positions[first + (k >> TWO)]
        codes[place + ((lanes >> (_SIXTEEN * (k & THREE))) & LANE)] = np.uint8(1)
    return length


@inlined
def _expand_next(patterns, long, codeword, one, codes, place):
    """Write an entry as bytes, and return where the next one begins."""
    length = _expand_entry(patterns.words, codeword, one, codes, place)
    if long and length == _LONG:  # seldom, for where zeros are many other kernels are faster
        length = _expand_long(patterns.entries, codeword, codes, place)
    return place + length


@inlined
def _expand_codewords(width, long, patterns, codes, data, left, place, limit, end):
    """Write bytes from ``place`` on until ``limit`` is reached; the segment has them until ``end``.

    Args:
        long: whether there are entries too long for their pattern.

    Returns:
        The bits left of the segment, and the place reached.
    """
    one = _one()
    code = (ONE << width) - ONE
    four = _FOUR * width
    before_last = (_FOUR - ONE) * patterns.entries.longest  # so that all four are the segment's
    safe = min(limit, end - before_last) if width <= _WIDEST and end > before_last else ZERO
    while place < safe and left >= four:
        left -= four
        word, phase = load64(data, left >> THREE), left & SEVEN
        for k in range(_AT_ONCE):
            codeword = simd.extract(word, code << (phase + np.uint64(_AT_ONCE - 1 - k) * width))
            place = _expand_next(patterns, long, codeword, one, codes, place)
    while place < limit and left >= width:
        left -= width
        codeword = (load32(data, left >> THREE) >> (left & SEVEN)) & code
        place = _expand_next(patterns, long, codeword, one, codes, place)
    return left, place


@called
def _expand(width, patterns, codes, data, left, place, limit, end):
    """``_expand_codewords``, which is faster when the compiler knows more."""
    keep_apart()
    if width == _TWELVE and patterns.entries.longest <= _LONGEST:
        return _expand_codewords(_TWELVE, False, patterns, codes, data, left, place, limit, end)
    return _expand_codewords(width, True, patterns, codes, data, left, place, limit, end)


@inlined
def _signs(part, at, these, seen):
    """Which of ``these`` of 64 weights are negative, as bits, and ``seen`` after them."""
    ones = ones_at(part.codes, at) & these
    skipped = seen & SEVEN
    signs = load64(part.data, seen >> THREE) >> skipped
    count = simd.popcount(ones)
    if skipped + count > _WORD:
        signs |= load8(part.data, (seen >> THREE) + EIGHT) << (_WORD - skipped)
    return simd.deposit(signs, ones), seen + count


@inlined
def _last_signs(part, at, seen):
    """``_signs`` where the row or the segment may end."""
    if at >= part.columns or seen > part.left:
        return ZERO, seen
    return _signs(part, at, _ALL >> (_WORD - min(part.columns - at, _WORD)), seen)


@inlined
def negatives(part, at, seen):
    """Which of ``BLOCK`` weights from ``at`` on are negative, four words, and ``seen`` after them.

    All of them are in the part, and the segment has as many bits, should there be a sign for each.
    """
    a, seen = _signs(part, at, _ALL, seen)
    b, seen = _signs(part, at + _WORD, _ALL, seen)
    c, seen = _signs(part, at + TWO * _WORD, _ALL, seen)
    d, seen = _signs(part, at + THREE * _WORD, _ALL, seen)
    return (a, b, c, d), seen


@inlined
def last_negatives(part, at, seen):
    """``negatives`` where the part may end, and the segment too early.

    ``seen`` is then more than ``part.left``; weights after the part count as 0.
    """
    a, seen = _last_signs(part, at, seen)
    b, seen = _last_signs(part, at + _WORD, seen)
    c, seen = _last_signs(part, at + TWO * _WORD, seen)
    d, seen = _last_signs(part, at + THREE * _WORD, seen)
    return (a, b, c, d), seen


@inlined
def for_each_part(visit, first, last, span, mask, patterns, rows, columns, room, sink):
    """Expand the segments ``first`` to ``last`` and visit each row, or each slab of it, in order.

    Args:
        visit: ``(part, seen, sink)`` -> ``seen``, as ``negatives`` leaves it.
        rows, columns: of the matrix, at least 1.
        room: uint8 [ROOM].
        sink: for ``visit``.

    Returns:
        ``OK``, or the segment that ends early and that reason.
    """
    codes = pointer(room)
    begin = beginning(mask, first)
    at_once = max(1, SLAB // columns)
    for segment in range(first, last):
        data, length = segment_at(mask, segment, begin)
        begin += length
        left, seen, place = EIGHT * length, ZERO, ZERO
        row = segment * (span // columns)
        after = min(row + span // columns, rows)
        column = 0
        while row < after:
            count = min(at_once, after - row)
            width = min(SLAB, columns - column)
            limit, end = np.uint64(count * width), np.uint64((after - row) * columns - column)
            left, place = _expand(mask.width, patterns, codes, data, left, place, limit, end)
            if place < limit:
                return segment * REASONS + ENDS_EARLY
            for i in range(count):
                here, start = advance(codes, np.uint64(i * width)), np.uint64(column)
                part = Part(here, row + i, start, np.uint64(width), data, left, EIGHT * length)
                seen = visit(part, seen, sink)
            if seen > left:
                return segment * REASONS + ENDS_EARLY
            for moved in range(ZERO, place - limit, _WORD):
                _move(codes, moved, limit + moved)
            place -= limit
            column += width
            if column == columns:
                column = 0
                row += count
    return OK
