"""Kernels of ``int-group``: packed codes to weights, and products without storing them.

Sixteen codes at a time become weights, exact to the bit ([G-6], [G-7]), in a vector that is then
stored, or multiplied with x of one token or of four. On AVX2 that is four or five instructions for
eight weights; look-ups in tables take no fewer. (The sum of u x, less z times the sum of x, would
save two of them, but where weights are 0 it leaves what was rounded of both. [M-1])

``grouped``, the first argument of all kernels after ``first`` and ``last``, is a tuple of

    packed       uint8 [rows, bytes of a row], contiguous
    scales       uint16 [rows, groups], bf16
    zero_points  uint8 [rows, groups]; [0, 0] where all are 2^(bits - 1)
    bits         uint64
    log          bool
    columns      uint64
    group_size   uint64, above 0

No kernel reads or writes outside its arrays, whatever the codes are.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, uint64

from qmoe_format.codec.kernels import simd
from qmoe_format.codec.kernels.jit import inlined, instruction, kernel
from qmoe_format.codec.kernels.unaligned import advance, pointer

OK = -1
STEP = np.uint64(32)  # columns: two vectors. Only the last group of a row may be shorter
ZERO, ONE, TWO, THREE, SEVEN, EIGHT, SIXTEEN = (np.uint64(n) for n in (0, 1, 2, 3, 7, 8, 16))

_INT, _FLOAT = ir.IntType(32), ir.FloatType()


def _like(kind, element):
    """The type of as many ``element`` as ``kind`` is."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _constant(kind, value):
    values = [value] * kind.count if isinstance(kind, ir.VectorType) else value
    return ir.Constant(kind, values)


def _spread(builder, value, kind):
    """``value`` as every element of a ``kind``."""
    if not isinstance(kind, ir.VectorType):
        return value
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(first, undefined, _constant(_like(kind, _INT), 0))


def _load(builder, data, offset, kind):
    value = builder.load(builder.bitcast(builder.gep(data, [offset]), kind.as_pointer()))
    value.align = 1
    return value


_CODES = ir.VectorType(_INT, simd.WIDTH)
_HALF = simd.WIDTH // 2


def _load_wide(builder, data, column, bits):
    """Sixteen codes of 8 bits from a column on."""
    return builder.zext(_load(builder, data, column, ir.VectorType(ir.IntType(8), 16)), _CODES)


def _load_narrow(builder, data, column, bits):
    """Sixteen codes of 2, 3 or 4 bits from a column on, a multiple of 16.

    Eight codes are within the first 4 of their 2 x bits bytes, and eight within the last 4: nothing
    beyond the row is read, and each half of the lanes shifts one word.
    """
    wide = bits.type
    bytes_ = builder.lshr(builder.mul(column, bits), wide(3))
    last = builder.add(bytes_, builder.sub(builder.mul(bits, wide(2)), wide(4)))
    pair = ir.Constant(ir.VectorType(_INT, 2), ir.Undefined)
    for lane, offset in enumerate((bytes_, last)):
        pair = builder.insert_element(pair, _load(builder, data, offset, _INT), _INT(lane))
    halves = ir.Constant(_CODES, [0] * _HALF + [1] * _HALF)
    words = builder.shuffle_vector(pair, pair, halves)
    few = builder.trunc(bits, _INT)
    shifts = builder.mul(_spread(builder, few, _CODES), ir.Constant(_CODES, [*range(_HALF)] * 2))
    start = builder.sub(_INT(32), builder.mul(few, _INT(_HALF)))
    upper = builder.and_(
        _spread(builder, start, _CODES), ir.Constant(_CODES, [0] * _HALF + [-1] * _HALF)
    )
    shifted = builder.lshr(words, builder.add(shifts, upper))
    mask = builder.sub(builder.shl(_INT(1), few), _INT(1))
    return builder.and_(shifted, _spread(builder, mask, _CODES))


def _linear(builder, codes, bits, zero_point, scale, signed_zeros):
    """(u - z) x scale; where u = z that is +0, or, with ``signed_zeros``, perhaps -0. [G-6]"""
    kind = _like(codes.type, _FLOAT)
    zero_points = _spread(builder, builder.trunc(zero_point, _INT), codes.type)
    steps = builder.sitofp(builder.sub(codes, zero_points), kind)
    weights = builder.fmul(steps, _spread(builder, scale, kind))
    if signed_zeros:
        return weights
    none = builder.icmp_unsigned("==", codes, zero_points)
    return builder.select(none, _constant(kind, 0.0), weights)


