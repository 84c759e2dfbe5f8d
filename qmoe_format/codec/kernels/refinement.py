"""The refinement of a segment as a list of magnitudes (SPEC.md section 7).

|q| - 1 ones and a 0 for each non-zero: a one belongs to the non-zero whose number is that of the
zeros before it. So here an entry's positions and length count zeros (``tables.by_zeros``), and
``scan``, which lists them, is the mask's.

For a ternary matrix there is None instead of a refinement, and nothing is left of the calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qmoe_format.codec.kernels.jit import inlined, optional
from qmoe_format.codec.kernels.scan import (
    BEYOND_END,
    CHUNK,
    EIGHT,
    ENDS_EARLY,
    LANE,
    LEFT_OVER,
    LIST_LENGTH,
    ONE,
    SEVEN,
    THREE,
    TOO_LARGE,
    ZERO,
    as_entries,
    as_segments,
    beginning,
    check_rest,
    scan,
    segment_at,
    segment_length,
)
from qmoe_format.codec.kernels.unaligned import advance, load32, pointer

# Codewords of up to 16 ones, perhaps without a zero, that a list has room for.
_CODEWORDS = np.uint64(2048)
# Magnitudes that the last entry may add behind those of a segment, and a vector may read.
_BEHIND = 256 + 16
_TOO_LARGE = np.uint64(128)


class Refinement(NamedTuple):
    """The refinement's segments, and where their contents go."""

    segments: Any
    entries: Any
    found: Any  # uint16 [LIST_LENGTH], to be used by this module
    magnitudes: Any  # uint8 [weights of a segment + _BEHIND]


class Magnitudes(NamedTuple):
    """What has been read of a segment's refinement."""

    data: Any  # pointer to its bytes
    left: Any  # bits of it that were not read
    zeros: Any  # of the string, and those beyond its end
    ones: Any
    reach: Any  # zeros before the last one, plus 1; 0 without ones
    high: Any  # all magnitudes or'ed


@optional(lambda refinement, span: None)
def as_refinement(refinement, span):
    """``refinement``: segments, of up to ``span`` weights, and entries."""
    segments, entries = refinement
    found, magnitudes = np.empty(LIST_LENGTH, np.uint16), np.empty(span + _BEHIND, np.uint8)
    return Refinement(as_segments(*segments), as_entries(*entries), found, magnitudes)


@optional(lambda refinement: None)
def magnitudes_of(refinement):
    """Pointer to where ``find_magnitudes`` writes."""
    return pointer(refinement.magnitudes)


@optional(lambda refinement, segment: ZERO)
def beginning_of(refinement, segment):
    """The byte at which a segment begins."""
    return beginning(refinement.segments, segment)


@optional(lambda refinement, segment, begin, most: (begin, None))
def find_magnitudes(refinement, segment, begin, most):
    """Read a segment, which begins at byte ``begin``, for at most ``most`` non-zeros.

    Writes the magnitude of each non-zero that the string reaches, and 1 for all others.

    Returns:
        Where the next segment begins; ``Magnitudes``.
    """
    segments = refinement.segments
    data, length = segment_at(segments, segment, begin)
    return begin + length, _find_magnitudes(
        segments.width, refinement.entries, pointer(refinement.found),
        pointer(refinement.magnitudes), data, EIGHT * length, most,
    )  # fmt: skip


@inlined
def _find_magnitudes(width, entries, found, magnitudes, data, left, most):
    for j in range(np.int64(most) + _BEHIND):
        magnitudes[j] = 1
    zeros = ones = reach = high = ZERO
    while zeros < most and left >= width:
        floor = left - min(left, _CODEWORDS * width)
        limit = min(most - zeros, CHUNK)
        left, passed, count = scan(width, entries, found, data, left, limit, floor)
        here = advance(magnitudes, zeros)
        for j in range(count):
            magnitude = np.uint64(here[found[j]]) + ONE
            here[found[j]] = magnitude
            high |= magnitude
        if count > 0:
            reach = zeros + np.uint64(found[count - ONE]) + ONE
        zeros += passed
        ones += count
    return Magnitudes(data, left, zeros, ones, reach, high)


@optional(lambda known, nonzeros: False)
def too_few(known, nonzeros):
    """Whether the string ends before the last of so many non-zeros."""
    return known.zeros < nonzeros


@optional(lambda refinement, segment, known, nonzeros: (ZERO, -1))
def check_magnitudes(refinement, segment, known, nonzeros):
    """The ones of a segment's string, and what is wrong with it or -1 ([E-10] to [E-15])."""
    width, steps = refinement.segments.width, refinement.entries.steps
    left = known.left
    if known.zeros < nonzeros:
        return ZERO, ENDS_EARLY
    if left < EIGHT * segment_length(refinement.segments, segment):
        code = (load32(known.data, left >> THREE) >> (left & SEVEN)) & ((ONE << width) - ONE)
        if known.zeros - (steps[code] & LANE) >= nonzeros:
            return ZERO, LEFT_OVER  # the last codeword was not needed
    if known.reach > nonzeros:
        return ZERO, BEYOND_END
    if known.high >= _TOO_LARGE:
        return ZERO, TOO_LARGE
    return known.ones, check_rest(known.data, left, ZERO)
