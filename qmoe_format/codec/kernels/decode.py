"""Kernels that decode: segments to trits, and to weights."""

from __future__ import annotations

import numpy as np
from numba import njit

from qmoe_format.codec.kernels.scan import (
    BEYOND_END,
    EIGHT,
    ENDS_EARLY,
    LANE,
    LEFT_OVER,
    LIST_LENGTH,
    NO_CODEWORD,
    OK,
    ONE,
    PADDING,
    SEVEN,
    THREE,
    beginning,
    first_at,
    next_chunk,
)
from qmoe_format.codec.kernels.unaligned import at, load16, load32


@njit(nogil=True, cache=True)
def decode_segments(first, last, segments, lengths, shortest, width, in_codeword,
                    positions, steps, nonzeros, longest, sign_bytes, span,
                    totals, out):  # fmt: skip
    """Decode into ``out``, int8, flat; check the segments wholly ([E-9] to [E-12]).

    ``span``: weights of a segment, but for the last one. ``totals`` int64: non-zeros of each one.
    """
    found = np.empty(LIST_LENGTH, np.uint16)
    signs = np.empty(LIST_LENGTH, np.int8)
    behind = beginning(first, lengths, shortest)
    for segment in range(first, last):
        target = out[segment * span : (segment + 1) * span]
        target[:] = 0
        weights = np.uint64(target.size)
        begin = behind
        behind += shortest + np.uint64(lengths[segment])
        left = EIGHT * (behind - begin)
        place = seen = np.uint64(0)
        while place < weights:
            left, passed, count = next_chunk(
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
    behind = beginning(first, lengths, shortest)
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
    behind = beginning(first, lengths, shortest)
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
