"""Gate, up, activation and down of some experts, in packed matrices, as one kernel."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, types

from qmoe_format.codec.kernels.addresses import fetch, fetch_add, floats_at, words_at
from qmoe_format.codec.kernels.jit import callback, inlined, instruction
from qmoe_format.codec.kernels.packed import (
    COUNT,
    DONE,
    PARTS,
    TABLE,
    TAKEN,
    multiply_parts,
    round_products,
)
from qmoe_format.codec.kernels.unaligned import advance

# What ``multiply_gated`` finds after the numbers that ``multiply_all`` finds, which are of gate and
# up: whether the products with down can begin, of these the parts taken and done, their table and
# its rows; the addresses of gate and up times x, float32 [experts, 2, inner], and of
# silu(gate) * up, float32 [experts, inner]; and inner.
READY, DOWN_TAKEN, DOWN_DONE, DOWN_TABLE, EXPERTS, GATES, HIDDEN, INNER = map(
    np.uint64, range(5, 13)
)

# exp(t) = 2^n exp(r) with |r| <= ln 2 / 2: ln 2 in two parts, so that r is exact, and what the
# terms of exp's series are divided by.
_LOG2_E, _LN2_HIGH, _LN2_LOW = map(np.float32, (1.44269504, 0.693359375, -2.12194440e-4))
_FIRST, *_FACTORIALS = (np.float32(1 / n) for n in (5040, 720, 120, 24, 6, 2, 1, 1))
_EXP = tuple(_FACTORIALS)
_LEAST, _MOST = np.float32(-87), np.float32(88)


@instruction(lambda *_: float32(types.int32))
def _power_of_two(builder, exponent):
    """2 to a power of -126 to 127."""
    word = exponent.type
    bits = builder.shl(builder.add(exponent, word(127)), word(23))
    return builder.bitcast(bits, ir.FloatType())


@inlined
def _silu(x):
    """x / (1 + exp(-x)), without calls and branches, so that loops become vectors."""
    t = min(max(-x, _LEAST), _MOST)
    n = np.rint(t * _LOG2_E)
    r = (t - n * _LN2_HIGH) - n * _LN2_LOW
    exp = _FIRST
    for term in _EXP:
        exp = exp * r + term
    return x / (np.float32(1) + exp * _power_of_two(np.int32(n)))


@inlined
def _gate(gates, hidden, experts, inner):
    for expert in range(experts):
        gate = advance(gates, np.uint64(2 * expert * inner))
        up, out = advance(gate, np.uint64(inner)), advance(hidden, np.uint64(expert * inner))
        for i in range(inner):
            out[i] = _silu(gate[i]) * up[i]


@callback
def multiply_gated(job):
    """down(silu(gate x) * up x), of x as ``round_all`` left it for gate and up.

    Whoever finishes the last part of these prepares the products with down for all others, which
    wait: that takes less time than to wake them.
    """
    f = words_at(job)
    ready, down, experts = advance(f, READY), words_at(f[DOWN_TABLE]), f[EXPERTS]
    if multiply_parts(advance(f, TAKEN), advance(f, DONE), f[PARTS], words_at(f[TABLE]), f[COUNT]):
        _gate(floats_at(f[GATES]), floats_at(f[HIDDEN]), experts, f[INNER])
        round_products(down, experts)
        fetch_add(ready, 1)
    while fetch(ready) == 0:
        pass
    multiply_parts(advance(f, DOWN_TAKEN), advance(f, DOWN_DONE), f[PARTS], down, experts)
