"""Pointers for Numba kernels, and unaligned little-endian loads and stores through them.

Segments begin at any byte, and positions are appended four at a time with one 8-byte store. Numba
has no way to say "load 4 bytes from here". Nothing here checks bounds: a caller owns at least 8
bytes beyond the last one that it needs.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmoe_format.codec.kernels.jit import instruction


@intrinsic
def pointer(typing_context, array):
    """The address of a contiguous array's elements; indices are neither checked nor wrapped.

    Numba counts references to arrays wherever one function hands them to another: atomic additions,
    in inner loops. It counts none to pointers. It frees an array after the last statement that
    mentions it, so that has to come after the last use of the pointer.
    """

    def generate(context, builder, signature, args):
        return context.make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


@instruction(lambda start, count: start(start, types.uint64))
def advance(builder, start, count):
    """The pointer ``start``, ``count`` elements on."""
    return builder.gep(start, [count])


def _address(builder, start, offset, bits):
    start = builder.bitcast(start, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [offset]), ir.IntType(bits).as_pointer())


def _make_load(bits):
    @instruction(lambda start, offset: types.uint64(start, types.uint64))
    def load(builder, start, offset):
        """``bits`` bits, ``offset`` bytes after the pointer ``start``, widened to uint64."""
        value = builder.load(_address(builder, start, offset, bits))
        value.align = 1
        return builder.zext(value, ir.IntType(64)) if bits < 64 else value

    return load


load8, load16, load32, load64 = (_make_load(bits) for bits in (8, 16, 32, 64))


@instruction(lambda start, offset, value: types.void(start, types.uint64, types.uint64))
def store64(builder, start, offset, value):
    """Write the 8 bytes of ``value``, ``offset`` bytes after the pointer ``start``."""
    builder.store(value, _address(builder, start, offset, 64)).align = 1


@instruction(lambda start, offset: types.void(start, types.uint64))
def prefetch(builder, start, offset):
    """Have a line of the cache read; it does not matter whether there is memory."""
    address = _address(builder, start, offset, 8)
    hint = [address, *(ir.IntType(32)(value) for value in (0, 3, 1))]  # to be read, often, as data
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in hint])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(call, hint)
