"""Chunks of a segment as lists of non-zeros, and what all kernels that decode have in common.

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
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from qmoe_format.codec.kernels.unaligned import at, load16, load32, load64, store64

OK = -1
ENDS_EARLY, BEYOND_END, LEFT_OVER, PADDING, NO_CODEWORD = range(5)

# 2^15 less the longest entry: a position in a chunk, and an overrun of the last entry, fit 15 bits.
CHUNK = np.uint64(32512)
# Room for a chunk of non-zeros only, and for the words that the last entry writes beyond them.
LIST_LENGTH = 32768 + 64

ZERO, ONE, TWO, THREE, SEVEN, EIGHT = (np.uint64(n) for n in (0, 1, 2, 3, 7, 8))
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
def find_positions(segments, begin, left, limit, width, positions, steps, nonzeros, longest, found):
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
def next_chunk(segments, begin, left, seen, ahead, width, in_codeword,
                positions, steps, nonzeros, longest, sign_bytes, found, signs):  # fmt: skip
    """Fill ``found`` and ``signs`` with the next chunk of a segment; ``ahead``: weights to come.

    ``seen``: signs used before. Returns bits left, weights passed (0: the segment ends early),
    number of non-zeros.
    """
    limit = min(ahead, CHUNK)
    left, passed, count = find_positions(
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
def beginning(segment, lengths, shortest):
    """Where a segment begins, in bytes; ``lengths`` are those above the ``shortest``."""
    begin = np.uint64(segment) * shortest
    for before in range(segment):
        begin += np.uint64(lengths[before])
    return begin


@njit(nogil=True, cache=True, forceinline=True)
def first_at(found, start, stop, place):
    """The first of ``found[start:stop]``, which ascend, that is not below ``place``."""
    count = stop - start
    while count > 0:  # no branch on data: where a row ends cannot be foretold
        half = (count + 1) >> 1
        start += half * (np.int64(found[start + half - 1] & POSITION) < place)
        count >>= 1
    return start
