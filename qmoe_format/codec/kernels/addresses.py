"""What kernels are told by addresses: pointers, and numbers that threads share."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from qmoe_format.codec.kernels.jit import instruction


@instruction(lambda *_: types.int64(types.CPointer(types.int64), types.int64))
def fetch_add(builder, counter, addend):
    """Add to a number that other threads add to as well, and return what it was.

    What a thread wrote before it can be read by those that add later.
    """
    return builder.atomic_rmw("add", counter, addend, "acq_rel")


@instruction(lambda *_: types.int64(types.CPointer(types.int64)))
def fetch(builder, counter):
    """What a number is that other threads add to; what they wrote before can be read."""
    return builder.load_atomic(counter, "acquire", 8)


def _make_at(kind):
    @instruction(lambda _: types.CPointer(kind)(types.int64))
    def at(builder, address):
        """A pointer to what lies at an address."""
        bits = {types.float32: ir.FloatType()}.get(kind) or ir.IntType(kind.bitwidth)
        return builder.inttoptr(address, bits.as_pointer())

    return at


floats_at, bytes_at, codes_at, shorts_at, words_at = map(
    _make_at, (types.float32, types.int8, types.uint8, types.uint16, types.int64)
)
