"""y = W x with W in bf16: read once, and multiplied and added up in float32."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.addresses import fetch_add, floats_at, shorts_at, words_at
from qmoe_format.codec.kernels.jit import callback, called, inlined
from qmoe_format.codec.kernels.unaligned import advance, prefetch

# What ``multiply_bf16`` finds at an address, each an int64: parts of the rows taken, and all of
# them; the address of W, bf16 [rows, columns], and its shape; those of x, float32 [columns], and
# y, float32 [rows].
TAKEN, PARTS, WEIGHTS, ROWS, COLUMNS, X, OUT = map(np.uint64, range(7))

_ROWS = 4  # that are multiplied side by side, so that one sum need not wait for the last
_VECTOR = np.uint64(simd.WIDTH)
_LINE, _AHEAD = np.uint64(64), np.uint64(8192)  # bytes: what no processor prefetches by itself


@inlined
def _rest(weights, x, start, columns):
    total = np.float32(0)
    for j in range(start, columns):
        total += simd.from_bf16(weights[j]) * x[j]
    return total


@inlined
def _dot_row(weights, x, columns):
    sums, j = simd.zero_vector(), np.uint64(0)
    while j + _VECTOR <= columns:
        sums = simd.add_times_bf16(sums, weights, j, x, j)
        j += _VECTOR
    return simd.vector_sum(sums) + _rest(weights, x, j, columns)


@inlined
def _dot_four_rows(weights, x, columns, out, row):
    second, third, fourth = columns, np.uint64(2) * columns, np.uint64(3) * columns
    a = b = c = d = simd.zero_vector()
    j, ahead = np.uint64(0), _AHEAD
    while j + _VECTOR <= columns:  # as many bytes as two lines of the cache
        prefetch(weights, ahead)
        prefetch(weights, ahead + _LINE)
        ahead += _LINE + _LINE
        a = simd.add_times_bf16(a, weights, j, x, j)
        b = simd.add_times_bf16(b, weights, second + j, x, j)
        c = simd.add_times_bf16(c, weights, third + j, x, j)
        d = simd.add_times_bf16(d, weights, fourth + j, x, j)
        j += _VECTOR
    out[row] = simd.vector_sum(a) + _rest(weights, x, j, columns)
    out[row + 1] = simd.vector_sum(b) + _rest(advance(weights, second), x, j, columns)
    out[row + 2] = simd.vector_sum(c) + _rest(advance(weights, third), x, j, columns)
    out[row + 3] = simd.vector_sum(d) + _rest(advance(weights, fourth), x, j, columns)


@called
def _multiply_rows(weights, columns, x, out, row, last):
    while row + _ROWS <= last:
        _dot_four_rows(advance(weights, np.uint64(row) * columns), x, columns, out, row)
        row += _ROWS
    while row < last:
        out[row] = _dot_row(advance(weights, np.uint64(row) * columns), x, columns)
        row += 1


@callback
def multiply_bf16(job):
    """All rows."""
    f = words_at(job)
    parts, rows, columns = f[PARTS], f[ROWS], np.uint64(f[COLUMNS])
    part = fetch_add(f, 1)
    while part < parts:
        first, last = rows * part // parts, rows * (part + 1) // parts
        weights, x, out = shorts_at(f[WEIGHTS]), floats_at(f[X]), floats_at(f[OUT])
        _multiply_rows(weights, columns, x, out, first, last)
        part = fetch_add(f, 1)
