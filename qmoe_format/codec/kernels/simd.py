"""Vectors of 16 float32 for Numba kernels, added to where the bits of a mask say so.

Numba has no vectors of its own, and what LLVM makes of a loop over bits is slow; on AVX-512 each
call here is one or two instructions. Elsewhere LLVM takes what there is.
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


def has_avx512() -> bool:
    """Whether kernels are compiled for a processor with AVX-512 (and BMI2, as all of them)."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return "+avx512f" in features and "+bmi2" in features


class Lanes(types.Type):  # type: ignore[misc]
    """The type of such a vector."""

    def __init__(self) -> None:
        super().__init__("Lanes")


lanes = Lanes()


@register_model(Lanes)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, _VECTOR)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)


@intrinsic
def zero_lanes(typing_context: Any) -> Any:
    """Sixteen zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_VECTOR, [0.0] * WIDTH)

    return lanes(), generate


@intrinsic
def gather(typing_context: Any, values: Any, base: Any, indices: Any, start: Any, bits: Any) -> Any:
    """``values[base + i]`` for the low 15 bits i of ``indices[start : start + 16]``, uint16.

    Only where ``bits`` say so, though all sixteen indices are read; ``base`` may be before the
    array.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, base, indices, start, bits = args
        data = context.make_array(signature.args[0])(context, builder, values).data
        short = _load_short(context, builder, signature.args[2], indices, start)
        low = builder.and_(short, ir.Constant(short.type, [0x7FFF] * WIDTH))
        wide = builder.zext(low, ir.VectorType(_WORD, WIDTH))
        # llvmlite lets a vector of pointers be made only by hand.
        pointers = builder.gep(builder.gep(data, [base]), [_WORD(0)])
        pointers.indices[0] = wide
        pointers.type = ir.VectorType(data.type, WIDTH)
        mask = _mask(builder, bits)
        kind = ir.FunctionType(_VECTOR, [pointers.type, ir.IntType(32), mask.type, _VECTOR])
        call = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.masked.gather.v{WIDTH}f32.v{WIDTH}p0"
        )
        zeros = ir.Constant(_VECTOR, [0.0] * WIDTH)
        return builder.call(call, [pointers, ir.IntType(32)(4), mask, zeros])

    return lanes(values, types.uint64, indices, types.uint64, types.uint64), generate


@intrinsic
def high_bits(typing_context: Any, indices: Any, start: Any) -> Any:
    """The highest bits of ``indices[start : start + 16]``, uint16, as 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        short = _load_short(context, builder, signature.args[0], args[0], args[1])
        negative = builder.icmp_signed("<", short, ir.Constant(short.type, [0] * WIDTH))
        return builder.zext(builder.bitcast(negative, ir.IntType(WIDTH)), _WORD)

    return types.uint64(indices, types.uint64), generate


def _load_short(context: Any, builder: Any, array_type: Any, array: Any, start: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    vector = ir.VectorType(ir.IntType(16), WIDTH)
    loaded = builder.load(builder.bitcast(builder.gep(data, [start]), vector.as_pointer()))
    loaded.align = 2
    return loaded


def _mask(builder: Any, bits: Any) -> Any:
    return builder.bitcast(
        builder.trunc(bits, ir.IntType(WIDTH)), ir.VectorType(ir.IntType(1), WIDTH)
    )


@intrinsic
def add_lanes(typing_context: Any, sums: Any, others: Any, bits: Any) -> Any:
    """``sums`` plus ``others`` in the lanes whose bit is set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(_mask(builder, args[2]), builder.fadd(args[0], args[1]), args[0])

    return lanes(sums, others, types.uint64), generate


@intrinsic
def add_where(typing_context: Any, sums: Any, bits: Any, values: Any, start: Any) -> Any:
    """``sums`` plus ``values[start : start + 16]`` in the lanes whose bit of ``bits`` is set.

    All sixteen values are read, whatever the bits.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[2])(context, builder, args[2]).data
        source = builder.load(builder.bitcast(builder.gep(data, [args[3]]), _VECTOR.as_pointer()))
        source.align = 4
        return builder.select(_mask(builder, args[1]), builder.fadd(args[0], source), args[0])

    return lanes(sums, types.uint64, values, types.uint64), generate


@intrinsic
def add_scaled(typing_context: Any, sums: Any, others: Any, factor: Any) -> Any:
    """``sums + others * factor``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(args[1], _splat(builder, args[2]), flags=("contract",))
        return builder.fadd(args[0], product, flags=("contract",))

    return lanes(sums, others, types.float32), generate


@intrinsic
def store_lanes(typing_context: Any, array: Any, start: Any, sums: Any) -> Any:
    """``array[start : start + 16] = sums``, flat."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        target = builder.bitcast(builder.gep(data, [args[1]]), _VECTOR.as_pointer())
        builder.store(args[2], target).align = 4
        return context.get_dummy_value()

    return types.void(array, types.uint64, sums), generate


@intrinsic
def lane_sum(typing_context: Any, sums: Any) -> Any:
    """All sixteen together, float32."""

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
def ones(typing_context: Any, word: Any) -> Any:
    """How many bits of a uint64 are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def deposit(typing_context: Any, bits: Any, mask: Any) -> Any:
    """The lowest of ``bits``, one after the other, at the places where ``mask`` has ones.

    An instruction of x86 (BMI2).
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD, _WORD])
        pdep = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.bmi.pdep.64")
        return builder.call(pdep, args)

    return types.uint64(types.uint64, types.uint64), generate
