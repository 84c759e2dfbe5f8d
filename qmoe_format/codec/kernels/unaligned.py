"""Unaligned little-endian loads and stores for Numba kernels.

Segments begin at any byte, and positions are appended four at a time with one 8-byte store. Numba
has no way to say "load 4 bytes from here", so these intrinsics emit the LLVM instruction.
None checks bounds: a caller owns at least 8 bytes beyond the last one that it needs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _address(
    context: Any, builder: Any, array_type: Any, array: Any, offset: Any, bits: int
) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    start = builder.bitcast(data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [offset]), ir.IntType(bits).as_pointer())


def _make_load(bits: int) -> Any:
    @intrinsic
    def load(typing_context: Any, array: Any, offset: Any) -> Any:
        """``bits`` bits at byte ``offset`` of ``array``, widened to uint64."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _address(context, builder, signature.args[0], args[0], args[1], bits)
            value = builder.load(pointer)
            value.align = 1
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.uint64(array, types.uint64), generate

    return load


@intrinsic
def store64(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write the 8 bytes of ``value`` at byte ``offset`` of ``array``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1], 64)
        builder.store(args[2], pointer).align = 1
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@intrinsic
def at(typing_context: Any, array: Any, index: Any) -> Any:
    """``array[index]`` without the test for a negative index."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.uint64), generate


load16 = _make_load(16)
load32 = _make_load(32)
load64 = _make_load(64)
