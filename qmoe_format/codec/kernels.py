"""Numba kernels: encode rows of trits, decode them, multiply without decoding them.

Decoding a segment (SPEC.md section 7.2) has two stages that a superscalar core can run ahead in,
instead of one that decides weight by weight:

    codewords  ->  list of the positions of non-zeros     one look-up, one 8-byte store and two
                                                          additions a codeword, no branch on data
    sign bits  ->  list of +1 / -1                        one look-up and store for eight signs

                   +-------------+-------------+          positions of an entry are four 16-bit
    position list  |  7 12 15  - | 19 23  -  - |          lanes of a word; only the first ones
                   +----------^--+------^------+          count, the next store overwrites the rest
                         next store     next store

and then one short loop over the lists: a gather and a multiply-add a non-zero (vectorised), or a
store. Zeros cost nothing. Lists hold one chunk of a row, at most ``CHUNK`` columns, so that they
stay in the first-level cache and a position fits 15 bits.

Every kernel takes the rows ``first`` to ``last`` and returns ``OK`` or ``row * 8 + reason``. None
reads or writes outside its arrays whatever the segments hold, given that ``offsets`` ascend within
``segments`` and at least 8 bytes follow the last one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from qmoe_format.codec.memory import TILE, add_tile, at, load16, load32, load64, store64

OK = -1
ENDS_EARLY, BEYOND_ROW, LEFT_OVER, PADDING, NO_CODEWORD = range(5)

# 2^15 less the longest entry: a position in a chunk, and an overrun of the last entry, fit 15 bits.
CHUNK = np.uint64(32512)
# Room for a chunk of non-zeros only, and for the words that the last entry writes beyond them.
LIST_LENGTH = 32768 + 64

ONE, TWO, SEVEN, EIGHT = np.uint64(1), np.uint64(2), np.uint64(7), np.uint64(8)
LANE = np.uint64(0xFFFF)
POSITION = np.uint16(0x7FFF)

REORDER = {
    "reassoc",
    "contract",
    "nsz",
}  # sums may be taken in vectors; NaN and infinity still hold


def _sign_bytes() -> npt.NDArray[np.uint64]:
    """uint64 [256]: for each byte of sign bits, eight int8 of +1 (bit 0) or -1 (bit 1)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8).view(np.uint64).ravel()


SIGN_BYTES = _sign_bytes()


@njit(nogil=True, cache=True, forceinline=True)
def _append(found, count, positions, words, codeword, place):
    """Write the positions of ``codeword``'s non-zeros, and what follows them in its last word."""
    first = codeword * words
    store64(found, TWO * count, at(positions, first) + place)
    if words > ONE:
        store64(found, TWO * count + EIGHT, at(positions, first + ONE) + place)
        for word in range(TWO, words):
            store64(found, TWO * count + EIGHT * word, at(positions, first + word) + place)


@njit(nogil=True, cache=True, forceinline=True)
def _scan(segments, begin, left, limit, width, positions, steps, nonzeros, longest, found):
    """Append the positions of codewords to ``found`` until ``limit`` columns are passed.

    ``left``: bits of the segment not yet read, from ``begin`` up. Returns what is left then, the
    columns passed, and the number of positions.
    """
    words = np.uint64(positions.shape[1])
    mask = (ONE << width) - ONE
    place = count = np.uint64(0)  # place: columns passed, in all four lanes
    # Three codewords of up to 16 bits, at any bit offset, come with one load of 64 bits.
    three, margin = np.uint64(3) * width, np.uint64(3) * longest
    safe = limit - margin if limit > margin else np.uint64(0)
    while place & LANE < safe and left >= three:
        left -= three
        bits = load64(segments, begin + (left >> np.uint64(3))) >> (left & SEVEN)
        a = (bits >> (TWO * width)) & mask
        _append(found, count, positions, words, a, place)
        count += np.uint64(at(nonzeros, a))
        place += at(steps, a)
        a = (bits >> width) & mask
        _append(found, count, positions, words, a, place)
        count += np.uint64(at(nonzeros, a))
        place += at(steps, a)
        a = bits & mask
        _append(found, count, positions, words, a, place)
        count += np.uint64(at(nonzeros, a))
        place += at(steps, a)
    while place & LANE < limit and left >= width:
        left -= width
        a = (load32(segments, begin + (left >> np.uint64(3))) >> (left & SEVEN)) & mask
        _append(found, count, positions, words, a, place)
        count += np.uint64(at(nonzeros, a))
        place += at(steps, a)
    return left, place & LANE, count


