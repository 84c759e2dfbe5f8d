"""Floating-point numbers in exact arithmetic: their values, and the nearest one to a value."""

from __future__ import annotations

from fractions import Fraction

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FORMATS = {"F16": (5, 10), "BF16": (8, 7), "F32": (8, 23), "F64": (11, 52)}
Number = tuple[int, Fraction]  # sign bit and magnitude
ZERO: Number = (0, Fraction(0))
INFINITY = Fraction(2) ** 2000  # beyond all formats


def number(bits: int, dtype: str) -> Number:
    """The exact value of a floating-point number."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign = bits >> (exponent_bits + fraction_bits)
    exponent = bits >> fraction_bits & (2**exponent_bits - 1)
    fraction = bits & (2**fraction_bits - 1)
    if exponent == 2**exponent_bits - 1:
        return sign, INFINITY
    least = 2 - 2 ** (exponent_bits - 1) - fraction_bits  # the unit of the subnormals
    if exponent == 0:
        return sign, fraction * Fraction(2) ** least
    return sign, (2**fraction_bits + fraction) * Fraction(2) ** (least + exponent - 1)


def nearest(value: Number, dtype: str) -> int:
    """The bits of the nearest number of a format, ties to even."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign, magnitude = value
    sign <<= exponent_bits + fraction_bits
    if magnitude == 0:
        return sign
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    exponent = max(exponent, 1 - bias)
    # round() of a fraction takes ties to even; a carry goes into the exponent by itself.
    units: int = round(magnitude / Fraction(2) ** (exponent - fraction_bits))
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    return sign | min(((exponent + bias - 1) << fraction_bits) + units, infinity)


def product(factor: Fraction, scale: Number) -> Number:
    """``factor`` × ``scale``, rounded to binary32."""
    sign, magnitude = scale
    value = sign ^ (factor < 0), magnitude * abs(factor)
    return number(nearest(value, "F32"), "F32")


def bits_of(value: float, dtype: str) -> int:
    return nearest((int(value < 0), Fraction(abs(value))), dtype)


def bf16(*values: float) -> list[int]:
    """The bits of ``values`` in BF16."""
    return [bits_of(value, "BF16") for value in values]
