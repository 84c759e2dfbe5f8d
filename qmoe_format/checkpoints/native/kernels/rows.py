"""Kernels of formats whose codes lie in the order of the decoded weights."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import kernel


@kernel
def decode_bytes(codes, values, zeros, scales, height, width, out):
    """A byte a weight: ``codes`` uint8 [rows, columns], each one of the 256 ``values``.

    ``zeros`` and ``scales`` [blocks of ``height`` rows, blocks of ``width`` columns].
    """
    columns = out.shape[1]
    for row in range(out.shape[0]):
        for block in range(scales.shape[1]):
            zero, scale = zeros[row // height, block], scales[row // height, block]
            first, last = block * width, min((block + 1) * width, columns)
            coded, target = codes[row, first:last], out[row, first:last]
            for i in range(coded.size):
                target[i] = (values[coded[i]] - zero) * scale


@kernel
def decode_nibbles(codes, values, zeros, scales, group, out):
    """Two weights a byte, the first in its low half: ``codes`` uint8 [rows, columns / 2].

    ``values`` [256, 2]; ``zeros`` and ``scales`` [rows, groups of ``group``, even, columns].
    """
    half = group // 2
    for row in range(out.shape[0]):
        for g in range(scales.shape[1]):
            zero, scale = zeros[row, g], scales[row, g]
            coded = codes[row, g * half : (g + 1) * half]
            target = out[row, g * group : (g + 1) * group]
            for i in range(target.size // 2):
                target[2 * i] = (values[coded[i], 0] - zero) * scale
                target[2 * i + 1] = (values[coded[i], 1] - zero) * scale


@kernel
def decode_bits(words, bits, groups, zeros, scales, out):
    """``bits`` a weight, 1 to 8, without gaps from the lowest bit of each row's first word on.

    ``words`` uint32 [rows, words]; ``groups`` int32 [columns]: the column of each in ``zeros`` and
    ``scales`` [rows, groups].
    """
    mask = np.uint32((1 << bits) - 1)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            word, shift = column * bits >> 5, column * bits & 31
            code = words[row, word] >> np.uint32(shift)
            if shift + bits > 32:
                code |= words[row, word + 1] << np.uint32(32 - shift)
            g, code = groups[column], np.int32(code & mask)
            out[row, column] = (np.float32(code) - zeros[row, g]) * scales[row, g]
