"""The rows and groups of a segment, found once for all kernels that apply scales."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qmoe_format.codec.kernels.jit import inlined
from qmoe_format.codec.kernels.scan import CHUNK, EIGHT, ENDS_EARLY, OK, ZERO, beginning
from qmoe_format.codec.kernels.unaligned import advance


class Scales(NamedTuple):
    """Row scales."""

    values: Any  # [rows, groups, 1 or 2]
    columns: Any  # of the matrix; 1 if it has none
    group_size: Any  # columns that share scales


class Run(NamedTuple):
    """The part of a chunk that shares scales: one group of one row, or what the chunk has of it."""

    data: Any  # pointer to the bytes of the segment
    left: Any  # bits of it that are not yet read
    seen: Any  # signs of it that belong to earlier runs
    row: Any  # of the matrix
    group: Any  # of the row
    column: Any  # of the chunk's first weight; wraps around where that is part of an earlier row
    start: Any  # the chunk's first item (read counts them) that no earlier run had
    count: Any  # items of the chunk
    end: Any  # where the run ends, in weights after the chunk's beginning; maybe after its end


@inlined
def for_each_run(
    read, visit, finish, store, zero, first, last, segments, entries, scales, lists, x, out, _
):
    """Read the segments ``first`` to ``last`` and visit their runs in order.

    Args:
        read: fills ``lists`` with a chunk, see ``scan.find_positions``.
        visit: ``(run, sums, segments, lists, x)`` -> ``sums``, the next ``start``, ``seen``.
        finish: ``(total, sums, scales, row, group)`` -> ``total``, at the end of a group.
        store: ``(out, row, total)``, at the end of a row.
        zero: the ``sums`` of a new group, and in its first element the ``total`` of a new row.
        _: the arrays that ``lists`` points to, so that they live until the end.

    Returns:
        ``OK``, or the segment that ends early and that reason.
    """
    columns, group_size = scales.columns, scales.group_size
    rows, groups = scales.values.shape[0], scales.values.shape[1]
    begin = beginning(segments, first)
    for segment in range(first, last):
        data = advance(segments.data, begin)
        length = segments.length_base + np.uint64(segments.lengths[segment])
        begin += length
        left = EIGHT * length
        row = segment * (segments.span // columns)
        weights = min(segments.span, (rows - row) * columns)
        place = row_start = group = np.int64(0)  # where in the segment chunk and row begin
        seen = ZERO
        total, sums = zero[0], zero
        while place < weights:
            limit = min(np.uint64(weights - place), CHUNK)
            left, passed, count = read(segments, entries, lists, data, left, limit, seen)
            if passed < limit:
                return segment * 8 + ENDS_EARLY
            start = np.int64(0)
            while row_start < weights:
                end = row_start + min((group + 1) * group_size, columns) - place
                column = np.uint64(place - row_start)
                run = Run(data, left, seen, row, group, column, start, np.int64(count), end)
                sums, start, seen = visit(run, sums, segments, lists, x)
                if end > np.int64(passed):
                    break
                total = finish(total, sums, scales, row, group)
                sums = zero
                group += 1
                if group == groups:
                    store(out, row, total)
                    total = zero[0]
                    group = np.int64(0)
                    row += 1
                    row_start += columns
            if seen > left and not segments.signed:
                return segment * 8 + ENDS_EARLY
            place += np.int64(passed)
    return OK
