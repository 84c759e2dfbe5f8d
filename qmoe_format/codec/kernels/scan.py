"""The chunks of a segment as lists of non-zeros: the first stage of all kernels that decode.

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

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.kernels.jit import inlined
from qmoe_format.codec.kernels.unaligned import load16, load32, load64, pointer, store64

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


class Segments(NamedTuple):
    """The segments of a matrix."""

    data: Any  # pointer to the bytes of all segments and at least 8 more
    lengths: Any  # bytes of each segment above length_base
    length_base: Any  # uint64
    width: Any  # uint64, bits in a codeword
    signed: Any  # whether codewords contain the signs, which otherwise follow separately
    span: Any  # weights in a segment; the last one may hold fewer


class Entries(NamedTuple):
    """What each codeword stands for: pointers to the arrays of ``Tables``."""

    positions: Any
    words: Any  # of positions per entry
    steps: Any
    nonzeros: Any
    longest: Any  # uint64, weights of the longest entry


@inlined
def as_segments(data, lengths, length_base, width, signed, span):
    return Segments(pointer(data), lengths, length_base, width, signed, span)


@inlined
def as_entries(positions, steps, nonzeros, longest):
    words = positions.shape[1]
    return Entries(pointer(positions), words, pointer(steps), pointer(nonzeros), longest)


@inlined
def beginning(segments, segment):
    """The byte at which a segment begins."""
    begin = np.uint64(segment) * segments.length_base
    for before in range(segment):
        begin += np.uint64(segments.lengths[before])
    return begin


@inlined
def _take_1(found, count, place, positions, codeword):
    """Append the positions of ``codeword``'s non-zeros, at most four of them."""
    store64(found, TWO * count, positions[codeword] + place)


@inlined
def _take_2(found, count, place, positions, codeword):
    """The same for entries of up to eight non-zeros."""
    store64(found, TWO * count, positions[TWO * codeword] + place)
    store64(found, TWO * count + EIGHT, positions[TWO * codeword + ONE] + place)


@inlined
def _take_4(found, count, place, positions, codeword):
    """The same for entries of up to sixteen."""
    _take_2(found, count, place, positions, TWO * codeword)
    _take_2(found, count + EIGHT, place, positions, TWO * codeword + ONE)


@inlined
def _scan(take, width, entries, found, data, left, limit):
    positions, steps, nonzeros = entries.positions, entries.steps, entries.nonzeros
    mask = (ONE << width) - ONE
    place = count = ZERO  # place: weights passed, in all four lanes
    # Three codewords of up to 16 bits, at any bit offset, come with one load of 64 bits.
    three, two = THREE * width, TWO * width
    longest = THREE * entries.longest
    safe = limit - longest if limit > longest else ZERO
    while place & LANE < safe and left >= three:
        left -= three
        bits = load64(data, left >> THREE) >> (left & SEVEN)
        a, b, c = (bits >> two) & mask, (bits >> width) & mask, bits & mask
        take(found, count, place, positions, a)
        count += np.uint64(nonzeros[a])
        place += steps[a]
        take(found, count, place, positions, b)
        count += np.uint64(nonzeros[b])
        place += steps[b]
        take(found, count, place, positions, c)
        count += np.uint64(nonzeros[c])
        place += steps[c]
    while place & LANE < limit and left >= width:
        left -= width
        a = (load32(data, left >> THREE) >> (left & SEVEN)) & mask
        take(found, count, place, positions, a)
        count += np.uint64(nonzeros[a])
        place += steps[a]
    return left, place & LANE, count


@inlined
def find_positions(segments, entries, found, data, left, limit, seen):
    """List the positions of non-zeros in ``found`` until ``limit`` weights are passed.

    Args:
        data: pointer to the bytes of a segment.
        left: bits of it that are not yet read; codewords are read from the end.
        seen: signs of it that belong to earlier chunks.

    Returns:
        Bits left then, weights passed (below ``limit`` if the segment ends early; 0 if it has fewer
        signs than non-zeros), number of positions.
    """
    # A choice made here, not for each codeword.
    if entries.words == 1:
        left, passed, count = _scan(_take_1, segments.width, entries, found, data, left, limit)
    elif entries.words == 2:
        left, passed, count = _scan(_take_2, segments.width, entries, found, data, left, limit)
    else:
        left, passed, count = _scan(_take_4, segments.width, entries, found, data, left, limit)
    if not segments.signed and seen + count > left:
        passed = ZERO
    return left, passed, count


@inlined
def find_levels(segments, entries, lists, data, left, limit, seen):
    """``find_positions``, and a second list with the signs of the non-zeros."""
    found, signs = lists
    left, passed, count = find_positions(segments, entries, found, data, left, limit, seen)
    if segments.signed:
        for j in range(count):
            signs[j] = 1 - 2 * np.int8(found[j] >> 15)
            found[j] &= POSITION
    elif passed > 0:
        sign_bytes = pointer(SIGN_BYTES)
        j = ZERO
        while j < count:
            bits = load16(data, (seen + j) >> THREE) >> (seen & SEVEN)
            store64(signs, j, sign_bytes[bits & np.uint64(255)])
            j += EIGHT
    return left, passed, count


@inlined
def first_at(found, start, stop, place):
    """The first of ``found[start:stop]``, which ascend, that is not below ``place``."""
    count = stop - start
    while count > 0:  # without a branch on data: where a row ends is unpredictable
        half = (count + 1) >> 1
        start += half * (np.int64(found[start + half - 1] & POSITION) < place)
        count >>= 1
    return start