@njit(nogil=True, cache=True, forceinline=True)
def _next_chunk(segments, begin, left, seen, columns, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs):  # fmt: skip
    """Fill ``found`` and ``signs`` with the next chunk of a row of which ``columns`` are left.

    ``seen``: sign bits of the row used before. Returns bits left, columns passed (0: the segment
    ends early), number of non-zeros.
    """
    left, passed, count = _scan(
        segments,
        begin,
        left,
        min(columns, CHUNK),
        width,
        positions,
        steps,
        nonzeros,
        longest,
        found,
    )
    if passed < min(columns, CHUNK):
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
        bits = load16(segments, begin + ((seen + j) >> np.uint64(3))) >> (seen & SEVEN)
        store64(signs, j, at(sign_bytes, bits & np.uint64(255)))
        j += EIGHT
    return left, passed, count


@njit(nogil=True, cache=True)
def decode_rows(first, last, segments, offsets, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, totals, out):  # fmt: skip
    """Decode into ``out`` int8 [rows, columns]; check the rows wholly ([E-9] to [E-12]).

    ``totals`` int64 [rows]: the number of non-zeros of each row.
    """
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    columns = np.uint64(out.shape[1])
    for row in range(first, last):
        target = out[row]
        target[:] = 0
        begin = np.uint64(offsets[row])
        left = EIGHT * (np.uint64(offsets[row + 1]) - begin)
        column = seen = np.uint64(0)
        while column < columns:
            left, passed, count = _next_chunk(
                segments, begin, left, seen, columns - column, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return row * 8 + ENDS_EARLY
            if count > 0 and column + np.uint64(found[np.int64(count) - 1]) >= columns:
                return row * 8 + BEYOND_ROW
            here = target[np.int64(column) :]
            for j in range(np.int64(count)):
                here[np.uint64(found[j])] = signs[j]
            column += passed
            seen += count
        totals[row] = seen
        used = np.uint64(0) if in_codeword else seen
        if left - used >= EIGHT:
            return row * 8 + LEFT_OVER
        gap = load16(segments, begin + (used >> np.uint64(3))) >> (used & SEVEN)
        if gap & ((ONE << (left - used)) - ONE):
            return row * 8 + PADDING
    return OK


@njit(nogil=True, cache=True)
def find_unused_codeword(first, last, segments, offsets, width, columns, steps):
    """Look for a codeword that the dictionary does not have ([D-5])."""
    mask = (ONE << width) - ONE
    for row in range(first, last):
        begin = np.uint64(offsets[row])
        left = EIGHT * (np.uint64(offsets[row + 1]) - begin)
        column = np.uint64(0)
        while column < columns and left >= width:
            left -= width
            a = (load32(segments, begin + (left >> np.uint64(3))) >> (left & SEVEN)) & mask
            if steps[a] == 0:
                return row * 8 + NO_CODEWORD
            column += steps[a] & LANE
    return OK


@njit(nogil=True, fastmath=REORDER, cache=True)
def dot_rows(first, last, segments, offsets, width, in_codeword,
             positions, steps, nonzeros, longest, sign_bytes, columns, x, out):  # fmt: skip
    """``out`` float32 [rows, 2]: the sum of x over the row's -1 trits, and over its +1 trits.

    ``x`` float32 [columns + 255], zero where the last entry may overrun the row.
    """
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    for row in range(first, last):
        begin = np.uint64(offsets[row])
        left = EIGHT * (np.uint64(offsets[row + 1]) - begin)
        column = seen = np.uint64(0)
        minus = plus = np.float32(0)
        while column < columns:
            left, passed, count = _next_chunk(
                segments, begin, left, seen, columns - column, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return row * 8 + ENDS_EARLY
            here = x[np.int64(column) :]
            for j in range(np.int64(count)):
                # A product where a choice would do: it is the form that LLVM vectorises.
                is_plus = np.float32((signs[j] + 1) >> 1)
                value = at(here, np.uint64(found[j]))
                plus += value * is_plus
                minus += value * (np.float32(1) - is_plus)
            column += passed
            seen += count
        out[row, 0] = minus
        out[row, 1] = plus
    return OK


@njit(nogil=True, fastmath=REORDER, cache=True)
def dot_rows_by_group(first, last, segments, offsets, width, in_codeword,
                      positions, steps, nonzeros, longest, sign_bytes, columns,
                      group_size, x, out):  # fmt: skip
    """``out`` float32 [rows, groups, tokens, 2]: as ``dot_rows``, sums for each group.

    ``x`` float32 [tokens, columns + 255]. The general form; the others are its fast cases.
    """
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    for row in range(first, last):
        begin = np.uint64(offsets[row])
        left = EIGHT * (np.uint64(offsets[row + 1]) - begin)
        column = seen = np.uint64(0)
        out[row] = 0
        while column < columns:
            left, passed, count = _next_chunk(
                segments, begin, left, seen, columns - column, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return row * 8 + ENDS_EARLY
            j = 0
            while j < np.int64(count):
                group = (np.int64(column) + found[j]) // group_size
                end = min((group + 1) * group_size, np.int64(columns)) - np.int64(column)
                stop = j
                while stop < np.int64(count) and found[stop] < end:
                    stop += 1
                if stop == j:  # a non-zero beyond the row: only in a damaged segment
                    break
                for token in range(x.shape[0]):
                    here = x[token, np.int64(column) :]
                    minus = plus = np.float32(0)
                    for i in range(j, stop):
                        value = at(here, np.uint64(found[i]))
                        plus += value if signs[i] > 0 else np.float32(0)
                        minus += np.float32(0) if signs[i] > 0 else value
                    out[row, group, token, 0] += minus
                    out[row, group, token, 1] += plus
                j = stop
            column += passed
            seen += count
    return OK


@njit(nogil=True, fastmath=REORDER, cache=True)
def dot_rows_tile(first, last, segments, offsets, width, in_codeword,
                  positions, steps, nonzeros, longest, sign_bytes, columns, x, out):  # fmt: skip
    """``dot_rows`` for ``TILE`` tokens: ``x`` [columns + 255, TILE], ``out`` [rows, 2, TILE].

    Four accumulators a sign, taken in turn: an addition need not wait for the one before it.
    """
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    sums = np.empty((4, 2, TILE), np.float32)
    for row in range(first, last):
        begin = np.uint64(offsets[row])
        left = EIGHT * (np.uint64(offsets[row + 1]) - begin)
        column = seen = np.uint64(0)
        sums[:] = 0
        while column < columns:
            left, passed, count = _next_chunk(
                segments, begin, left, seen, columns - column, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs,
            )  # fmt: skip
            if passed == 0:
                return row * 8 + ENDS_EARLY
            for j in range(np.int64(count)):
                sign = np.uint64(signs[j] > 0)
                total = (np.uint64(j & 3) * TWO + sign) * np.uint64(TILE)
                add_tile(sums, total, x, (column + np.uint64(found[j])) * np.uint64(TILE))
            column += passed
            seen += count
        for sign in range(2):
            for token in range(TILE):
                out[row, sign, token] = (
                    sums[0, sign, token] + sums[1, sign, token]
                    + sums[2, sign, token] + sums[3, sign, token]
                )  # fmt: skip
    return OK


@njit(nogil=True, cache=True)
def encode_rows(first, last, trits, width, in_codeword, children, codewords, out, lengths, totals):
    """Write the segments of rows one after another; return the bytes written.

    ``out`` uint8, zeroed, large enough; ``lengths`` (bytes), ``totals``
    (non-zeros) int64 [rows].
    """
    columns = trits.shape[1]
    codes = np.empty(columns + 1, np.uint16)
    tree = children.reshape(children.size)
    written = np.int64(0)
    for row in range(first, last):
        weights = trits[row]
        count = np.int64(0)
        node = np.int64(0)
        signs = np.uint64(0)  # of the current entry, if they are part of the codeword
        in_entry = np.uint64(0)
        word = np.uint64(0)  # of sign bits, not yet written
        seen = np.uint64(0)
        for column in range(columns):
            trit = weights[column]
            if trit != 0:
                negative = np.uint64(trit < 0)
                signs |= negative << in_entry
                in_entry += ONE
                word |= negative << (seen & np.uint64(63))
                seen += ONE
                if not in_codeword and seen & np.uint64(63) == 0:
                    store64(out, np.uint64(written) + (seen >> np.uint64(3)) - EIGHT, word)
                    word = np.uint64(0)
            node = np.int64(at(tree, np.uint64(2 * node + (trit != 0))))
            if node < 0:
                code = codewords[~node]
                codes[count] = code + np.uint16(signs) if in_codeword else code
                count += 1
                node = 0
                signs = in_entry = np.uint64(0)
        if node != 0:  # the row ends within an entry: finish it with zeros [E-10]
            while node >= 0:
                node = np.int64(tree[2 * node])
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
            place = bit >> np.uint64(3)
            store64(out, place, load64(out, place) | (np.uint64(codes[i]) << (bit & SEVEN)))
        lengths[row] = length
        totals[row] = np.int64(seen)
        written += length
    return written
