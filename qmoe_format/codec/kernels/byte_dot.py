"""Products of 256 codes of 2 or 4 bits, or of a byte each, with 256 int8, for Numba kernels.

Codes are unsigned and the x signed, as the processors' instructions want them. A block:

    2 bits: 64 bytes, byte j holds columns j, 64 + j, 128 + j and 192 + j, the first in its low bits
    4 bits: 128 bytes, byte j columns j and 64 + j, byte 64 + j columns 128 + j and 192 + j

so that a shift and a mask of 64 bytes leave the codes of 64 neighboring columns. What adds them up
is ``vpdpbusd`` with AVX-512 VNNI, otherwise ``pmaddubsw`` of AVX-512 or AVX2: its sums of 16 bits
hold a block, at most 8 x 15 x 127. Without these LLVM widens everything.
"""

from __future__ import annotations

from llvmlite import ir
from numba import float32, types, uint64
from numba.core import cgutils

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.jit import instruction
from qmoe_format.codec.kernels.vector_type import Vector

ZERO_OF_TWO, ZERO_OF_FOUR = 1, 7  # the code of a level of 0, in as many bits
_LANES = 64  # bytes in a vector
_BYTE, _SHORT, _INT = (ir.IntType(bits) for bits in (8, 16, 32))
sums_type = Vector("int32", 16)
_INT_SUMS = sums_type.llvm
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_VNNI = simd.cpu_has("avx512vnni")
_WIDE = simd.cpu_has("avx512bw")
_AVX2 = simd.cpu_has("avx2")


