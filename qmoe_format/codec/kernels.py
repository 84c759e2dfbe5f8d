"""Numba kernels: encode trits, decode them, multiply without decoding them.

Decoding a segment (SPEC.md section 7.2) has two stages that a superscalar core can run ahead in,
instead of one that decides weight by weight:

    codewords  ->  list of the positions of non-zeros     one look-up, one 8-byte store and two
                                                          additions a codeword, no branch on data
    sign bits  ->  list of +1 / -1                        one look-up and store for eight signs

                   +-------------+-------------+          positions of an entry are four 16-bit
    position list  |  7 12 15  - | 19 23  -  - |          lanes of a word; only the first ones
                   +----------^--+------^------+          count, the next store overwrites the rest
                         next store     next store

and then one short loop over the lists: a store a non-zero, or a gather of sixteen elements of x,
added to two sums under the masks that their signs are. Zeros cost nothing. Lists hold one chunk of
a segment, at most ``CHUNK`` weights, so that they stay in the first-level cache and a position fits
15 bits.

Where zeros are few (up to about 63 % in codewords of 12 bits) entries are short, and the product of
one token takes another way: three entries at a time become a bit for each weight, the signs of 32
weights are deposited at their non-zeros, and x is added under masks of sixteen bits. It costs the
same for every weight, and no gather. On one core with AVX-512, 4096 x 1536, ns a weight:

    zeros      50 %    60 %    64 %    70 %    75 %   88.5 %    95 %     dense bf16
    gathers    0.46    0.36    0.32    0.29    0.26    0.15     0.10     0.29, of the memory
    masks      0.26    0.26

Every decoding kernel takes the segments ``first`` to ``last`` and returns ``OK`` or
``segment * 8 + reason``. None reads or writes outside its arrays whatever the segments hold, given
that ``lengths`` and ``shortest`` add up to what is in ``segments`` and at least 8 bytes follow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from qmoe_format.codec.lanes import (
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
from qmoe_format.codec.memory import at, load16, load32, load64, store64
from qmoe_format.codec.tables import MASK_LENGTH

OK = -1
ENDS_EARLY, BEYOND_END, LEFT_OVER, PADDING, NO_CODEWORD = range(5)

# 2^15 less the longest entry: a position in a chunk, and an overrun of the last entry, fit 15 bits.
CHUNK = np.uint64(32512)
# Room for a chunk of non-zeros only, and for the words that the last entry writes beyond them.
LIST_LENGTH = 32768 + 64
# A mask and, above it, the size of its entry, as in ``Tables.masks``.
MASK_BITS, MASK = np.uint64(MASK_LENGTH), np.uint64((1 << MASK_LENGTH) - 1)
CHUNK_WORDS = 32768 // 64 + 8
# Where vectors take masks, and bits are deposited fast. With AVX2 dot_dense gains little over
# dot_sparse, and on the first processors of AMD with BMI2 it loses by far.
HAS_MASKS = has_avx512()
BEYOND_X = 32  # elements of x that may be read behind its last one

ZERO, ONE, TWO, THREE, SEVEN, EIGHT = (np.uint64(n) for n in (0, 1, 2, 3, 7, 8))
SIXTEEN, THIRTY_TWO, LAST = (np.uint64(n) for n in (16, 32, 63))
WHOLE_BYTES = ~SEVEN
ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
LANE = np.uint64(0xFFFF)
POSITION = np.uint16(0x7FFF)


def _sign_bytes() -> npt.NDArray[np.uint64]:
    """uint64 [256]: for each byte of sign bits, eight int8 of +1 (bit 0) or -1 (bit 1)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8).view(np.uint64).ravel()


SIGN_BYTES = _sign_bytes()


@njit(nogil=True, forceinline=True)
def _take_1(found, count, place, positions, codeword):
    """Append the positions of ``codeword``'s non-zeros, at most four of them."""
    store64(found, TWO * count, at(positions, codeword) + place)


@njit(nogil=True, forceinline=True)
def _take_2(found, count, place, positions, codeword):
    """The same for entries of up to eight non-zeros."""
    store64(found, TWO * count, at(positions, TWO * codeword) + place)
    store64(found, TWO * count + EIGHT, at(positions, TWO * codeword + ONE) + place)


