"""x to int8, in blocks with a unit of their own, as llama.cpp does."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, uint32

from qmoe_format.codec.kernels.jit import inlined, instruction, kernel

BLOCK = 256  # columns
_LARGEST, _NAN = np.float32(127), np.float32(np.nan)
_LEAST = np.finfo(np.float32).tiny  # a unit that is less has no inverse
_INFINITE = np.uint32(0x7F80_0000)


@instruction(lambda *_: uint32(uint32, float32))
def _larger(builder, magnitude, value):
    """The larger one of two magnitudes, as the bits of float32: loops over integers become vectors,
    those over floats, among which NaN has no order, do not."""
    bits = builder.and_(builder.bitcast(value, magnitude.type), magnitude.type(0x7FFF_FFFF))
    return builder.select(builder.icmp_unsigned(">", bits, magnitude), bits, magnitude)


@instruction(lambda _: float32(uint32))
def _as_float(builder, bits):
    return builder.bitcast(bits, ir.FloatType())


@inlined
def round_block(values, start, count, rounded, target):
    """Round ``values`` from ``start`` on to int8 times a unit, which is returned with their sum.

    ``rounded`` receives a whole block from ``target`` on, zeros after ``count``, and ``values``
    what they stand for. What is NaN or infinite makes the unit, and so all sums with it, NaN;
    blocks of less than 1e-36 become 0.
    """
    largest = np.uint32(0)
    for j in range(start, start + count):
        largest = _larger(largest, values[j])
    unit = _as_float(largest) / _LARGEST if largest < _INFINITE else _NAN
    inverse = np.float32(1) / unit if unit >= _LEAST else np.float32(0)
    total = 0
    for j in range(count):
        level = np.int32(np.rint(values[start + j] * inverse))
        rounded[target + j] = level
        values[start + j] = np.float32(level) * unit
        total += level
    for j in range(count, BLOCK):
        rounded[target + j] = 0
    return unit, total


@kernel
def round_tokens(values, columns, rounded, units):
    """Round all of x.

    Args:
        values: float32 [tokens, columns or more]; receives what is left of it.
        rounded: int8 [tokens, blocks * BLOCK], contiguous.
        units: float32 [tokens, blocks].
    """
    for token in range(len(values)):
        for block in range(units.shape[1]):
            start = block * BLOCK
            count = min(BLOCK, columns - start)
            units[token, block], _ = round_block(values[token], start, count, rounded[token], start)
