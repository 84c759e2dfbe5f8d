"""Kernels that multiply: segments times vectors, without decoding to weights.

Where zeros are few (up to about 63 % with codewords of 12 bits) entries are short, and there is a
faster kernel for one token and ternary matrices, ``dot_dense``: three entries at a time become a
bit for each weight, the signs of 32 weights are deposited at their non-zeros, and x is added under
masks of sixteen bits. It costs the same for every weight, and no gather. On one core with AVX-512,
4096 x 1536, ns a weight:

    zeros       50 %    60 %    64 %    70 %    75 %   88.5 %    95 %     dense bf16
    dot_sparse  0.46    0.36    0.32    0.29    0.26    0.15     0.10     0.29, of the memory
    dot_dense   0.26    0.26
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.cursor import for_each_run
from qmoe_format.codec.kernels.jit import inlined, kernel, optional
from qmoe_format.codec.kernels.refinement import as_refinement, magnitudes_of
from qmoe_format.codec.kernels.scan import (
    LIST_LENGTH,
    ONE,
    SEVEN,
    THREE,
    TWO,
    ZERO,
    as_entries,
    as_segments,
    find_levels,
    find_positions,
    first_at,
)
from qmoe_format.codec.kernels.tables import MASK_LENGTH
from qmoe_format.codec.kernels.unaligned import load32, load64, pointer, store64

# Where vectors take masks, and bits are deposited fast. With AVX2 dot_dense gains little over
# dot_sparse, and on the first AMD processors with BMI2 it loses by far.
PREFER_DENSE = simd.cpu_has("avx512f", "bmi2")
BEYOND_X = 32  # elements of x that may be read behind its last one

# A mask and, above it, the size of its entry, as in ``Tables.masks``.
MASK_BITS, MASK = np.uint64(MASK_LENGTH), np.uint64((1 << MASK_LENGTH) - 1)
CHUNK_WORDS = 32768 // 64 + 8
SIXTEEN, THIRTY_TWO, LAST = (np.uint64(n) for n in (16, 32, 63))
WHOLE_BYTES = ~SEVEN
ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@inlined
def _low_high(scales, row):
    high = simd.from_bf16(scales[row, scales.shape[1] - 1])
    low = simd.from_bf16(scales[row, 0])
    return -low if scales.shape[1] == 1 else low, high


@inlined
def _zero_two():
    return simd.zero_vector(), simd.zero_vector()


@inlined
def _zero_four():
    return simd.zero_vector(), simd.zero_vector(), simd.zero_vector(), simd.zero_vector()


@inlined
def _sum_two(sums, scales, row):
    plus, minus = sums
    low, high = _low_high(scales, row)
    return simd.add_scaled(simd.add_scaled(simd.zero_vector(), plus, high), minus, low)


@inlined
def _sum_four(sums, scales, row):
    plus_a, plus_b, minus_a, minus_b = sums
    low, high = _low_high(scales, row)
    total = _sum_two((plus_a, minus_a), scales, row)
    return simd.add_scaled(simd.add_scaled(total, plus_b, high), minus_b, low)


@inlined
def _store_two(out, row, sums, scales):
    out[row] = simd.vector_sum(_sum_two(sums, scales, row))


@inlined
def _store_four(out, row, sums, scales):
    out[row] = simd.vector_sum(_sum_four(sums, scales, row))


class Masks(NamedTuple):
    """What each codeword stands for: pointer to ``Tables.masks``; the longest entry."""

    masks: Any
    longest: Any


@inlined
def _append(bits, base, held, place, mask):
    """Set the ones of ``mask`` in ``bits`` from bit ``place`` on, after all that are set.

    ``held`` is the word last written, at bit ``base``, a multiple of 8; returns the next of both.
    """
    here = place & WHOLE_BYTES
    held = (held >> (here - base)) | (mask << (place & SEVEN))
    store64(bits, here >> THREE, held)
    return here, held


@inlined
def _mark(width, masks, longest, bits, data, left, limit):
    """Set a bit of ``bits`` for each non-zero until ``limit`` weights are passed.

    Returns the bits left of the segment, and the weights passed.
    """
    code = (ONE << width) - ONE
    place = base = held = ZERO
    three, two = THREE * width, TWO * width
    safe = limit - THREE * longest if limit > THREE * longest else ZERO
    while place < safe and left >= three:
        left -= three
        word = load64(data, left >> THREE) >> (left & SEVEN)
        a = np.uint64(masks[(word >> two) & code])
        b = np.uint64(masks[(word >> width) & code])
        c = np.uint64(masks[word & code])
        second = a >> MASK_BITS
        third = second + (b >> MASK_BITS)
        mask = (a & MASK) | ((b & MASK) << second) | ((c & MASK) << third)
        base, held = _append(bits, base, held, place, mask)
        place += third + (c >> MASK_BITS)
    while place < limit and left >= width:
        left -= width
        a = np.uint64(masks[(load32(data, left >> THREE) >> (left & SEVEN)) & code])
        base, held = _append(bits, base, held, place, a & MASK)
        place += a >> MASK_BITS
    return left, place


@inlined
def _find_bits(mask, masks, bits, data, left, limit, seen):
    left, passed = _mark(mask.width, masks.masks, masks.longest, bits, data, left, limit)
    return left, passed, passed


@inlined
def _add_bits(run, sums, bits, x):
    plus_a, plus_b, minus_a, minus_b = sums
    data, left, seen, column = run.data, run.left, run.seen, run.column
    start, stop = np.uint64(run.start), np.uint64(min(run.end, run.count))
    while start < stop and seen <= left:
        these = ALL_ONES >> (LAST - min(stop - start, THIRTY_TWO) + ONE)
        mask = (load64(bits, start >> THREE) >> (start & SEVEN)) & these
        signs = load64(data, seen >> THREE) >> (seen & SEVEN)
        negatives = simd.deposit(signs, mask)
        seen += simd.popcount(mask)
        positives = mask ^ negatives
        plus_a = simd.add_loaded(plus_a, x, column + start, positives)
        plus_b = simd.add_loaded(plus_b, x, column + start + SIXTEEN, positives >> SIXTEEN)
        minus_a = simd.add_loaded(minus_a, x, column + start, negatives)
        minus_b = simd.add_loaded(minus_b, x, column + start + SIXTEEN, negatives >> SIXTEEN)
        start += THIRTY_TWO
    return (plus_a, plus_b, minus_a, minus_b), np.int64(stop), seen


@kernel
def dot_dense(first, last, span, mask, masks, scales, x, out):
    """Multiply ternary rows of short entries with one token: an addition for every 16 weights.

    Args:
        x: float32 [columns + ``BEYOND_X``], contiguous.
        out: float32 [rows].
    """
    entries, longest = masks
    bits = np.zeros(CHUNK_WORDS, np.uint64)
    return for_each_run(
        _find_bits, _add_bits, _store_four, _zero_four(), first, last, span, as_segments(*mask),
        Masks(pointer(entries), longest), None, x.size - BEYOND_X, scales, pointer(bits),
        pointer(x), out, bits,
    )  # fmt: skip


@inlined
def _add_gathered(run, sums, lists, x):
    plus, minus = sums
    found, magnitudes = lists
    start, stop = run.start, first_at(found, run.start, run.count, run.end)
    sign = run.seen - np.uint64(start)
    while start < stop:
        these = ALL_ONES >> (LAST - np.uint64(min(stop - start, 16)) + ONE)
        bit = sign + np.uint64(start)
        negatives = (load64(run.data, bit >> THREE) >> (bit & SEVEN)) & these
        some = simd.gather(x, run.column, found, np.uint64(start), these)
        some = _times(magnitudes, some, bit)
        plus = simd.add_masked(plus, some, these ^ negatives)
        minus = simd.add_masked(minus, some, negatives)
        start += 16
    return (plus, minus), stop, sign + np.uint64(stop)


@optional(lambda magnitudes, some, start: some)
def _times(magnitudes, some, start):
    return simd.multiply_bytes(some, magnitudes, start)


@kernel
def dot_sparse(first, last, span, mask, entries, refinement, scales, x, out):
    """``dot_dense`` for any rows: a gather of ``x`` at the non-zeros, sixteen at a time."""
    found = np.empty(LIST_LENGTH, np.uint16)
    refinement = as_refinement(refinement, span)
    return for_each_run(
        find_positions, _add_gathered, _store_two, _zero_two(), first, last, span,
        as_segments(*mask), as_entries(*entries), refinement, x.size - BEYOND_X, scales,
        (pointer(found), magnitudes_of(refinement)), pointer(x), out, found,
    )  # fmt: skip


@inlined
def _add_tokens(plus, minus, lists, j, column, x):
    found, levels, magnitudes = lists
    source = (column + np.uint64(found[j])) * SIXTEEN
    return _add_level(magnitudes, plus, minus, x, source, levels[j])


def _add_sign(magnitudes, plus, minus, x, source, sign):
    negative = np.uint64(sign >> 7)  # all ones, or none
    plus = simd.add_loaded(plus, x, source, ~negative)
    return plus, simd.add_loaded(minus, x, source, negative)


@optional(_add_sign)
def _add_level(magnitudes, plus, minus, x, source, level):
    tokens = simd.load_vector(x, source)
    plus = simd.add_scaled(plus, tokens, np.float32(max(level, 0)))
    return plus, simd.add_scaled(minus, tokens, np.float32(max(-level, 0)))


@inlined
def _add_tile(run, sums, lists, x):
    plus_a, plus_b, minus_a, minus_b = sums
    column = run.column
    j, stop = np.uint64(run.start), np.uint64(first_at(lists[0], run.start, run.count, run.end))
    seen = run.seen + stop - j
    pairs = stop - (stop - j) % TWO
    while j < pairs:
        plus_a, minus_a = _add_tokens(plus_a, minus_a, lists, j, column, x)
        plus_b, minus_b = _add_tokens(plus_b, minus_b, lists, j + ONE, column, x)
        j += TWO
    if j < stop:
        plus_a, minus_a = _add_tokens(plus_a, minus_a, lists, j, column, x)
    return (plus_a, plus_b, minus_a, minus_b), np.int64(stop), seen


@inlined
def _store_tile(out, row, sums, scales):
    simd.store_vector(out, np.uint64(row) * SIXTEEN, _sum_four(sums, scales, row))


@kernel
def dot_tile(first, last, span, mask, entries, refinement, scales, x, out):
    """Multiply rows with sixteen tokens, one per element of a vector.

    Args:
        x: float32 [columns, 16], contiguous.
        out: float32 [rows, 16], contiguous.
    """
    found, levels = np.empty(LIST_LENGTH, np.uint16), np.empty(LIST_LENGTH, np.int8)
    refinement = as_refinement(refinement, span)
    lists = pointer(found), pointer(levels), magnitudes_of(refinement)
    return for_each_run(
        find_levels, _add_tile, _store_tile, _zero_four(), first, last, span, as_segments(*mask),
        as_entries(*entries), refinement, len(x), scales, lists, pointer(x), pointer(out),
        (found, levels),
    )  # fmt: skip
