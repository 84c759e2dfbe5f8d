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
15 bits. ``refinement`` makes more than +1 and -1 of the signs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.kernels.jit import inlined, optional
from qmoe_format.codec.kernels.unaligned import (
    advance,
    load16,
    load32,
    load64,
    pointer,
    prefetch,
    store64,
)

OK = -1
ENDS_EARLY, BEYOND_END, LEFT_OVER, PADDING = range(4)
TOO_LARGE = 4
REFINEMENT = 8  # added to these where they concern the refinement
REASONS = 16

# 2^15 less the longest entry: a position in a chunk, and an overrun of the last entry, fit 15 bits.
CHUNK = np.uint64(32512)
# Room for a chunk of non-zeros only, and for the words that the last entry writes beyond them.
LIST_LENGTH = 32768 + 64

ZERO, ONE, TWO, THREE, SEVEN, EIGHT = (np.uint64(n) for n in (0, 1, 2, 3, 7, 8))
LANE = np.uint64(0xFFFF)
_LINE = np.uint64(64)  # bytes in a line of the cache


def _sign_bytes() -> npt.NDArray[np.uint64]:
    """uint64 [256]: for each byte of sign bits, eight int8 of +1 (bit 0) or -1 (bit 1)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8).view(np.uint64).ravel()


SIGN_BYTES = _sign_bytes()


class Segments(NamedTuple):
    """The segments of a mask or of a refinement."""

    data: Any  # pointer to the bytes of all segments and at least 8 more
    lengths: Any  # bytes of each segment above length_base
    length_base: Any  # uint64
    width: Any  # uint64, bits in a codeword


class Entries(NamedTuple):
    """What each codeword stands for: pointers to the arrays of ``Tables``."""

    positions: Any
    words: Any  # of positions per entry
    steps: Any
    ones: Any
    longest: Any  # uint64, the largest step


@inlined
def as_segments(data, lengths, length_base, width):
    return Segments(pointer(data), lengths, length_base, width)


@inlined
def as_entries(positions, steps, ones, longest):
    return Entries(pointer(positions), positions.shape[1], pointer(steps), pointer(ones), longest)


@inlined
def beginning(segments, segment):
    """The byte at which a segment begins."""
    begin = np.uint64(segment) * segments.length_base
    for before in range(segment):
        begin += np.uint64(segments.lengths[before])
    return begin


@inlined
def segment_length(segments, segment):
    """Its bytes."""
    return segments.length_base + np.uint64(segments.lengths[segment])


@inlined
def segment_at(segments, segment, begin):
    """Pointer to a segment, which begins at byte ``begin``, and its length.

    The next one, which is about as long, is asked for: codewords are read from the end, and what a
    processor sees is too short for it to find out.
    """
    data, length = advance(segments.data, begin), segment_length(segments, segment)
    for place in range(ZERO, length, _LINE):
        prefetch(data, length + place)
    return data, length


@inlined
def _take_1(found, count, place, positions, codeword):
    """Append the positions of ``codeword``'s ones, at most four of them."""
    store64(found, TWO * count, positions[codeword] + place)


@inlined
def _take_2(found, count, place, positions, codeword):
    """The same for entries of up to eight ones."""
    store64(found, TWO * count, positions[TWO * codeword] + place)
    store64(found, TWO * count + EIGHT, positions[TWO * codeword + ONE] + place)


@inlined
def _take_4(found, count, place, positions, codeword):
    """The same for entries of up to sixteen."""
    _take_2(found, count, place, positions, TWO * codeword)
    _take_2(found, count + EIGHT, place, positions, TWO * codeword + ONE)


@inlined
def _scan(take, width, entries, found, data, left, limit, floor):
    positions, steps, ones = entries.positions, entries.steps, entries.ones
    mask = (ONE << width) - ONE
    place = count = ZERO  # place: bits passed, in all four lanes
    # Three codewords of up to 16 bits, at any bit offset, come with one load of 64 bits.
    three, two = THREE * width, TWO * width
    longest = THREE * entries.longest
    safe = limit - longest if limit > longest else ZERO
    while place & LANE < safe and left >= floor + three:
        left -= three
        bits = load64(data, left >> THREE) >> (left & SEVEN)
        a, b, c = (bits >> two) & mask, (bits >> width) & mask, bits & mask
        take(found, count, place, positions, a)
        count += np.uint64(ones[a])
        place += steps[a]
        take(found, count, place, positions, b)
        count += np.uint64(ones[b])
        place += steps[b]
        take(found, count, place, positions, c)
        count += np.uint64(ones[c])
        place += steps[c]
    while place & LANE < limit and left >= floor + width:
        left -= width
        a = (load32(data, left >> THREE) >> (left & SEVEN)) & mask
        take(found, count, place, positions, a)
        count += np.uint64(ones[a])
        place += steps[a]
    return left, place & LANE, count


@inlined
def scan(width, entries, found, data, left, limit, floor):
    """List the positions of ones in ``found`` until ``limit`` bits are passed.

    Args:
        data: pointer to the bytes of a segment.
        left: bits of it that are not yet read; codewords are read from the end.
        floor: bits of it that are not to be read.

    Returns:
        Bits left then, bits passed (below ``limit`` if the segment ends early), number of ones.
    """
    # A choice made here, not for each codeword.
    if entries.words == 1:
        return _scan(_take_1, width, entries, found, data, left, limit, floor)
    if entries.words == 2:
        return _scan(_take_2, width, entries, found, data, left, limit, floor)
    return _scan(_take_4, width, entries, found, data, left, limit, floor)


@inlined
def find_positions(mask, entries, lists, data, left, limit, seen):
    """List the positions of non-zeros in ``lists[0]`` until ``limit`` weights are passed.

    Args:
        seen: signs of the segment that belong to earlier chunks.

    Returns:
        As ``scan``; no weight is passed if the segment has fewer signs than non-zeros.
    """
    left, passed, count = scan(mask.width, entries, lists[0], data, left, limit, ZERO)
    return left, ZERO if seen + count > left else passed, count


@inlined
def find_levels(mask, entries, lists, data, left, limit, seen):
    """``find_positions``, and a second list with the levels there.

    ``lists``: positions, levels, and the magnitudes of the segment's non-zeros or None.
    """
    _, levels, magnitudes = lists
    left, passed, count = find_positions(mask, entries, lists, data, left, limit, seen)
    if passed > 0:
        sign_bytes = pointer(SIGN_BYTES)
        j = ZERO
        while j < count:
            bits = load16(data, (seen + j) >> THREE) >> (seen & SEVEN)
            store64(levels, j, sign_bytes[bits & np.uint64(255)])
            j += EIGHT
        _multiply(magnitudes, levels, seen, count)
    return left, passed, count


@optional(lambda magnitudes, levels, seen, count: None)
def _multiply(magnitudes, levels, seen, count):
    for j in range(count):
        levels[j] *= magnitudes[seen + j]


@inlined
def check_rest(data, left, signs):
    """What is wrong with the bits between codewords and signs ([E-13]), or -1."""
    if left - signs >= EIGHT:
        return LEFT_OVER
    gap = load16(data, signs >> THREE) >> (signs & SEVEN)
    return PADDING if gap & ((ONE << (left - signs)) - ONE) else -1


@inlined
def first_at(found, start, stop, place):
    """The first of ``found[start:stop]``, which ascend, that is not below ``place``."""
    count = stop - start
    while count > 0:  # without a branch on data: where a row ends is unpredictable
        half = (count + 1) >> 1
        start += half * (np.int64(found[start + half - 1]) < place)
        count >>= 1
    return start
