"""Kernels that encode: levels to the segments of the mask, and to those of the refinement."""

from __future__ import annotations

import numpy as np

from qmoe_format.codec.kernels.jit import inlined, kernel
from qmoe_format.codec.kernels.scan import EIGHT, ONE, SEVEN, THREE
from qmoe_format.codec.kernels.unaligned import load64, pointer, store64

LAST = np.uint64(63)


@inlined
def _append(children, codes, count, node, bit):
    """The next bit of a string: count of codewords, and node of the tree, after it."""
    node = np.int64(children[2 * node + bit])
    if node < 0:
        codes[count] = ~node
        return count + 1, np.int64(0)
    return count, node


@inlined
def _finish(children, codes, count, node, width, signs, out, written):
    """Write the codewords of a segment, above its ``signs`` bits; return its bytes."""
    if node != 0:  # the string ends within an entry: finish it with zeros [E-11]
        while node >= 0:
            node = np.int64(children[2 * node])
        codes[count] = ~node
        count += 1
    length = (count * width + signs + 7) // 8
    bit = np.uint64(8 * (written + length))
    for i in range(count):
        bit -= np.uint64(width)
        byte = bit >> THREE
        store64(out, byte, load64(out, byte) | (np.uint64(codes[i]) << (bit & SEVEN)))
    return length


@kernel
def encode_masks(first, last, levels, span, tree, out, lengths, totals):
    """Write segments one after another; return the bytes written.

    Args:
        levels: int8, flat; ``span`` of them in a segment, perhaps fewer in the last one.
        tree: width, and children as in ``Tables``.
        out: uint8, zeroed, large enough.
        lengths, totals: int64, receive the bytes and the ones of each segment.
    """
    width, inner = tree
    children, out = pointer(inner), pointer(out)
    codes = np.empty(span + 1, np.uint16)
    written = np.int64(0)
    for segment in range(first, last):
        count = node = np.int64(0)
        word = seen = np.uint64(0)  # sign bits that are not yet written, and all
        for level in levels[segment * span : (segment + 1) * span]:
            if level != 0:
                word |= np.uint64(level < 0) << (seen & LAST)
                seen += ONE
                if seen & LAST == 0:
                    store64(out, np.uint64(written) + (seen >> THREE) - EIGHT, word)
                    word = np.uint64(0)
            count, node = _append(children, codes, count, node, np.int64(level != 0))
        if seen & LAST:
            store64(out, np.uint64(written) + (seen >> np.uint64(6)) * EIGHT, word)
        length = _finish(children, codes, count, node, width, np.int64(seen), out, written)
        lengths[segment] = length
        totals[segment] = np.int64(seen)
        written += length
    return written


@kernel
def encode_refinements(first, last, levels, span, tree, out, lengths, totals):
    """``encode_masks`` of the other string: |q| - 1 ones and a zero for each non-zero."""
    width, inner = tree
    children, out = pointer(inner), pointer(out)
    written = np.int64(0)
    codes = np.empty(0, np.uint16)
    for segment in range(first, last):
        weights = levels[segment * span : (segment + 1) * span]
        bits = nonzeros = np.int64(0)
        for level in weights:
            bits += abs(np.int64(level))
            nonzeros += level != 0
        if bits >= codes.size:
            codes = np.empty(2 * bits + 1, np.uint16)
        count = node = np.int64(0)
        for level in weights:
            for _ in range(abs(np.int64(level)) - 1):
                count, node = _append(children, codes, count, node, 1)
            if level != 0:
                count, node = _append(children, codes, count, node, 0)
        length = _finish(children, codes, count, node, width, 0, out, written)
        lengths[segment] = length
        totals[segment] = bits - nonzeros
        written += length
    return written