@njit(nogil=True, forceinline=True)
def _take_4(found, count, place, positions, codeword):
    """The same for entries of up to sixteen."""
    _take_2(found, count, place, positions, TWO * codeword)
    _take_2(found, count + EIGHT, place, positions, TWO * codeword + ONE)


def _make_scan(take: Any) -> Any:
    # One function for each number of words: a choice within the loop, even one that always falls
    # the same way, makes Numba count references there, at ten times the cost of all the rest.

    @njit(nogil=True, forceinline=True)
    def scan(segments, begin, left, limit, width, positions, steps, nonzeros, longest, found):
        """Append the positions of codewords to ``found`` until ``limit`` weights are passed.

        ``left``: bits of the segment not yet read, from ``begin`` up. Returns what is left then,
        the weights passed, and the number of positions.
        """
        mask = (ONE << width) - ONE
        place = count = np.uint64(0)  # place: weights passed, in all four lanes
        # Three codewords of up to 16 bits, at any bit offset, come with one load of 64 bits.
        three, two = THREE * width, TWO * width
        safe = limit - THREE * longest if limit > THREE * longest else np.uint64(0)
        while place & LANE < safe and left >= three:
            left -= three
            bits = load64(segments, begin + (left >> THREE)) >> (left & SEVEN)
            a, b, c = (bits >> two) & mask, (bits >> width) & mask, bits & mask
            take(found, count, place, positions, a)
            count += np.uint64(at(nonzeros, a))
            place += at(steps, a)
            take(found, count, place, positions, b)
            count += np.uint64(at(nonzeros, b))
            place += at(steps, b)
            take(found, count, place, positions, c)
            count += np.uint64(at(nonzeros, c))
            place += at(steps, c)
        while place & LANE < limit and left >= width:
            left -= width
            a = (load32(segments, begin + (left >> THREE)) >> (left & SEVEN)) & mask
            take(found, count, place, positions, a)
            count += np.uint64(at(nonzeros, a))
            place += at(steps, a)
        return left, place & LANE, count

    return scan


_scan_1, _scan_2, _scan_4 = _make_scan(_take_1), _make_scan(_take_2), _make_scan(_take_4)


@njit(nogil=True, forceinline=True)
def _positions(segments, begin, left, limit, width, positions, steps, nonzeros, longest, found):
    words = positions.shape[1]
    if words == 1:
        return _scan_1(
            segments, begin, left, limit, width, positions, steps, nonzeros, longest, found
        )
    if words == 2:
        return _scan_2(
            segments, begin, left, limit, width, positions, steps, nonzeros, longest, found
        )
    return _scan_4(segments, begin, left, limit, width, positions, steps, nonzeros, longest, found)


@njit(nogil=True, cache=True, forceinline=True)
def _next_chunk(segments, begin, left, seen, ahead, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs):  # fmt: skip
    """Fill ``found`` and ``signs`` with the next chunk of a segment; ``ahead``: weights to come.

    ``seen``: signs used before. Returns bits left, weights passed (0: the segment ends early),
    number of non-zeros.
    """
    limit = min(ahead, CHUNK)
    left, passed, count = _positions(
        segments, begin, left, limit, width, positions, steps, nonzeros, longest, found
    )
    if passed < limit:
        return left, np.uint64(0), count
    if in_codeword:
        for j in range(np.int64(count)):
            signs[j] = 1 - 2 * np.int8(found[j] >> 15)
            found[j] &= POSITION
        return left, passed, count
    if seen + count > left:
        return left, np.uint64(0), count
    j = np.uint64(0)
    while j < count:
        bits = load16(segments, begin + ((seen + j) >> THREE)) >> (seen & SEVEN)
        store64(signs, j, at(sign_bytes, bits & np.uint64(255)))
        j += EIGHT
    return left, passed, count


@njit(nogil=True, forceinline=True)
def _beginning(segment, lengths, shortest):
    """Where a segment begins, in bytes; ``lengths`` are those above the ``shortest``."""
    begin = np.uint64(segment) * shortest
    for before in range(segment):
        begin += np.uint64(lengths[before])
    return begin


