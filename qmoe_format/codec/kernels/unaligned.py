"""Pointers for Numba kernels, and unaligned little-endian loads and stores through them.

Segments begin at any byte, and positions are appended four at a time with one 8-byte store. Numba
has no way to say "load 4 bytes from here", so these intrinsics emit the LLVM instruction. None
checks bounds: a caller owns at least 8 bytes beyond the last one that it needs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def pointer(typing_context: Any, array: Any) -> Any:
    """The address of a contiguous array's elements; indices are neither checked nor wrapped.

    Numba counts references to arrays wherever one function hands them to another: atomic additions,
    in inner loops. It counts none to pointers, so somebody else has to keep the array (``keep``).
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def keep(typing_context: Any, array: Any) -> Any:
    """Keep an array until here: Numba frees it after the last statement that mentions it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), generate


@intrinsic
def advance(typing_context: Any, start: Any, count: Any) -> Any:
    """The pointer ``start``, ``count`` elements on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, types.uint64), generate


def _address(builder: Any, start: Any, offset: Any, bits: int) -> Any:
    start = builder.bitcast(start, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [offset]), ir.IntType(bits).as_pointer())


def _make_load(bits: int) -> Any:
    @intrinsic
    def load(typing_context: Any, start: Any, offset: Any) -> Any:
        """``bits`` bits, ``offset`` bytes after the pointer ``start``, widened to uint64."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(_address(builder, *args, bits))
            value.align = 1
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.uint64(start, types.uint64), generate

    return load


load16, load32, load64 = (_make_load(bits) for bits in (16, 32, 64))


@intrinsic
def store64(typing_context: Any, start: Any, offset: Any, value: Any) -> Any:
    """Write the 8 bytes of ``value``, ``offset`` bytes after the pointer ``start``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(builder, *args[:2], 64)).align = 1
        return context.get_dummy_value()

    return types.void(start, types.uint64, types.uint64), generate