def _log(builder, codes, bits, zero_point, scale, signed_zeros):
    """Scale x 2^-u, or, with h = 2^(bits - 1), -(scale x 2^(h - u)) for u from h on. [G-7]

    As half the scale, which is exact, times 2^(1 - u), which is made of its bits: its exponent is
    above 0 for all u.
    """
    kind, whole = _like(codes.type, _FLOAT), codes.type
    sign_bit = builder.sub(builder.trunc(bits, _INT), _INT(1))
    low = builder.sub(builder.shl(_INT(1), sign_bit), _INT(1))
    steps = builder.shl(builder.and_(codes, _spread(builder, low, whole)), _constant(whole, 23))
    powers = builder.sub(_constant(whole, 128 << 23), steps)
    to_top = _spread(builder, builder.sub(_INT(31), sign_bit), whole)
    signs = builder.and_(builder.shl(codes, to_top), _constant(whole, -(1 << 31)))
    values = builder.bitcast(builder.or_(powers, signs), kind)
    half = builder.fmul(scale, ir.Constant(_FLOAT, 0.5))
    return builder.fmul(values, _spread(builder, half, kind))


def _make_decode(load, value, signed_zeros):
    @instruction(lambda data, *_: simd.vector(data, uint64, uint64, uint64, float32))
    def decode(builder, data, column, bits, zero_point, scale):
        """The weights of sixteen columns from one on."""
        codes = load(builder, data, column, bits)
        return value(builder, codes, bits, zero_point, scale, signed_zeros)

    return decode


def _make_value(value):
    @instruction(lambda *_: float32(uint64, uint64, uint64, float32))
    def one(builder, code, bits, zero_point, scale):
        """The weight of a code."""
        return value(builder, builder.trunc(code, _INT), bits, zero_point, scale, False)

    return one


narrow_linear = _make_decode(_load_narrow, _linear, True)
narrow_exact = _make_decode(_load_narrow, _linear, False)
narrow_log = _make_decode(_load_narrow, _log, False)
wide_linear = _make_decode(_load_wide, _linear, True)
wide_exact = _make_decode(_load_wide, _linear, False)
wide_log = _make_decode(_load_wide, _log, False)
one_linear, one_log = _make_value(_linear), _make_value(_log)


@instruction(lambda _, __, values, *___: simd.vector(simd.vector, simd.vector, values, uint64))
def multiply_add(builder, sums, weights, values, start):
    """``sums + weights * values[start : start + 16]``."""
    loaded = builder.load(builder.bitcast(builder.gep(values, [start]), sums.type.as_pointer()))
    loaded.align = 4
    product = builder.fmul(weights, loaded, flags=("contract",))
    return builder.fadd(sums, product, flags=("contract",))


@inlined
def _code(data, column, bits):
    """One code; the byte after its first one is read only if it ends there."""
    bit = column * bits
    byte, shift = bit >> THREE, bit & SEVEN
    word = np.uint64(data[byte])
    if shift + bits > EIGHT:
        word |= np.uint64(data[byte + ONE]) << EIGHT
    return (word >> shift) & ((ONE << bits) - ONE)


@inlined
def _for_each_row(decode, one, add, add_one, finish, zeros, first, last, grouped, x, out):
    """Give the weights of each row to ``add``, two vectors at a time, and ``add_one``."""
    packed, scales, zero_points, bits, _, columns, group_size = grouped
    middle, chosen = ONE << (bits - ONE), zero_points.size > 0
    codes, all_scales, all_points = pointer(packed), pointer(scales), pointer(zero_points)
    for row in range(first, last):
        data = advance(codes, np.uint64(row * packed.shape[1]))
        group = np.uint64(row * scales.shape[1])
        sums, rest = zeros
        column = ZERO
        while column < columns:
            scale = simd.from_bf16(all_scales[group])
            zero_point = np.uint64(all_points[group]) if chosen else middle
            group += ONE
            end = min(column + group_size, columns)
            while column + STEP <= end:
                low = decode(data, column, bits, zero_point, scale)
                high = decode(data, column + SIXTEEN, bits, zero_point, scale)
                sums = add(sums, low, high, row, column, x)
                column += STEP
            while column < end:
                weight = one(_code(data, column, bits), bits, zero_point, scale)
                rest = add_one(rest, weight, row, column, x)
                column += ONE
        finish(out, row, sums, rest)
    return packed.size, scales.size, zero_points.size  # ``pointer`` needs the arrays until here


