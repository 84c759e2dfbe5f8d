"""Products of stored matrices with x rounded to int8 (``rounding``), where zeros are not too many.

The second stage after ``expansion``: bytes of 0 or 1, times x with the signs of the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.byte_dot import add_scaled_sums, dot_bytes, dot_signed
from qmoe_format.codec.kernels.expansion import (
    BLOCK,
    ROOM,
    SLAB,
    as_patterns,
    for_each_part,
    last_negatives,
    negatives,
)
from qmoe_format.codec.kernels.jit import called, inlined, keep_apart, kernel, optional
from qmoe_format.codec.kernels.scales import low_high
from qmoe_format.codec.kernels.scan import OK, ONE, THREE, TWO, ZERO, as_segments
from qmoe_format.codec.kernels.unaligned import advance, pointer

# The share of zeros up to which this is faster than ``dot_sparse``, for one token and for several,
# which share what is expanded (benchmarks/crossings.py). Without AVX-512, entries of more than 26
# bits take longer.
DENSE_UNTIL = (0.0, 0.0)
if simd.DEPOSITS:
    DENSE_UNTIL = (0.92, 0.94) if simd.cpu_has("avx512bw") else (0.82, 0.93)

_FOUR, _HALF = np.uint64(4), np.float32(0.5)


class Factors(NamedTuple):
    """What parts of rows are multiplied by, and where sums go."""

    scales: Any  # bf16 [rows, 1 or 2]
    x: Any  # pointer to int8 [tokens, blocks, BLOCK]
    units: Any  # pointer to float32 [tokens, blocks]
    tokens: Any
    blocks: Any
    kept: Any  # pointer to uint64 [SLAB / 64]
    out: Any  # float32 [tokens, rows]


@inlined
def _add_block(total, part, at, x, words, unit):
    sums = dot_signed(part.codes, at, x, at, words[0], words[1], words[2], words[3])
    return add_scaled_sums(total, sums, unit)


@optional(lambda kept, block, words: None)
def _keep(kept, block, words):
    place = _FOUR * block
    for k in range(4):
        kept[place + np.uint64(k)] = words[k]


@called
def _sum_levels(part, seen, x, units, kept):
    """Levels times x, and ``seen`` after them; which are negative goes to ``kept`` or, if that is
    None, nowhere."""
    keep_apart()
    total, at, block = simd.zero_vector(), ZERO, ZERO
    while at + BLOCK <= part.columns and seen + BLOCK <= part.end:
        words, seen = negatives(part, at, seen)
        _keep(kept, block, words)
        total = _add_block(total, part, at, x, words, units[block])
        at += BLOCK
        block += ONE
    while at < part.columns:
        words, seen = last_negatives(part, at, seen)
        _keep(kept, block, words)
        total = _add_block(total, part, at, x, words, units[block])
        at += BLOCK
        block += ONE
    return simd.vector_sum(total), seen


@called
def _sum_again(part, x, units, kept):
    """``_sum_levels`` of another token."""
    keep_apart()
    total, at, block = simd.zero_vector(), ZERO, ZERO
    while at < part.columns:
        k = _FOUR * block
        words = kept[k], kept[k + ONE], kept[k + TWO], kept[k + THREE]
        total = _add_block(total, part, at, x, words, units[block])
        at += BLOCK
        block += ONE
    return simd.vector_sum(total)


@inlined
def _sum_magnitudes(part, x, units):
    total, at, block = simd.zero_vector(), ZERO, ZERO
    while at < part.columns:
        total = add_scaled_sums(total, dot_bytes(part.codes, at, x, at), units[block])
        at += BLOCK
        block += ONE
    return simd.vector_sum(total)


@inlined
def _multiply_part(part, seen, factors):
    first, blocks = part.column // BLOCK, np.uint64(factors.blocks)
    low, high = low_high(factors.scales, part.row)
    for token in range(factors.tokens):
        place = np.uint64(token) * blocks + first
        x, units = advance(factors.x, place * BLOCK), advance(factors.units, place)
        if factors.tokens == 1:
            levels, seen = _sum_levels(part, seen, x, units, None)
        elif token == 0:
            levels, seen = _sum_levels(part, seen, x, units, factors.kept)
        else:
            levels = _sum_again(part, x, units, factors.kept)
        value = levels * (high - low) * _HALF
        if low != -high:
            value += _sum_magnitudes(part, x, units) * (high + low) * _HALF
        earlier = factors.out[token, part.row] if part.column > ZERO else np.float32(0)
        factors.out[token, part.row] = earlier + value
    return seen


@kernel
def dot_rounded(first, last, span, mask, entries, patterns, columns, scales, x, units, out):
    """Multiply ternary rows with some tokens.

    Args:
        columns: of the matrix, at least 1.
        scales: bf16 [rows, 1 or 2].
        x: int8 [tokens, blocks * BLOCK], contiguous, zeros beyond the columns.
        units: float32 [tokens, blocks], contiguous.
        out: float32 [tokens, rows].
    """
    room, kept = np.zeros(ROOM, np.uint8), np.empty(SLAB // 64, np.uint64)
    tokens, blocks = units.shape
    factors = Factors(scales, pointer(x), pointer(units), tokens, blocks, pointer(kept), out)
    status = for_each_part(
        _multiply_part, first, last, span, as_segments(*mask), as_patterns(entries, patterns),
        len(scales), columns, room, factors,
    )  # fmt: skip
    return status if kept.size else OK  # ``pointer`` says why kept is mentioned