def load_bytes(builder, values, start, lane=0):
    """Sixty-four bytes of int8 or uint8, ``lane`` after ``start``."""
    kind = ir.VectorType(_BYTE, _LANES)
    address = builder.gep(values, [builder.add(start, ir.IntType(64)(lane))])
    loaded = builder.load(builder.bitcast(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _field(builder, packed, shift, mask):
    """The codes from bit ``shift`` of each byte on."""
    if shift:  # there are no shifts of bytes, and the mask takes what comes in from a neighbor
        words = builder.bitcast(packed, ir.VectorType(_SHORT, _LANES // 2))
        moved = builder.lshr(words, ir.Constant(words.type, [shift] * words.type.count))
        packed = builder.bitcast(moved, packed.type)
    return builder.and_(packed, ir.Constant(packed.type, [mask] * _LANES))


def _call(builder, name, result, arguments):
    kind = ir.FunctionType(result, [each.type for each in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _some(builder, one, other, lanes):
    """Lanes of two vectors, those of the second counted after those of the first."""
    lanes = [*lanes]
    chosen = ir.Constant(ir.VectorType(_INT, len(lanes)), lanes)
    return builder.shuffle_vector(one, other, chosen)


def _by_halves(builder, name, result, one, other):
    """An instruction for 256 bits, twice."""
    count = one.type.count
    half = ir.VectorType(result.element, result.count // 2)
    low, high = (
        _call(builder, name, half, [_some(builder, each, each, lanes) for each in (one, other)])
        for lanes in (range(count // 2), range(count // 2, count))
    )
    return _some(builder, low, high, range(result.count))


def _add_pairs(builder, wide):
    count = wide.type.count
    even, odd = (_some(builder, wide, wide, range(first, count, 2)) for first in (0, 1))
    return builder.add(even, odd)


def _products(builder, codes, x):
    """Sums of the products of neighbors, 32 of 16 bits."""
    shorts = ir.VectorType(_SHORT, _LANES // 2)
    if _WIDE:
        return _call(builder, "llvm.x86.avx512.pmaddubs.w.512", shorts, [codes, x])
    if _AVX2:
        return _by_halves(builder, "llvm.x86.avx2.pmadd.ub.sw", shorts, codes, x)
    wide = ir.VectorType(_SHORT, _LANES)
    return _add_pairs(builder, builder.mul(builder.zext(codes, wide), builder.sext(x, wide)))


def _widened(builder, sums):
    """Sums of neighbors, 16 of 32 bits."""
    ones = ir.Constant(sums.type, [1] * sums.type.count)
    if _WIDE:
        return _call(builder, "llvm.x86.avx512.pmaddw.d.512", _INT_SUMS, [sums, ones])
    if _AVX2:
        return _by_halves(builder, "llvm.x86.avx2.pmadd.wd", _INT_SUMS, sums, ones)
    return _add_pairs(builder, builder.sext(sums, ir.VectorType(_INT, sums.type.count)))


def _four(builder, values, start):
    """Four times 64 bytes."""
    return [load_bytes(builder, values, start, _LANES * i) for i in range(4)]


def _dot(builder, fields, vectors):
    """Sixteen sums of the products of codes and x, four vectors of each."""
    if _VNNI:
        sums = [ir.Constant(_INT_SUMS, [0] * 16)] * 2  # two chains: each step waits for the last
        for i, (codes, values) in enumerate(zip(fields, vectors, strict=True)):
            arguments = [sums[i % 2], *(builder.bitcast(v, _INT_SUMS) for v in (codes, values))]
            sums[i % 2] = _call(builder, "llvm.x86.avx512.vpdpbusd.512", _INT_SUMS, arguments)
        return builder.add(*sums)
    first, *others = (_products(builder, *pair) for pair in zip(fields, vectors, strict=True))
    for each in others:
        first = builder.add(first, each)
    return _widened(builder, first)


_DOT = types.CPointer(types.uint8), uint64, types.CPointer(types.int8), uint64


def _signature(*_):
    return sums_type(*_DOT)


def _fields(builder, bits, codes, place):
    """The four times 64 codes of a block."""
    count = 8 // bits
    loaded = [load_bytes(builder, codes, place, _LANES * i) for i in range(4 // count)]
    shifts = [bits * i for i in range(count)]
    return [_field(builder, each, shift, (1 << bits) - 1) for each in loaded for shift in shifts]


def _distance(builder, codes, level):
    """How far codes are from the one of a level of 0."""
    levels = builder.sub(codes, ir.Constant(codes.type, [level] * _LANES))
    return _call(builder, f"llvm.abs.v{_LANES}i8", codes.type, [levels, ir.IntType(1)(0)])


def _make_dots(bits, zero):
    @instruction(_signature)
    def dot_codes(builder, codes, place, x, start):
        """Sixteen partial sums of a block: codes from byte ``place`` on, x from ``start`` on."""
        return _dot(builder, _fields(builder, bits, codes, place), _four(builder, x, start))

    @instruction(_signature)
    def dot_magnitudes(builder, codes, place, x, start):
        """``dot_codes`` of how far codes are from ``zero``."""
        fields = _fields(builder, bits, codes, place)
        distances = [_distance(builder, each, zero) for each in fields]
        return _dot(builder, distances, _four(builder, x, start))

    return dot_codes, dot_magnitudes


dot_two_bits, dot_two_magnitudes = _make_dots(2, ZERO_OF_TWO)
dot_four_bits, dot_four_magnitudes = _make_dots(4, ZERO_OF_FOUR)


@instruction(_signature)
def dot_bytes(builder, codes, place, x, start):
    """Sixteen partial sums of 256 codes, a byte each, times x."""
    return _dot(builder, _four(builder, codes, place), _four(builder, x, start))


@instruction(lambda *kinds: sums_type(*_DOT, uint64, uint64, uint64, uint64))
def dot_signed(builder, codes, place, x, start, a, b, c, d):
    """``dot_bytes`` with a minus where a bit of four words says so."""
    vectors = []
    for bits, values in zip((a, b, c, d), _four(builder, x, start), strict=True):
        negative = builder.bitcast(bits, ir.VectorType(ir.IntType(1), _LANES))
        minus = builder.sub(ir.Constant(values.type, [0] * _LANES), values)
        vectors.append(builder.select(negative, minus, values))
    return _dot(builder, _four(builder, codes, place), vectors)


@instruction(lambda *_: simd.vector(simd.vector, sums_type, float32))
def add_scaled_sums(builder, total, sums, factor):
    """``total + sums * factor``, sixteen float32."""
    factors = simd.splat(builder, factor, 16)
    scaled = builder.fmul(builder.sitofp(sums, _FLOATS), factors, flags=("contract",))
    return builder.fadd(total, scaled, flags=("contract",))