@inlined
def _for_each_weight(narrow, wide, add, add_one, finish, zeros, first, last, grouped, x, out):
    """``_for_each_row`` with the matrix's decoder, so that no inner loop asks for bits or grid.

    ``narrow`` and ``wide`` are the linear ones.
    """
    eight, log = grouped[3] == EIGHT, grouped[4]
    if log and eight:
        _for_each_row(wide_log, one_log, add, add_one, finish, zeros, first, last, grouped, x, out)
    elif log:
        _for_each_row(
            narrow_log, one_log, add, add_one, finish, zeros, first, last, grouped, x, out
        )
    elif eight:
        _for_each_row(wide, one_linear, add, add_one, finish, zeros, first, last, grouped, x, out)
    else:
        _for_each_row(narrow, one_linear, add, add_one, finish, zeros, first, last, grouped, x, out)


@inlined
def _add_token(sums, low, high, row, column, x):
    a, b = sums
    values, _ = x
    a = multiply_add(a, low, values, column)
    return a, multiply_add(b, high, values, column + SIXTEEN)


@inlined
def _add_token_one(rest, weight, row, column, x):
    values, _ = x
    return rest + weight * values[column]


@inlined
def _finish_token(out, row, sums, rest):
    a, b = sums
    out[row] = simd.vector_sum(a) + simd.vector_sum(b) + rest


@kernel
def dot_token(first, last, grouped, x, out):
    """Multiply rows with one token: x float32 [columns], contiguous; out float32 [rows]."""
    zeros = (simd.zero_vector(), simd.zero_vector()), np.float32(0)
    _for_each_weight(
        narrow_linear, wide_linear, _add_token, _add_token_one, _finish_token, zeros, first, last,
        grouped, (pointer(x), x.size), out,
    )  # fmt: skip
    return OK


@inlined
def _add_four(sums, low, high, row, column, x):
    a, b, c, d = sums
    values, columns = x
    a = multiply_add(multiply_add(a, low, values, column), high, values, column + SIXTEEN)
    column += columns
    b = multiply_add(multiply_add(b, low, values, column), high, values, column + SIXTEEN)
    column += columns
    c = multiply_add(multiply_add(c, low, values, column), high, values, column + SIXTEEN)
    column += columns
    d = multiply_add(multiply_add(d, low, values, column), high, values, column + SIXTEEN)
    return a, b, c, d


@inlined
def _add_four_one(rest, weight, row, column, x):
    a, b, c, d = rest
    values, columns = x
    a += weight * values[column]
    b += weight * values[column + columns]
    c += weight * values[column + TWO * columns]
    d += weight * values[column + THREE * columns]
    return a, b, c, d


@inlined
def _finish_four(out, row, sums, rest):
    for token in range(4):
        out[token, row] = simd.vector_sum(sums[token]) + rest[token]


@kernel
def dot_four(first, last, grouped, x, out):
    """Multiply rows with four tokens: x float32 [4, columns], contiguous; out float32 [4, rows]."""
    zero, nothing = simd.zero_vector(), np.float32(0)
    zeros = (zero, zero, zero, zero), (nothing, nothing, nothing, nothing)
    _for_each_weight(
        narrow_linear, wide_linear, _add_four, _add_four_one, _finish_four, zeros, first, last,
        grouped, (pointer(x), np.uint64(x.shape[1])), out,
    )  # fmt: skip
    return OK


@inlined
def _store(sums, low, high, row, column, target):
    values, columns, first = target
    place = np.uint64((row - first) * columns) + column
    simd.store_vector(values, place, low)
    simd.store_vector(values, place + SIXTEEN, high)
    return sums


@inlined
def _store_one(rest, weight, row, column, target):
    values, columns, first = target
    values[np.uint64((row - first) * columns) + column] = weight
    return rest


@inlined
def _finish_stored(out, row, sums, rest):
    pass


@kernel
def weights_of_rows(first, last, grouped, first_row, out):
    """Weights ([G-6], [G-7]) of rows from ``first_row`` on: float32 [rows, columns], contiguous."""
    target = pointer(out), out.shape[1], first_row
    _for_each_weight(
        narrow_exact, wide_exact, _store, _store_one, _finish_stored, (0, 0), first, last, grouped,
        target, out,
    )  # fmt: skip
    return OK
