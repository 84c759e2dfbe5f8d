"""Vectors of 32 float32 for Numba kernels: a row of a matrix in each lane, or 32 columns of a row.

A processor's vectors have 4 to 16 lanes, and LLVM takes as many of them as it needs. Rounding is a
long chain of instructions that wait for each other; with 32 lanes there are two chains at least.

Vectors have the operators +, -, * and /, with each other and with a float32.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import float32, int64, types, uint64, void
from numba.core import cgutils
from numba.extending import overload

from qmoe_format.codec.kernels.jit import instruction
from qmoe_format.codec.kernels.simd import splat
from qmoe_format.codec.kernels.vector_type import Vector

WIDTH = 32
vector = Vector("float32", WIDTH)
_FLOAT, _BYTE, _INDEX = ir.FloatType(), ir.IntType(8), ir.IntType(32)
_FLOATS, _BYTES = vector.llvm, ir.VectorType(_BYTE, WIDTH)
_ZEROS = ir.Constant(_FLOATS, [0.0] * WIDTH)
_FUSED = ("contract", "nsz")


def _address(builder, values, start, kind):
    return builder.bitcast(builder.gep(values, [start]), kind.as_pointer())


@instruction(lambda values, _: vector(values, int64))
def load_vector(builder, values, start):
    """``values[start : start + 32]``, float32."""
    loaded = builder.load(_address(builder, values, start, _FLOATS))
    loaded.align = 4
    return loaded


@instruction(lambda values, *_: void(values, int64, vector))
def store_vector(builder, values, start, one):
    """``values[start : start + 32] = one``, float32."""
    builder.store(one, _address(builder, values, start, _FLOATS)).align = 4


@instruction(lambda values, _: vector(values, int64))
def load_levels(builder, values, start):
    """int8 ``values[start : start + 32]`` as float32."""
    loaded = builder.load(_address(builder, values, start, _BYTES))
    loaded.align = 1
    return builder.sitofp(loaded, _FLOATS)


@instruction(lambda values, *_: void(values, int64, vector))
def store_levels(builder, values, start, one):
    """``values[start : start + 32] = one``, as int8."""
    builder.store(builder.fptosi(one, _BYTES), _address(builder, values, start, _BYTES)).align = 1


@instruction(lambda: vector())
def zero_vector(builder):
    """Zeros."""
    return _ZEROS


@instruction(lambda _: float32(vector))
def vector_sum(builder, one):
    """The sum of all lanes, float32."""
    kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
    name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
    call = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(call, [ir.Constant(_FLOAT, 0.0), one], fastmath=("reassoc",))


def _lanes(*order):
    return ir.Constant(ir.VectorType(_INDEX, len(order)), list(order))


@instruction(lambda _: vector(float32))
def broadcast(builder, value):
    """A float32 in all lanes."""
    return splat(builder, value, WIDTH)


def _operator(python, name):
    @instruction(lambda *_: vector(vector, vector))
    def of_vectors(builder, one, other):
        return getattr(builder, name)(one, other, flags=_FUSED)

    @overload(python, jit_options={"nogil": True, "forceinline": True})
    def chosen(one, other):
        if one is vector and other is vector:
            return lambda one, other: of_vectors(one, other)
        if one is vector and isinstance(other, types.Float):
            return lambda one, other: of_vectors(one, broadcast(other))
        if isinstance(one, types.Float) and other is vector:
            return lambda one, other: of_vectors(broadcast(one), other)
        return None


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def _intrinsic(builder, name, *arguments):
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
    return builder.call(function, arguments)


@instruction(lambda *_: vector(vector, vector))
def least(builder, one, other):
    """The lesser one in each lane; ``other`` where one is NaN."""
    return builder.select(builder.fcmp_ordered("<", one, other), one, other)


@instruction(lambda *_: vector(vector, vector))
def greater(builder, one, other):
    """The greater one in each lane; ``other`` where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


@instruction(lambda _: vector(vector))
def floor(builder, one):
    """Rounded down."""
    return _intrinsic(builder, "floor", one)


@instruction(lambda _: vector(vector))
def magnitude(builder, one):
    """Without the sign."""
    return _intrinsic(builder, "fabs", one)


@instruction(lambda *_: vector(vector, vector))
def with_sign(builder, one, other):
    """The magnitudes of ``one`` with the signs of ``other``."""
    return _intrinsic(builder, "copysign", one, other)


@instruction(lambda *_: vector(vector, vector, vector))
def where_greater(builder, one, other, value):
    """``value`` in the lanes where ``one`` > ``other``, otherwise 0; also where one is NaN."""
    greater = builder.fcmp_ordered(">", one, other)
    return builder.select(greater, value, _ZEROS)


@instruction(lambda *_: uint64(vector, vector))
def lanes_greater(builder, one, other):
    """The lanes where ``one`` > ``other``, a bit each."""
    greater = builder.fcmp_ordered(">", one, other)
    return builder.zext(builder.bitcast(greater, ir.IntType(WIDTH)), ir.IntType(64))


@instruction(lambda *_: uint64(vector, vector))
def lanes_different(builder, one, other):
    """The lanes where two vectors differ, a bit each."""
    differ = builder.fcmp_unordered("!=", one, other)
    return builder.zext(builder.bitcast(differ, ir.IntType(WIDTH)), ir.IntType(64))


@instruction(lambda *_: vector(uint64, vector, vector))
def chosen(builder, lanes, one, other):
    """``one`` in some lanes, ``other`` elsewhere."""
    kind = ir.VectorType(ir.IntType(1), WIDTH)
    mask = builder.bitcast(builder.trunc(lanes, ir.IntType(WIDTH)), kind)
    return builder.select(mask, one, other)


@instruction(lambda values, _: void(values, int64))
def transpose(builder, values, start):
    """Transpose 32 x 32 float32 from ``values[start]`` on, in place."""
    starts = [builder.add(start, start.type(WIDTH * i)) for i in range(WIDTH)]
    pointers = [_address(builder, values, each, _FLOATS) for each in starts]
    rows = [builder.load(pointer) for pointer in pointers]
    for loaded in rows:
        loaded.align = 4
    # Each step exchanges the blocks off the diagonal of pairs of blocks.
    for half in (16, 8, 4, 2, 1):
        low = [i + (WIDTH - half if i & half else 0) for i in range(WIDTH)]
        high = [i + (WIDTH if i & half else half) for i in range(WIDTH)]
        for i in (i for i in range(WIDTH) if not i & half):
            pair = rows[i], rows[i + half]
            rows[i] = builder.shuffle_vector(*pair, _lanes(*low))
            rows[i + half] = builder.shuffle_vector(*pair, _lanes(*high))
    for row, pointer in zip(rows, pointers, strict=True):
        builder.store(row, pointer).align = 4
