"""Kernels that decode: segments to levels, and to weights."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.cursor import Scales, for_each_run
from qmoe_format.codec.kernels.jit import inlined, kernel
from qmoe_format.codec.kernels.scan import (
    BEYOND_END,
    CHUNK,
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
    ZERO,
    as_entries,
    as_segments,
    beginning,
    find_levels,
    first_at,
)
from qmoe_format.codec.kernels.unaligned import advance, load16, load32, pointer


@kernel
def decode_segments(first, last, segments, entries, totals, out):
    """Decode into ``out``, int8, flat; check everything about the segments ([E-10] to [E-13]).

    ``totals`` int64: receives the number of non-zeros of each segment.
    """
    segments, entries = as_segments(*segments), as_entries(*entries)
    span = segments.span
    found, signs = np.empty(LIST_LENGTH, np.uint16), np.empty(LIST_LENGTH, np.int8)
    begin = beginning(segments, first)
    for segment in range(first, last):
        target = out[segment * span : (segment + 1) * span]
        target[:] = 0
        weights = np.uint64(target.size)
        data = advance(segments.data, begin)
        length = segments.length_base + np.uint64(segments.lengths[segment])
        begin += length
        left = EIGHT * length
        place = seen = ZERO
        while place < weights:
            limit = min(weights - place, CHUNK)
            lists = pointer(found), pointer(signs)
            left, passed, count = find_levels(segments, entries, lists, data, left, limit, seen)
            if passed < limit:
                return segment * 8 + ENDS_EARLY
            if count > 0 and place + np.uint64(found[count - ONE]) >= weights:
                return segment * 8 + BEYOND_END
            here = target[np.int64(place) :]
            for j in range(count):
                here[np.uint64(found[j])] = signs[j]
            place += passed
            seen += count
        totals[segment] = seen
        used = ZERO if segments.signed else seen
        if left - used >= EIGHT:
            return segment * 8 + LEFT_OVER
        gap = load16(data, used >> THREE) >> (used & SEVEN)
        if gap & ((ONE << (left - used)) - ONE):
            return segment * 8 + PADDING
    return OK


@kernel
def find_unused_codeword(first, last, segments, weights, steps):
    """Look for a codeword that the dictionary does not have ([D-X]); ``weights``: of the matrix."""
    segments = as_segments(*segments)
    width, span = segments.width, segments.span
    mask = (ONE << width) - ONE
    begin = beginning(segments, first)
    for segment in range(first, last):
        data = advance(segments.data, begin)
        length = segments.length_base + np.uint64(segments.lengths[segment])
        begin += length
        left = EIGHT * length
        ahead = min(span, weights - segment * span)
        while ahead > 0 and left >= width:
            left -= width
            step = steps[(load32(data, left >> THREE) >> (left & SEVEN)) & mask]
            if step == 0:
                return segment * 8 + NO_CODEWORD
            ahead -= np.int64(step & LANE)
    return OK


@kernel
def scale_rows(first, last, levels, group_size, low_high, column_scale, out):
    """``out`` float32 [rows, columns]: each level's value times its column's scale ([V-1], [V-2]).

    ``low_high`` float32 [rows, groups, 2]. No reordering here: one rounding, and +0 for zero.
    """
    for row in range(first, last):
        for group in range(low_high.shape[1]):
            low, high = low_high[row, group]
            start = group * group_size
            coded = levels[row, start : start + group_size]
            scale = column_scale[start : start + group_size]
            target = out[row, start : start + group_size]
            for c in range(coded.size):
                value = (high if coded[c] > 0 else low) * scale[c]
                target[c] = value if coded[c] != 0 else np.float32(0)


@inlined
def _write(run, sums, segments, lists, target):
    found, signs = lists
    low_high, groups, columns, column_scale, first_row, rows, weights = target
    start, stop = np.uint64(run.start), first_at(found, run.start, run.count, run.end)
    row = run.row - first_row
    if 0 <= row < rows:
        scale = 2 * (run.row * groups + run.group)
        low, high = low_high[scale], low_high[scale + 1]
        place = np.uint64(row * columns)
        for j in range(start, np.uint64(stop)):
            c = run.column + np.uint64(found[j])
            weights[place + c] = (high if signs[j] > 0 else low) * column_scale[c]
    return sums, stop, run.seen + np.uint64(stop) - start


@inlined
def _finish(total, sums, scales, row, group):
    return total


@inlined
def _store(out, row, total):
    pass


@kernel
def weights_of_segments(first, last, segments, entries, scales, column_scale, first_row, out):
    """Weights ([V-1], [V-2]) of as many rows as ``out`` has, float32 [rows, columns], zeroed.

    ``out`` begins at row ``first_row``; the segments may have rows before it and after its end.
    ``scales``: low and high, contiguous.
    """
    found, signs = np.empty(LIST_LENGTH, np.uint16), np.empty(LIST_LENGTH, np.int8)
    low_high, columns, _ = scales
    target = (
        pointer(low_high), low_high.shape[1], columns, pointer(column_scale), first_row,
        out.shape[0], pointer(out),
    )  # fmt: skip
    return for_each_run(
        find_levels, _write, _finish, _store, (0,), first, last, as_segments(*segments),
        as_entries(*entries), Scales(*scales), (pointer(found), pointer(signs)), target, out,
        (found, signs),
    )  # fmt: skip