@njit(nogil=True, cache=True)
def decode_segments(first, last, segments, lengths, shortest, width, in_codeword,
                    positions, steps, nonzeros, longest, sign_bytes, span,
                    totals, out):  # fmt: skip
    """Decode into ``out``, int8, flat; check the segments wholly ([E-9] to [E-12]).

    ``span``: weights of a segment, but for the last one. ``totals`` int64: non-zeros of each one.
    """
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    behind = _beginning(first, lengths, shortest)
    for segment in range(first, last):
        target = out[segment * span : (segment + 1) * span]
        target[:] = 0
        weights = np.uint64(target.size)
        begin = behind
        behind += shortest + np.uint64(lengths[segment])
        left = EIGHT * (behind - begin)
        place = seen = np.uint64(0)
        while place < weights:
            left, passed, count = _next_chunk(
                segments, begin, left, seen, weights - place, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return segment * 8 + ENDS_EARLY
            if count > 0 and place + np.uint64(found[np.int64(count) - 1]) >= weights:
                return segment * 8 + BEYOND_END
            here = target[np.int64(place) :]
            for j in range(np.int64(count)):
                here[np.uint64(found[j])] = signs[j]
            place += passed
            seen += count
        totals[segment] = seen
        used = np.uint64(0) if in_codeword else seen
        if left - used >= EIGHT:
            return segment * 8 + LEFT_OVER
        gap = load16(segments, begin + (used >> THREE)) >> (used & SEVEN)
        if gap & ((ONE << (left - used)) - ONE):
            return segment * 8 + PADDING
    return OK


@njit(nogil=True, cache=True)
def find_unused_codeword(first, last, segments, lengths, shortest, width, span, weights, steps):
    """Look for a codeword that the dictionary does not have ([D-5]); ``weights``: of the matrix."""
    mask = (ONE << width) - ONE
    behind = _beginning(first, lengths, shortest)
    for segment in range(first, last):
        begin = behind
        behind += shortest + np.uint64(lengths[segment])
        left = EIGHT * (behind - begin)
        ahead = min(span, weights - segment * span)
        while ahead > 0 and left >= width:
            left -= width
            a = (load32(segments, begin + (left >> THREE)) >> (left & SEVEN)) & mask
            if steps[a] == 0:
                return segment * 8 + NO_CODEWORD
            ahead -= np.int64(steps[a] & LANE)
    return OK


@njit(nogil=True, cache=True, forceinline=True)
def _first_at(found, start, stop, place):
    """The first of ``found[start:stop]``, which ascend, that is not below ``place``."""
    count = stop - start
    while count > 0:  # no branch on data: where a row ends cannot be foretold
        half = (count + 1) >> 1
        start += half * (np.int64(found[start + half - 1] & POSITION) < place)
        count >>= 1
    return start


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
    behind = _beginning(first, lengths, shortest)
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
    behind = _beginning(first, lengths, shortest)
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
            left, passed, count = _positions(
                segments, begin, left, limit, width, positions, steps, nonzeros, longest, found
            )
            if passed < limit or (not in_codeword and seen + count > left):
                return segment * 8 + ENDS_EARLY
            start = np.int64(0)
            while row_start < weights:
                end = row_start + min((group + 1) * group_size, columns) - place
                stop = _first_at(found, start, np.int64(count), end)
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
    behind = _beginning(first, lengths, shortest)
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
            left, passed, count = _next_chunk(
                segments, begin, left, seen, np.uint64(weights - place), width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return segment * 8 + ENDS_EARLY
            start = np.int64(0)
            while row_start < weights:
                end = row_start + min((group + 1) * group_size, columns) - place
                stop = _first_at(found, start, np.int64(count), end)
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


@njit(nogil=True, cache=True)
def scale_rows(first, last, trits, group_size, low_high, column_scale, out):
    """``out`` float32 [rows, columns]: each trit's value times its column's scale ([V-1], [V-2]).

    ``low_high`` float32 [rows, groups, 2]. No reordering here: one rounding, and +0 for zero.
    """
    for row in range(first, last):
        for group in range(low_high.shape[1]):
            low, high = low_high[row, group]
            start = group * group_size
            coded = trits[row, start : start + group_size]
            scale = column_scale[start : start + group_size]
            target = out[row, start : start + group_size]
            for c in range(coded.size):
                value = (high if coded[c] > 0 else low) * scale[c]
                target[c] = value if coded[c] != 0 else np.float32(0)


@njit(nogil=True, cache=True)
def weights_of_segments(first, last, segments, lengths, shortest, width, in_codeword,
                        positions, steps, nonzeros, longest, sign_bytes, span,
                        columns, group_size, low_high, column_scale, first_row, out):  # fmt: skip
    """Weights ([V-1], [V-2]) of as many rows as ``out`` has, float32 [rows, columns], zeroed.

    ``out`` begins at row ``first_row``; the segments may have rows before it and behind its end.
    """
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    flat = out.reshape(-1)
    behind = _beginning(first, lengths, shortest)
    for segment in range(first, last):
        begin = behind
        behind += shortest + np.uint64(lengths[segment])
        left = EIGHT * (behind - begin)
        row = segment * (span // columns)
        weights = min(span, (low_high.shape[0] - row) * columns)
        place = np.int64(0)
        row_start = np.int64(0)
        group = np.int64(0)
        seen = np.uint64(0)
        while place < weights:
            left, passed, count = _next_chunk(
                segments, begin, left, seen, np.uint64(weights - place), width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return segment * 8 + ENDS_EARLY
            start = np.int64(0)
            while row_start < weights:
                end = row_start + min((group + 1) * group_size, columns) - place
                stop = _first_at(found, start, np.int64(count), end)
                if first_row <= row < first_row + out.shape[0]:
                    column = np.uint64(place - row_start)
                    target = np.uint64((row - first_row) * columns)
                    low, high = low_high[row, group, 0], low_high[row, group, 1]
                    for j in range(np.uint64(start), np.uint64(stop)):
                        c = column + np.uint64(at(found, j))
                        flat[target + c] = (high if at(signs, j) > 0 else low) * column_scale[c]
                start = stop
                if end > np.int64(passed):
                    break
                group += 1
                if group == low_high.shape[1]:
                    group = 0
                    row += 1
                    row_start += columns
            place += np.int64(passed)
            seen += count
    return OK


@njit(nogil=True, cache=True)
def encode_segments(first, last, trits, span, width, in_codeword,
                    children, codewords, out, lengths, totals):  # fmt: skip
    """Write segments one after another; return the bytes written.

    ``trits`` int8, flat; ``out`` uint8, zeroed, large enough; ``lengths`` (bytes) and ``totals``
    (non-zeros) int64, of each segment.
    """
    codes = np.empty(span + 1, np.uint16)
    written = np.int64(0)
    for segment in range(first, last):
        weights = trits[segment * span : (segment + 1) * span]
        count = np.int64(0)
        node = np.int64(0)
        signs = np.uint64(0)  # of the current entry, if they are part of the codeword
        in_entry = np.uint64(0)
        word = np.uint64(0)  # of sign bits, not yet written
        seen = np.uint64(0)
        for trit in weights:
            if trit != 0:
                negative = np.uint64(trit < 0)
                signs |= negative << in_entry
                in_entry += ONE
                word |= negative << (seen & np.uint64(63))
                seen += ONE
                if not in_codeword and seen & np.uint64(63) == 0:
                    store64(out, np.uint64(written) + (seen >> THREE) - EIGHT, word)
                    word = np.uint64(0)
            node = np.int64(at(children, np.uint64(2 * node + (trit != 0))))
            if node < 0:
                code = codewords[~node]
                codes[count] = code + np.uint16(signs) if in_codeword else code
                count += 1
                node = 0
                signs = in_entry = np.uint64(0)
        if node != 0:  # the segment ends within an entry: finish it with zeros [E-10]
            while node >= 0:
                node = np.int64(at(children, np.uint64(2 * node)))
            code = codewords[~node]
            codes[count] = code + np.uint16(signs) if in_codeword else code
            count += 1
        sign_bits = np.int64(0) if in_codeword else np.int64(seen)
        if sign_bits & 63:
            store64(out, np.uint64(written) + (seen >> np.uint64(6)) * EIGHT, word)
        length = (count * width + sign_bits + 7) // 8
        bit = np.uint64(8 * (written + length))
        for i in range(count):
            bit -= np.uint64(width)
            byte = bit >> np.uint64(3)
            store64(out, byte, load64(out, byte) | (np.uint64(codes[i]) << (bit & SEVEN)))
        lengths[segment] = length
        totals[segment] = np.int64(seen)
        written += length
    return written
