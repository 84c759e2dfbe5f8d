"""Kernels of formats whose decoded matrix is the transpose of what is stored.

They decode a square that fits the fastest cache, then turn it. Decoding and turning are functions
of their own: LLVM vectorizes each, but not both in one.
"""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import kernel

SIDE = 64
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the nibbles of eight columns are."""


@kernel
def _turn(square, first_row, first_column, out):
    """``square[c, r]`` to ``out[first_row + r, first_column + c]``, as far as ``out`` goes."""
    rows = min(square.shape[1], out.shape[0] - first_row)
    columns = min(square.shape[0], out.shape[1] - first_column)
    for r in range(rows):
        target = out[first_row + r, first_column : first_column + columns]
        for c in range(columns):
            target[c] = square[c, r]


@kernel
def _gptq_square(words, bits, groups, zeros, scales, first, column, square):
    mask = np.uint64((1 << bits) - 1)
    last = min(first + SIDE, words.shape[1])
    for i in range(min(SIDE, groups.size - column)):
        bit, g = (column + i) * bits, groups[column + i]
        word, shift = bit >> 5, np.uint64(bit & 31)
        zero, scale = zeros[g, first:last], scales[g, first:last]
        low, target = words[word, first:last], square[i]
        # Whether or not the code goes on in it: with a branch, LLVM would not vectorize.
        high = words[min(word + 1, words.shape[0] - 1), first:last]
        for r in range(low.size):
            both = np.uint64(low[r]) | np.uint64(high[r]) << np.uint64(32)
            target[r] = (np.float32(np.int32(both >> shift & mask)) - zero[r]) * scale[r]


@kernel
def decode_gptq(words, bits, groups, zeros, scales, out):
    """GPTQ: ``words`` uint32 [columns * bits / 32, rows], ``bits`` a weight without gaps.

    ``groups`` int32 [columns]: the row of each in ``zeros`` and ``scales`` [groups, rows].
    """
    square = np.empty((SIDE, SIDE), np.float32)
    for row in range(0, out.shape[0], SIDE):
        for column in range(0, out.shape[1], SIDE):
            _gptq_square(words, bits, groups, zeros, scales, row, column, square)
            _turn(square, row, column, out)


@kernel
def _awq_square(words, group, zeros, scales, first, column, square):
    last = min(first + SIDE // 8, words.shape[1])
    for i in range(min(SIDE, words.shape[0] - column)):
        g = (column + i) // group
        zero, scale = zeros[g, 8 * first : 8 * last], scales[g, 8 * first : 8 * last]
        packed, target = words[column + i, first:last], square[i]
        for w in range(packed.size):
            for k in range(8):
                code = np.int32(packed[w] >> np.uint32(4 * AWQ_ORDER[k]) & np.uint32(15))
                r = 8 * w + k
                target[r] = (np.float32(code) - zero[r]) * scale[r]


@kernel
def decode_awq(words, group, zeros, scales, out):
    """AWQ: ``words`` uint32 [columns, rows / 8]; ``zeros`` and ``scales`` [groups, rows]."""
    square = np.empty((SIDE, SIDE), np.float32)
    for row in range(0, out.shape[0], SIDE):
        for column in range(0, out.shape[1], SIDE):
            _awq_square(words, group, zeros, scales, row // 8, column, square)
            _turn(square, row, column, out)


@kernel
def _nibble_square(codes, values, scales, first, g, square):
    """``codes`` [columns, groups, 16]: 32 weights of a column; ``square`` [columns, 32]."""
    for i in range(min(SIDE, codes.shape[0] - first)):
        coded, scale, target = codes[first + i, g], scales[first + i, g], square[i]
        for k in range(16):
            target[2 * k] = values[coded[k], 0] * scale
            target[2 * k + 1] = values[coded[k], 1] * scale


@kernel
def decode_nibbles_transposed(codes, values, scales, out):
    """gpt-oss: ``codes`` uint8 [columns, groups, 16], two weights a byte; ``values`` [256, 2].

    ``scales`` [columns, groups]; ``out`` [32 * groups, columns].
    """
    square = np.empty((SIDE, 32), np.float32)
    for column in range(0, out.shape[1], SIDE):
        for g in range(codes.shape[1]):
            _nibble_square(codes, values, scales, column, g, square)
            _turn(square, 32 * g, column, out)
