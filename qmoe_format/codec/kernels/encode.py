"""The kernel that encodes: levels to segments."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import kernel
from qmoe_format.codec.kernels.scan import EIGHT, ONE, SEVEN, THREE
from qmoe_format.codec.kernels.unaligned import load64, pointer, store64


@kernel
def encode_segments(first, last, levels, span, tree, out, lengths, totals):
    """Write segments one after another; return the bytes written.

    Args:
        levels: int8, flat; ``span`` of them in a segment, perhaps fewer in the last one.
        tree: width, whether codewords contain the signs, children and codewords as in ``Tables``.
        out: uint8, zeroed, large enough.
        lengths, totals: int64, receive the bytes and the non-zeros of each segment.
    """
    width, signed, inner, codewords = tree
    children, out = pointer(inner), pointer(out)
    codes = np.empty(span + 1, np.uint16)
    written = np.int64(0)
    for segment in range(first, last):
        weights = levels[segment * span : (segment + 1) * span]
        count = np.int64(0)
        node = np.int64(0)
        signs = np.uint64(0)  # of the current entry, if they are part of the codeword
        in_entry = np.uint64(0)
        word = np.uint64(0)  # of sign bits, not yet written
        seen = np.uint64(0)
        for level in weights:
            if level != 0:
                negative = np.uint64(level < 0)
                signs |= negative << in_entry
                in_entry += ONE
                word |= negative << (seen & np.uint64(63))
                seen += ONE
                if not signed and seen & np.uint64(63) == 0:
                    store64(out, np.uint64(written) + (seen >> THREE) - EIGHT, word)
                    word = np.uint64(0)
            node = np.int64(children[2 * node + (level != 0)])
            if node < 0:
                code = codewords[~node]
                codes[count] = code + np.uint16(signs) if signed else code
                count += 1
                node = 0
                signs = in_entry = np.uint64(0)
        if node != 0:  # the segment ends within an entry: finish it with zeros [E-11]
            while node >= 0:
                node = np.int64(children[2 * node])
            code = codewords[~node]
            codes[count] = code + np.uint16(signs) if signed else code
            count += 1
        sign_bits = np.int64(0) if signed else np.int64(seen)
        if sign_bits & 63:
            store64(out, np.uint64(written) + (seen >> np.uint64(6)) * EIGHT, word)
        length = (count * width + sign_bits + 7) // 8
        bit = np.uint64(8 * (written + length))
        for i in range(count):
            bit -= np.uint64(width)
            byte = bit >> np.uint64(3)
            store64(out, byte, load64(out, byte) | (np.uint64(codes[i]) << (bit & SEVEN)))
        lengths[segment] = length
        totals[segment] = np.int64(seen)
        written += length
    return written
