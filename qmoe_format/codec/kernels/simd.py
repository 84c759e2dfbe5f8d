"""Vectors of 16 float32 for Numba kernels, added to where the bits of a mask are set.

Numba has no vector type, and what LLVM makes of a loop over bits is slow; on AVX-512 each function
here is one or two instructions. Elsewhere LLVM emulates them with what there is.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

WIDTH = 16
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_WORD = ir.IntType(64)


def cpu_has(*features: str) -> bool:
    """Whether kernels are compiled for a processor with all of LLVM's ``features``."""
    available = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return all(f"+{feature}" in available for feature in features)


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("Float32x16")


vector = _Vector()


@register_model(_Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, _VECTOR)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)


def _mask(builder: Any, bits: Any) -> Any:
    kind = ir.VectorType(ir.IntType(1), WIDTH)
    return builder.bitcast(builder.trunc(bits, ir.IntType(WIDTH)), kind)


def _load(builder: Any, element: Any, values: Any, start: Any) -> Any:
    address = builder.bitcast(
        builder.gep(values, [start]), ir.VectorType(element, WIDTH).as_pointer()
    )
    loaded = builder.load(address)
    loaded.align = 2 if element == ir.IntType(16) else 4
    return loaded


@intrinsic
def zero_vector(typing_context: Any) -> Any:
    """Sixteen zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_VECTOR, [0.0] * WIDTH)

    return vector(), generate


@intrinsic
def gather(typing_context: Any, values: Any, base: Any, indices: Any, start: Any, bits: Any) -> Any:
    """``values[base + i]`` for the low 15 bits i of ``indices[start : start + 16]``, uint16.

    Reads only the values whose bit is set, but all sixteen indices; ``base`` may be negative.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, base, indices, start, bits = args
        short = _load(builder, ir.IntType(16), indices, start)
        low = builder.and_(short, ir.Constant(short.type, [0x7FFF] * WIDTH))
        wide = builder.zext(low, ir.VectorType(_WORD, WIDTH))
        # llvmlite has no gep that makes a vector of pointers.
        pointers = builder.gep(builder.gep(values, [base]), [_WORD(0)])
        pointers.indices[0] = wide
        pointers.type = ir.VectorType(values.type, WIDTH)
        mask = _mask(builder, bits)
        kind = ir.FunctionType(_VECTOR, [pointers.type, ir.IntType(32), mask.type, _VECTOR])
        call = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.masked.gather.v{WIDTH}f32.v{WIDTH}p0"
        )
        zeros = ir.Constant(_VECTOR, [0.0] * WIDTH)
        return builder.call(call, [pointers, ir.IntType(32)(4), mask, zeros])

    return vector(values, types.uint64, indices, types.uint64, types.uint64), generate


@intrinsic
def high_bits(typing_context: Any, indices: Any, start: Any) -> Any:
    """The highest bits of ``indices[start : start + 16]``, uint16, as 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        short = _load(builder, ir.IntType(16), *args)
        negative = builder.icmp_signed("<", short, ir.Constant(short.type, [0] * WIDTH))
        return builder.zext(builder.bitcast(negative, ir.IntType(WIDTH)), _WORD)

    return types.uint64(indices, types.uint64), generate


@intrinsic
def add_masked(typing_context: Any, sums: Any, addend: Any, bits: Any) -> Any:
    """``sums``, plus ``addend`` where the bit is set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, addend, bits = args
        return builder.select(_mask(builder, bits), builder.fadd(sums, addend), sums)

    return vector(sums, addend, types.uint64), generate


@intrinsic
def add_loaded(typing_context: Any, sums: Any, values: Any, start: Any, bits: Any) -> Any:
    """``sums``, plus ``values[start : start + 16]`` where the bit is set; reads all sixteen."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, values, start, bits = args
        addend = _load(builder, ir.FloatType(), values, start)
        return builder.select(_mask(builder, bits), builder.fadd(sums, addend), sums)

    return vector(sums, values, types.uint64, types.uint64), generate


@intrinsic
def add_scaled(typing_context: Any, sums: Any, addend: Any, factor: Any) -> Any:
    """``sums + addend * factor``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scaled = builder.fmul(args[1], _splat(builder, args[2]), flags=("contract",))
        return builder.fadd(args[0], scaled, flags=("contract",))

    return vector(sums, addend, types.float32), generate


@intrinsic
def store_vector(typing_context: Any, values: Any, start: Any, sums: Any) -> Any:
    """``values[start : start + 16] = sums``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, start, sums = args
        address = builder.bitcast(builder.gep(values, [start]), _VECTOR.as_pointer())
        builder.store(sums, address).align = 4
        return context.get_dummy_value()

    return types.void(values, types.uint64, sums), generate


@intrinsic
def vector_sum(typing_context: Any, sums: Any) -> Any:
    """The sum of all sixteen elements, float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _VECTOR])
        reduce = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        )
        zero = ir.Constant(ir.FloatType(), 0.0)
        return builder.call(reduce, [zero, args[0]], fastmath=("reassoc",))

    return types.float32(sums), generate


@intrinsic
def as_float32(typing_context: Any, scale: Any) -> Any:
    """A scale as stored: float32, or the bits of a bf16 as uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if scale == types.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(scale), generate


@intrinsic
def popcount(typing_context: Any, word: Any) -> Any:
    """How many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def deposit(typing_context: Any, bits: Any, mask: Any) -> Any:
    """The lowest of ``bits``, one after another, where ``mask`` has ones; needs x86's BMI2."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD, _WORD])
        pdep = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.bmi.pdep.64")
        return builder.call(pdep, args)

    return types.uint64(types.uint64, types.uint64), generate
