"""Kernels that multiply: segments times vectors, without decoding to weights.

``dot_sparse`` takes a step for each non-zero: a gather of x. Where zeros are few there is a faster
kernel for one token and ternary matrices, ``dot_dense``, which takes the same time for each weight:
x is added under masks of sixteen bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.cursor import for_each_run
from qmoe_format.codec.kernels.expansion import (
    BLOCK,
    ROOM,
    as_patterns,
    for_each_part,
    last_negatives,
    negatives,
    ones_at,
)
from qmoe_format.codec.kernels.jit import called, inlined, keep_apart, kernel, optional
from qmoe_format.codec.kernels.refinement import as_refinement, magnitudes_of
from qmoe_format.codec.kernels.scales import low_high
from qmoe_format.codec.kernels.scan import (
    LIST_LENGTH,
    ONE,
    SEVEN,
    THREE,
    TWO,
    ZERO,
    as_entries,
    as_segments,
    find_levels,
    find_positions,
    first_at,
)
from qmoe_format.codec.kernels.unaligned import advance, load64, pointer

# The share of zeros up to which dot_dense is faster (benchmarks/crossings.py). AVX-512 adds under
# masks.
DENSE_UNTIL = 0.0 if not simd.DEPOSITS else 0.81 if simd.cpu_has("avx512f") else 0.54
BEYOND_X = int(BLOCK)  # elements of x that may be read behind its last one

SIXTEEN, THIRTY_TWO, WORD = (np.uint64(n) for n in (16, 32, 64))
_SIXTEEN_ONES = np.uint64(0xFFFF)


@inlined
def _zero_two():
    return simd.zero_vector(), simd.zero_vector()


@inlined
def _zero_four():
    return simd.zero_vector(), simd.zero_vector(), simd.zero_vector(), simd.zero_vector()


@inlined
def _sum_two(sums, scales, row):
    plus, minus = sums
    low, high = low_high(scales, row)
    return simd.add_scaled(simd.add_scaled(simd.zero_vector(), plus, high), minus, low)


@inlined
def _sum_four(sums, scales, row):
    plus_a, plus_b, minus_a, minus_b = sums
    low, high = low_high(scales, row)
    total = _sum_two((plus_a, minus_a), scales, row)
    return simd.add_scaled(simd.add_scaled(total, plus_b, high), minus_b, low)


@inlined
def _store_two(out, row, sums, scales):
    out[row] = simd.vector_sum(_sum_two(sums, scales, row))


class Factors(NamedTuple):
    """What parts of rows are multiplied by, and where sums go."""

    scales: Any  # bf16 [rows, 1 or 2]
    x: Any  # pointer to float32 [columns + ``BEYOND_X``]
    out: Any  # float32 [rows]


@inlined
def _add_word(sums, x, at, ones, negatives):
    plus_a, plus_b, minus_a, minus_b = sums
    positives = ones ^ negatives
    for _ in range(2):
        plus_a = simd.add_loaded(plus_a, x, at, positives)
        minus_a = simd.add_loaded(minus_a, x, at, negatives)
        plus_b = simd.add_loaded(plus_b, x, at + SIXTEEN, positives >> SIXTEEN)
        minus_b = simd.add_loaded(minus_b, x, at + SIXTEEN, negatives >> SIXTEEN)
        positives >>= THIRTY_TWO
        negatives >>= THIRTY_TWO
        at += THIRTY_TWO
    return plus_a, plus_b, minus_a, minus_b


@inlined
def _add_block(sums, part, x, at, words):
    for word in words:
        sums = _add_word(sums, x, at, ones_at(part.codes, at), word)
        at += WORD
    return sums, at


@called
def _add_part(part, seen, factors):
    keep_apart()
    sums, x, at = _zero_four(), advance(factors.x, part.column), ZERO
    while at + BLOCK <= part.columns and seen + BLOCK <= part.end:
        words, seen = negatives(part, at, seen)
        sums, at = _add_block(sums, part, x, at, words)
    while at < part.columns:
        words, seen = last_negatives(part, at, seen)
        sums, at = _add_block(sums, part, x, at, words)
    before = factors.out[part.row] if part.column > 0 else np.float32(0)
    total = _sum_four(sums, factors.scales, part.row)
    factors.out[part.row] = before + simd.vector_sum(total)
    return seen


@kernel
def dot_dense(first, last, span, mask, entries, patterns, scales, x, out):
    """Multiply ternary rows with one token: an addition for every 16 weights.

    Args:
        x: float32 [columns + ``BEYOND_X``], contiguous; zeros beyond the columns.
        out: float32 [rows].
    """
    room = np.zeros(ROOM, np.uint8)
    return for_each_part(
        _add_part, first, last, span, as_segments(*mask), as_patterns(entries, patterns),
        len(scales), x.size - BEYOND_X, room, Factors(scales, pointer(x), out),
    )  # fmt: skip


@inlined
def _add_gathered(run, sums, lists, x):
    found, magnitudes = lists
    start, stop = run.start, first_at(found, run.start, run.count, run.end)
    sign = run.seen - np.uint64(start)
    whole = stop - (stop - start) % 16
    while start < whole:
        some = simd.gather(x, run.column, found, np.uint64(start))
        sums = _add_some(run, sums, some, magnitudes, sign + np.uint64(start), _SIXTEEN_ONES)
        start += 16
    if start < stop:
        these = (ONE << np.uint64(stop - start)) - ONE
        some = simd.gather_some(x, run.column, found, np.uint64(start), these)
        sums = _add_some(run, sums, some, magnitudes, sign + np.uint64(start), these)
    return sums, stop, sign + np.uint64(stop)


@inlined
def _add_some(run, sums, some, magnitudes, sign, these):
    plus, minus = sums
    negatives = (load64(run.data, sign >> THREE) >> (sign & SEVEN)) & these
    some = _times(magnitudes, some, sign)
    plus = simd.add_masked(plus, some, these ^ negatives)
    return plus, simd.add_masked(minus, some, negatives)


@optional(lambda magnitudes, some, start: some)
def _times(magnitudes, some, start):
    return simd.multiply_bytes(some, magnitudes, start)


@kernel
def dot_sparse(first, last, span, mask, entries, refinement, scales, x, out):
    """``dot_dense`` for any rows: a gather of ``x`` at the non-zeros, sixteen at a time."""
    found = np.empty(LIST_LENGTH, np.uint16)
    refinement = as_refinement(refinement, span)
    return for_each_run(
        find_positions, _add_gathered, _store_two, _zero_two(), first, last, span,
        as_segments(*mask), as_entries(*entries), refinement, x.size - BEYOND_X, scales,
        (pointer(found), magnitudes_of(refinement)), pointer(x), out, found,
    )  # fmt: skip


@inlined
def _add_tokens(plus, minus, lists, j, column, x):
    found, levels, magnitudes = lists
    source = (column + np.uint64(found[j])) * SIXTEEN
    return _add_level(magnitudes, plus, minus, x, source, levels[j])


def _add_sign(magnitudes, plus, minus, x, source, sign):
    negative = np.uint64(sign >> 7)  # all ones, or none
    plus = simd.add_loaded(plus, x, source, ~negative)
    return plus, simd.add_loaded(minus, x, source, negative)


@optional(_add_sign)
def _add_level(magnitudes, plus, minus, x, source, level):
    tokens = simd.load_vector(x, source)
    plus = simd.add_scaled(plus, tokens, np.float32(max(level, 0)))
    return plus, simd.add_scaled(minus, tokens, np.float32(max(-level, 0)))


@inlined
def _add_tile(run, sums, lists, x):
    plus_a, plus_b, minus_a, minus_b = sums
    column = run.column
    j, stop = np.uint64(run.start), np.uint64(first_at(lists[0], run.start, run.count, run.end))
    seen = run.seen + stop - j
    pairs = stop - (stop - j) % TWO
    while j < pairs:
        plus_a, minus_a = _add_tokens(plus_a, minus_a, lists, j, column, x)
        plus_b, minus_b = _add_tokens(plus_b, minus_b, lists, j + ONE, column, x)
        j += TWO
    if j < stop:
        plus_a, minus_a = _add_tokens(plus_a, minus_a, lists, j, column, x)
    return (plus_a, plus_b, minus_a, minus_b), np.int64(stop), seen


@inlined
def _store_tile(out, row, sums, scales):
    simd.store_vector(out, np.uint64(row) * SIXTEEN, _sum_four(sums, scales, row))


@kernel
def dot_tile(first, last, span, mask, entries, refinement, scales, x, out):
    """Multiply rows with sixteen tokens, one per element of a vector.

    Args:
        x: float32 [columns, 16], contiguous.
        out: float32 [rows, 16], contiguous.
    """
    found, levels = np.empty(LIST_LENGTH, np.uint16), np.empty(LIST_LENGTH, np.int8)
    refinement = as_refinement(refinement, span)
    lists = pointer(found), pointer(levels), magnitudes_of(refinement)
    return for_each_run(
        find_levels, _add_tile, _store_tile, _zero_four(), first, last, span, as_segments(*mask),
        as_entries(*entries), refinement, len(x), scales, lists, pointer(x), pointer(out),
        (found, levels),
    )  # fmt: skip
