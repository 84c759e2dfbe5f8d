"""The rows of a segment, found once for all kernels that apply scales."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qmoe_format.codec.kernels.jit import inlined
from qmoe_format.codec.kernels.refinement import beginning_of, find_magnitudes, too_few
from qmoe_format.codec.kernels.scan import (
    CHUNK,
    EIGHT,
    ENDS_EARLY,
    OK,
    REASONS,
    REFINEMENT,
    ZERO,
    beginning,
    segment_at,
)


class Run(NamedTuple):
    """The part of a chunk that is of one row."""

    data: Any  # pointer to the bytes of the segment
    left: Any  # bits of it that are not yet read
    seen: Any  # signs of it that belong to earlier runs
    row: Any  # of the matrix
    column: Any  # of the chunk's first weight; wraps around where that is part of an earlier row
    start: Any  # the chunk's first item (read counts them) that no earlier run had
    count: Any  # items of the chunk
    end: Any  # where the row ends, in weights after the chunk's beginning; maybe after its end


@inlined
def for_each_run(
    read, visit, store, zero, first, last, span, mask, entries, refinement, columns, scales, lists,
    x, out, _,
):  # fmt: skip
    """Read the segments ``first`` to ``last`` and visit their runs in order.

    Args:
        read: fills ``lists`` with a chunk, see ``scan.find_positions``.
        visit: ``(run, sums, lists, x)`` -> ``sums``, the next ``start``, ``seen``.
        store: ``(out, row, sums, scales)``, at the end of a row.
        zero: the ``sums`` of a new row.
        refinement: ``refinement.Refinement``, or None.
        columns: of the matrix, at least 1.
        scales: [rows, 1 or 2].
        _: the arrays that pointers are to, so that they live until the end.

    Returns:
        ``OK``, or the segment that ends early and that reason.
    """
    rows = scales.shape[0]
    begin, refined_begin = beginning(mask, first), beginning_of(refinement, first)
    for segment in range(first, last):
        data, length = segment_at(mask, segment, begin)
        begin += length
        left = EIGHT * length
        row = segment * (span // columns)
        weights = min(span, (rows - row) * columns)
        refined_begin, known = find_magnitudes(
            refinement, segment, refined_begin, np.uint64(weights)
        )
        place, seen, sums = np.int64(0), ZERO, zero
        end = columns  # of the row, in weights after the chunk's beginning
        while place < weights:
            limit = min(np.uint64(weights - place), CHUNK)
            left, passed, count = read(mask, entries, lists, data, left, limit, seen)
            if passed < limit:
                return segment * REASONS + ENDS_EARLY
            start = np.int64(0)
            while place + end <= weights:
                column = np.uint64(columns - end)
                run = Run(data, left, seen, row, column, start, np.int64(count), end)
                sums, start, seen = visit(run, sums, lists, x)
                if end > np.int64(passed):
                    break
                store(out, row, sums, scales)
                sums = zero
                row += 1
                end += columns
            if seen > left:
                return segment * REASONS + ENDS_EARLY
            end -= np.int64(passed)
            place += np.int64(passed)
        if too_few(known, seen):
            return segment * REASONS + REFINEMENT + ENDS_EARLY
    return OK
