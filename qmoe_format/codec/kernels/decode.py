"""Kernels that decode: segments to levels, and to weights."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.cursor import for_each_run
from qmoe_format.codec.kernels.jit import inlined, kernel, optional
from qmoe_format.codec.kernels.refinement import (
    as_refinement,
    beginning_of,
    check_magnitudes,
    find_magnitudes,
    magnitudes_of,
)
from qmoe_format.codec.kernels.scan import (
    BEYOND_END,
    CHUNK,
    EIGHT,
    ENDS_EARLY,
    LIST_LENGTH,
    OK,
    ONE,
    REASONS,
    REFINEMENT,
    ZERO,
    as_entries,
    as_segments,
    beginning,
    check_rest,
    find_levels,
    first_at,
    segment_at,
)
from qmoe_format.codec.kernels.unaligned import pointer


@kernel
def decode_segments(first, last, span, mask, entries, refinement, totals, out):
    """Decode into ``out``, int8, flat; check everything about the segments ([E-10] to [E-15]).

    ``totals`` int64 [segments, 2]: receives the ones of each mask and of each refinement.
    """
    mask, entries = as_segments(*mask), as_entries(*entries)
    refinement = as_refinement(refinement, span)
    found, levels = np.empty(LIST_LENGTH, np.uint16), np.empty(LIST_LENGTH, np.int8)
    begin, refined_begin = beginning(mask, first), beginning_of(refinement, first)
    for segment in range(first, last):
        target = out[segment * span : (segment + 1) * span]
        target[:] = 0
        weights = np.uint64(target.size)
        lists = pointer(found), pointer(levels), magnitudes_of(refinement)
        refined_begin, known = find_magnitudes(refinement, segment, refined_begin, weights)
        data, length = segment_at(mask, segment, begin)
        begin += length
        left = EIGHT * length
        place = seen = ZERO
        while place < weights:
            limit = min(weights - place, CHUNK)
            left, passed, count = find_levels(mask, entries, lists, data, left, limit, seen)
            if passed < limit:
                return segment * REASONS + ENDS_EARLY
            if count > 0 and place + np.uint64(found[count - ONE]) >= weights:
                return segment * REASONS + BEYOND_END
            here = target[np.int64(place) :]
            for j in range(count):
                here[np.uint64(found[j])] = levels[j]
            place += passed
            seen += count
        reason = check_rest(data, left, seen)
        if reason >= 0:
            return segment * REASONS + reason
        ones, reason = check_magnitudes(refinement, segment, known, seen)
        if reason >= 0:
            return segment * REASONS + REFINEMENT + reason
        totals[segment, 0], totals[segment, 1] = seen, ones
    return OK


@kernel
def scale_rows(first, last, levels, refined, low_high, column_scale, out):
    """``out`` float32 [rows, columns]: each level's value times its column's scale ([V-1], [V-2]).

    ``refined``: None if no level is beyond -1 to 1. ``low_high`` float32 [rows, 2]. No reordering
    here: one rounding, and +0 for zero.
    """
    for row in range(first, last):
        low, high = low_high[row]
        for c in range(levels.shape[1]):
            level = levels[row, c]
            value = _times(refined, high if level > 0 else low, level) * column_scale[c]
            out[row, c] = value if level != 0 else np.float32(0)


@inlined
def _write(run, sums, lists, target):
    found, levels, magnitudes = lists
    low_high, columns, column_scale, first_row, rows, weights = target
    start, stop = np.uint64(run.start), first_at(found, run.start, run.count, run.end)
    row = run.row - first_row
    if 0 <= row < rows:
        low, high = low_high[2 * run.row], low_high[2 * run.row + 1]
        place = np.uint64(row * columns)
        for j in range(start, np.uint64(stop)):
            c = run.column + np.uint64(found[j])
            value = _times(magnitudes, high if levels[j] > 0 else low, levels[j])
            weights[place + c] = value * column_scale[c]
    return sums, stop, run.seen + np.uint64(stop) - start


@optional(lambda refined, value, level: value)
def _times(refined, value, level):
    return value * np.float32(abs(level))


@inlined
def _store(out, row, sums, scales):
    pass


@kernel
def weights_of_segments(
    first, last, span, mask, entries, refinement, low_high, column_scale, first_row, out
):
    """Weights ([V-1], [V-2]) of as many rows as ``out`` has, float32 [rows, columns], zeroed.

    ``out`` begins at row ``first_row``; the segments may have rows before it and after its end.
    ``low_high`` float32 [rows of the matrix, 2], contiguous.
    """
    found, levels = np.empty(LIST_LENGTH, np.uint16), np.empty(LIST_LENGTH, np.int8)
    refinement = as_refinement(refinement, span)
    columns = out.shape[1]
    lists = pointer(found), pointer(levels), magnitudes_of(refinement)
    target = (
        pointer(low_high),
        columns,
        pointer(column_scale),
        first_row,
        out.shape[0],
        pointer(out),
    )
    return for_each_run(
        find_levels, _write, _store, (0,), first, last, span, as_segments(*mask),
        as_entries(*entries), refinement, columns, low_high, lists, target, out, (found, levels),
    )  # fmt: skip
