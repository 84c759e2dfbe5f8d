"""Vectors of 16 float32 for Numba kernels, added to where the bits of a mask are set.

Numba has no vector type, and what LLVM makes of a loop over bits is slow; on AVX-512 each function
here is one or two instructions. Elsewhere LLVM emulates them with what there is.
"""

from __future__ import annotations

from llvmlite import ir
from numba import float32, uint16, uint64, void
from numba.core import cgutils
from numba.core.registry import cpu_target

from qmoe_format.codec.kernels.jit import instruction
from qmoe_format.codec.kernels.vector_type import Vector

WIDTH = 16
vector = Vector("float32", WIDTH)
_FLOAT = ir.FloatType()
_BYTE, _SHORT, _WORD = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_VECTOR = vector.llvm
_MASK = ir.VectorType(ir.IntType(1), WIDTH)
_ZEROS = ir.Constant(_VECTOR, [0.0] * WIDTH)


def cpu_has(*features: str) -> bool:
    """Whether kernels are compiled for a processor with all of LLVM's ``features``."""
    available = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return all(f"+{feature}" in available for feature in features)


def _deposits() -> bool:
    _, name, _ = cpu_target.target_context.codegen().magic_tuple()
    return cpu_has("bmi2") and name not in ("znver1", "znver2")  # these take some hundred cycles


DEPOSITS = _deposits()  # whether ``deposit`` and ``extract`` pay


def _mask(builder, bits):
    return builder.bitcast(builder.trunc(bits, ir.IntType(WIDTH)), _MASK)


def _address(builder, values, start, element):
    kind = ir.VectorType(element, WIDTH)
    return builder.bitcast(builder.gep(values, [start]), kind.as_pointer())


def _load(builder, values, start, element):
    loaded = builder.load(_address(builder, values, start, element))
    loaded.align = element.width // 8 if isinstance(element, ir.IntType) else 4
    return loaded


