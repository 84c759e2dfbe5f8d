"""Kernels that multiply: segments times vectors, without decoding to weights.

Where zeros are few (up to about 63 % in codewords of 12 bits) entries are short, and the product of
one token takes another way: three entries at a time become a bit for each weight, the signs of 32
weights are deposited at their non-zeros, and x is added under masks of sixteen bits. It costs the
same for every weight, and no gather. On one core with AVX-512, 4096 x 1536, ns a weight:

    zeros      50 %    60 %    64 %    70 %    75 %   88.5 %    95 %     dense bf16
    gathers    0.46    0.36    0.32    0.29    0.26    0.15     0.10     0.29, of the memory
    masks      0.26    0.26
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qmoe_format.codec.kernels.scan import (
    CHUNK,
    EIGHT,
    ENDS_EARLY,
    LIST_LENGTH,
    OK,
    ONE,
    SEVEN,
    THREE,
    TWO,
    ZERO,
    beginning,
    find_positions,
    first_at,
    next_chunk,
)
from qmoe_format.codec.kernels.simd import (
    add_lanes,
    add_scaled,
    add_where,
    as_float32,
    deposit,
    gather,
    has_avx512,
    high_bits,
    lane_sum,
    ones,
    store_lanes,
    zero_lanes,
)
from qmoe_format.codec.kernels.unaligned import at, load32, load64, store64
from qmoe_format.codec.tables import MASK_LENGTH

# A mask and, above it, the size of its entry, as in ``Tables.masks``.
MASK_BITS, MASK = np.uint64(MASK_LENGTH), np.uint64((1 << MASK_LENGTH) - 1)
CHUNK_WORDS = 32768 // 64 + 8
# Where vectors take masks, and bits are deposited fast. With AVX2 dot_dense gains little over
# dot_sparse, and on the first processors of AMD with BMI2 it loses by far.
HAS_MASKS = has_avx512()
BEYOND_X = 32  # elements of x that may be read behind its last one

SIXTEEN, THIRTY_TWO, LAST = (np.uint64(n) for n in (16, 32, 63))
WHOLE_BYTES = ~SEVEN
ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@njit(nogil=True, forceinline=True)
def _append(bits, base, held, place, mask):
    """Set the ones of ``mask`` in ``bits`` from bit ``place`` on, behind all that are set.

    ``held`` is the word last written, at bit ``base``, a multiple of 8; returns the next of both.
    """
    here = place & WHOLE_BYTES
    held = (held >> (here - base)) | (mask << (place & SEVEN))
    store64(bits, here >> THREE, held)
    return here, held


@njit(nogil=True, forceinline=True)
def _mark(segments, begin, left, limit, width, masks, longest, bits):
    """Set a bit of ``bits`` for each non-zero, until ``limit`` weights are passed.

    Returns the bits left of the segment, and the weights passed.
    """
    code = (ONE << width) - ONE
    place = base = held = ZERO
    three, two = THREE * width, TWO * width
    safe = limit - THREE * longest if limit > THREE * longest else ZERO
    while place < safe and left >= three:
        left -= three
        word = load64(segments, begin + (left >> THREE)) >> (left & SEVEN)
        a = np.uint64(at(masks, (word >> two) & code))
        b = np.uint64(at(masks, (word >> width) & code))
        c = np.uint64(at(masks, word & code))
        second = a >> MASK_BITS
        third = second + (b >> MASK_BITS)
        mask = (a & MASK) | ((b & MASK) << second) | ((c & MASK) << third)
        base, held = _append(bits, base, held, place, mask)
        place += third + (c >> MASK_BITS)
    while place < limit and left >= width:
        left -= width
        code_word = (load32(segments, begin + (left >> THREE)) >> (left & SEVEN)) & code
        a = np.uint64(at(masks, code_word))
        base, held = _append(bits, base, held, place, a & MASK)
        place += a >> MASK_BITS
    return left, place


@njit(nogil=True, cache=True)
def dot_dense(first, last, segments, lengths, shortest, width, in_codeword,
              masks, negative, longest, span,
              columns, group_size, row_scale, x, out):  # fmt: skip
    """Products of rows and ``x`` float32 [columns + ``BEYOND_X``], into ``out`` float32 [rows].

    For short entries: a bit for each weight, and an addition under a mask for each sixteen of
    them. ``row_scale`` as stored. ``span`` is ``columns`` times the rows of a segment.
    """
    bits = np.zeros(CHUNK_WORDS, np.uint64)
    minus = np.zeros(CHUNK_WORDS, np.uint64)
    groups, values = row_scale.shape[1], row_scale.shape[2]
    behind = beginning(first, lengths, shortest)
    for segment in range(first, last):
        begin = behind
        behind += shortest + np.uint64(lengths[segment])
        left = EIGHT * (behind - begin)
        row = segment * (span // columns)
        weights = min(span, (out.shape[0] - row) * columns)
        place = np.int64(0)  # where the chunk begins in the segment
        row_start = np.int64(0)  # where the row does
        group = np.int64(0)
        seen = ZERO
        total = zero_lanes()  # of the row, scaled
        plus_a = plus_b = minus_a = minus_b = zero_lanes()  # of the group
        while place < weights:
            limit = min(np.uint64(weights - place), CHUNK)
            if in_codeword:
                _mark(segments, begin, left, limit, width, negative, longest, minus)
            left, passed = _mark(segments, begin, left, limit, width, masks, longest, bits)
            if passed < limit:
                return segment * 8 + ENDS_EARLY
            start = ZERO
            while row_start < weights:
                end = row_start + min((group + 1) * group_size, columns) - place
                stop = np.uint64(min(end, np.int64(passed)))
                column = np.uint64(place - row_start)  # of the chunk's first weight; may wrap
                while start < stop:
                    these = ALL_ONES >> (LAST - min(stop - start, THIRTY_TWO) + ONE)
                    mask = (load64(bits, start >> THREE) >> (start & SEVEN)) & these
                    if in_codeword:
                        negatives = load64(minus, start >> THREE) >> (start & SEVEN)
                        negatives &= mask
                    else:
                        signs = load64(segments, begin + (seen >> THREE)) >> (seen & SEVEN)
                        negatives = deposit(signs, mask)
                        seen += ones(mask)
                        if seen > left:
                            return segment * 8 + ENDS_EARLY
                    positives = mask ^ negatives
                    plus_a = add_where(plus_a, positives, x, column + start)
                    plus_b = add_where(plus_b, positives >> SIXTEEN, x, column + start + SIXTEEN)
                    minus_a = add_where(minus_a, negatives, x, column + start)
                    minus_b = add_where(minus_b, negatives >> SIXTEEN, x, column + start + SIXTEEN)
                    start += THIRTY_TWO
                start = stop
                if end > np.int64(passed):
                    break
                high = as_float32(row_scale[row, group, values - 1])
                low = as_float32(row_scale[row, group, 0])
                if values == 1:
                    low = -low
                total = add_scaled(add_scaled(total, plus_a, high), plus_b, high)
                total = add_scaled(add_scaled(total, minus_a, low), minus_b, low)
                plus_a = plus_b = minus_a = minus_b = zero_lanes()
                group += 1
                if group == groups:
                    out[row] = lane_sum(total)
                    total = zero_lanes()
                    group = 0
                    row += 1
                    row_start += columns
            place += np.int64(passed)
    return OK


@njit(nogil=True, cache=True)
def dot_sparse(first, last, segments, lengths, shortest, width, in_codeword,
               positions, steps, nonzeros, longest, span,
               columns, group_size, row_scale, x, out):  # fmt: skip
    """``dot_dense`` for long entries: a gather of ``x`` at the non-zeros, sixteen at a time."""
    found = np.empty(LIST_LENGTH, np.uint16)
    groups, values = row_scale.shape[1], row_scale.shape[2]
    behind = beginning(first, lengths, shortest)
    for segment in range(first, last):
        begin = behind
        behind += shortest + np.uint64(lengths[segment])
        left = EIGHT * (behind - begin)
        row = segment * (span // columns)
        weights = min(span, (out.shape[0] - row) * columns)
        place = np.int64(0)
        row_start = np.int64(0)
        group = np.int64(0)
        seen = ZERO
        total = zero_lanes()
        plus = minus = zero_lanes()
        while place < weights:
            limit = min(np.uint64(weights - place), CHUNK)
            left, passed, count = find_positions(
                segments, begin, left, limit, width, positions, steps, nonzeros, longest, found
            )
            if passed < limit or (not in_codeword and seen + count > left):
                return segment * 8 + ENDS_EARLY
            start = np.int64(0)
            while row_start < weights:
                end = row_start + min((group + 1) * group_size, columns) - place
                stop = first_at(found, start, np.int64(count), end)
                column = np.uint64(place - row_start)
                while start < stop:
                    these = ALL_ONES >> (LAST - np.uint64(min(stop - start, 16)) + ONE)
                    if in_codeword:
                        negatives = high_bits(found, np.uint64(start)) & these
                    else:
                        bit = seen + np.uint64(start)
                        signs = load64(segments, begin + (bit >> THREE)) >> (bit & SEVEN)
                        negatives = signs & these
                    some = gather(x, column, found, np.uint64(start), these)
                    plus = add_lanes(plus, some, these ^ negatives)
                    minus = add_lanes(minus, some, negatives)
                    start += 16
                start = stop
                if end > np.int64(passed):
                    break
                high = as_float32(row_scale[row, group, values - 1])
                low = as_float32(row_scale[row, group, 0])
                if values == 1:
                    low = -low
                total = add_scaled(add_scaled(total, plus, high), minus, low)
                plus = minus = zero_lanes()
                group += 1
                if group == groups:
                    out[row] = lane_sum(total)
                    total = zero_lanes()
                    group = 0
                    row += 1
                    row_start += columns
            place += np.int64(passed)
            seen += count
    return OK


@njit(nogil=True, cache=True)
def dot_tile(first, last, segments, lengths, shortest, width, in_codeword,
             positions, steps, nonzeros, longest, sign_bytes, span,
             columns, group_size, row_scale, x, out):  # fmt: skip
    """``dot_dense`` for sixteen tokens, one a lane: ``x`` [columns, 16], ``out`` [rows, 16]."""
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    groups, values = row_scale.shape[1], row_scale.shape[2]
    behind = beginning(first, lengths, shortest)
    for segment in range(first, last):
        begin = behind
        behind += shortest + np.uint64(lengths[segment])
        left = EIGHT * (behind - begin)
        row = segment * (span // columns)
        weights = min(span, (out.shape[0] - row) * columns)
        place = np.int64(0)
        row_start = np.int64(0)
        group = np.int64(0)
        seen = ZERO
        total = zero_lanes()
        plus_a = plus_b = minus_a = minus_b = zero_lanes()
        while place < weights:
            left, passed, count = next_chunk(
                segments, begin, left, seen, np.uint64(weights - place), width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return segment * 8 + ENDS_EARLY
            start = np.int64(0)
            while row_start < weights:
                end = row_start + min((group + 1) * group_size, columns) - place
                stop = first_at(found, start, np.int64(count), end)
                column = np.uint64(place - row_start)
                j, pairs = np.uint64(start), np.uint64(stop - (stop - start) % 2)
                while j < pairs:
                    negative = np.uint64(at(signs, j) >> 7)  # all ones, or none
                    source = (column + np.uint64(at(found, j))) * SIXTEEN
                    plus_a = add_where(plus_a, ~negative, x, source)
                    minus_a = add_where(minus_a, negative, x, source)
                    negative = np.uint64(at(signs, j + ONE) >> 7)
                    source = (column + np.uint64(at(found, j + ONE))) * SIXTEEN
                    plus_b = add_where(plus_b, ~negative, x, source)
                    minus_b = add_where(minus_b, negative, x, source)
                    j += TWO
                if j < np.uint64(stop):
                    negative = np.uint64(at(signs, j) >> 7)
                    source = (column + np.uint64(at(found, j))) * SIXTEEN
                    plus_a = add_where(plus_a, ~negative, x, source)
                    minus_a = add_where(minus_a, negative, x, source)
                start = stop
                if end > np.int64(passed):
                    break
                high = as_float32(row_scale[row, group, values - 1])
                low = as_float32(row_scale[row, group, 0])
                if values == 1:
                    low = -low
                total = add_scaled(add_scaled(total, plus_a, high), plus_b, high)
                total = add_scaled(add_scaled(total, minus_a, low), minus_b, low)
                plus_a = plus_b = minus_a = minus_b = zero_lanes()
                group += 1
                if group == groups:
                    store_lanes(out, np.uint64(row) * SIXTEEN, total)
                    total = zero_lanes()
                    group = 0
                    row += 1
                    row_start += columns
            place += np.int64(passed)
            seen += count
    return OK