def splat(builder, value, count):
    """A vector of ``count`` times ``value``."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    return builder.shuffle_vector(first, undefined, zeros)


@instruction(lambda: vector())
def zero_vector(builder):
    """Sixteen zeros."""
    return _ZEROS


def _gather(builder, values, base, indices, start, mask):
    wide = builder.zext(_load(builder, indices, start, _SHORT), ir.VectorType(_WORD, WIDTH))
    # llvmlite has no gep that makes a vector of pointers.
    pointers = builder.gep(builder.gep(values, [base]), [_WORD(0)])
    pointers.indices[0] = wide
    pointers.type = ir.VectorType(values.type, WIDTH)
    kind = ir.FunctionType(_VECTOR, [pointers.type, ir.IntType(32), mask.type, _VECTOR])
    name = f"llvm.masked.gather.v{WIDTH}f32.v{WIDTH}p0"
    call = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(call, [pointers, ir.IntType(32)(4), mask, _ZEROS])


@instruction(lambda values, _, indices, *__: vector(values, uint64, indices, uint64, uint64))
def gather_some(builder, values, base, indices, start, bits):
    """``values[base + i]`` for the i in ``indices[start : start + 16]``, uint16.

    Reads only the values whose bit is set, but all sixteen indices; ``base`` may be negative.
    """
    return _gather(builder, values, base, indices, start, _mask(builder, bits))


@instruction(lambda values, _, indices, __: vector(values, uint64, indices, uint64))
def gather(builder, values, base, indices, start):
    """``gather_some`` of all."""
    if cpu_has("avx512f"):
        return _gather(builder, values, base, indices, start, ir.Constant(_MASK, [1] * WIDTH))
    origin = builder.gep(values, [base])  # a load for each: earlier gathers are slower, or not used
    gathered = _ZEROS
    for lane in range(WIDTH):
        index = builder.load(builder.gep(indices, [builder.add(start, _WORD(lane))]))
        value = builder.load(builder.gep(origin, [builder.zext(index, _WORD)]))
        gathered = builder.insert_element(gathered, value, ir.IntType(32)(lane))
    return gathered


@instruction(lambda some, values, _: vector(some, values, uint64))
def multiply_bytes(builder, factors, values, start):
    """``factors`` times ``values[start : start + 16]``, uint8."""
    return builder.fmul(factors, builder.uitofp(_load(builder, values, start, _BYTE), _VECTOR))


@instruction(lambda values, _: vector(values, uint64))
def load_vector(builder, values, start):
    """``values[start : start + 16]``, float32."""
    return _load(builder, values, start, _FLOAT)


@instruction(lambda *_: vector(vector, vector, uint64))
def add_masked(builder, sums, addend, bits):
    """``sums``, plus ``addend`` where the bit is set."""
    return builder.select(_mask(builder, bits), builder.fadd(sums, addend), sums)


@instruction(lambda _, values, *__: vector(vector, values, uint64, uint64))
def add_loaded(builder, sums, values, start, bits):
    """``sums``, plus ``values[start : start + 16]`` where the bit is set; reads all sixteen."""
    addend = _load(builder, values, start, _FLOAT)
    return builder.select(_mask(builder, bits), builder.fadd(sums, addend), sums)


@instruction(lambda *_: vector(vector, vector, float32))
def add_scaled(builder, sums, addend, factor):
    """``sums + addend * factor``."""
    scaled = builder.fmul(addend, splat(builder, factor, WIDTH), flags=("contract",))
    return builder.fadd(sums, scaled, flags=("contract",))


@instruction(lambda _, __, values, *___: vector(vector, vector, values, uint64))
def add_times_levels(builder, sums, some, values, start):
    """``sums`` plus ``some`` times ``values[start : start + 16]``, int8."""
    levels = builder.sitofp(_load(builder, values, start, _BYTE), _VECTOR)
    return builder.fadd(sums, builder.fmul(some, levels, flags=("contract",)), flags=("contract",))


@instruction(lambda _, __, values, *___: vector(vector, vector, values, uint64))
def add_times_magnitudes(builder, sums, some, values, start):
    """``add_times_levels`` of their magnitudes."""
    levels = _load(builder, values, start, _BYTE)
    kind = ir.FunctionType(levels.type, [levels.type, ir.IntType(1)])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.abs.v{WIDTH}i8")
    sizes = builder.uitofp(builder.call(function, [levels, ir.IntType(1)(0)]), _VECTOR)
    return builder.fadd(sums, builder.fmul(some, sizes, flags=("contract",)), flags=("contract",))


@instruction(lambda _, weights, __, values, ___: vector(vector, weights, uint64, values, uint64))
def add_times_bf16(builder, sums, weights, place, values, start):
    """``sums`` plus ``weights[place : place + 16]``, bf16, times ``values[start : start + 16]``."""
    words = ir.VectorType(ir.IntType(32), WIDTH)
    wide = builder.zext(_load(builder, weights, place, _SHORT), words)
    high = builder.bitcast(builder.shl(wide, ir.Constant(words, [16] * WIDTH)), _VECTOR)
    product = builder.fmul(high, _load(builder, values, start, _FLOAT), flags=("contract",))
    return builder.fadd(sums, product, flags=("contract",))


@instruction(lambda values, *_: void(values, uint64, vector))
def store_vector(builder, values, start, sums):
    """``values[start : start + 16] = sums``."""
    builder.store(sums, _address(builder, values, start, _FLOAT)).align = 4


@instruction(lambda _: float32(vector))
def vector_sum(builder, sums):
    """The sum of all sixteen elements, float32."""
    kind = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
    name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
    call = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(call, [ir.Constant(_FLOAT, 0.0), sums], fastmath=("reassoc",))


@instruction(lambda _: float32(uint16))
def from_bf16(builder, bits):
    """The value of a bf16."""
    wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.IntType(32)(16))
    return builder.bitcast(wide, _FLOAT)


@instruction(lambda _: uint64(uint64))
def popcount(builder, word):
    """How many bits of a uint64 are set."""
    return builder.ctpop(word)


@instruction(lambda *_: uint64(uint64, uint64))
def deposit(builder, bits, mask):
    """The lowest of ``bits``, one after another, where ``mask`` has ones; needs x86's BMI2."""
    return _of_bmi2(builder, "pdep", bits, mask)


@instruction(lambda *_: uint64(uint64, uint64))
def extract(builder, bits, mask):
    """The ``bits`` where ``mask`` has ones, next to each other; needs x86's BMI2."""
    return _of_bmi2(builder, "pext", bits, mask)


def _of_bmi2(builder, name, *words):
    kind = ir.FunctionType(_WORD, [_WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.bmi.{name}.64")
    return builder.call(function, words)
