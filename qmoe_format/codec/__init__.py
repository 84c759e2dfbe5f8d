"""Levels to codewords and back, and products straight from the codewords. Arrays in, arrays out.

    encode, decode              int8 levels <-> ``EncodedLevels``, of ``EncodedBits``
    encode_matrix, dequantize   the same with scales: ``EncodedMatrix`` -> float32
    pack_groups, unpack_groups  uint8 integers of few bits <-> ``GroupedMatrix``, with scales
    dequantize_rows             some rows of a matrix, into an array
    matvec, matvecs, matmul     y = W x without decoding W
    multiply_rounded            the same, faster, with x rounded to int8
    pack, multiply_packed       the same, faster still, of a ``PackedMatrix`` that takes more memory
    multiply_gated              whole experts of these, with one token
    fit_dictionary, standard_dictionary

Numba is loaded by the first call that encodes, decodes or multiplies.
"""

from qmoe_format.codec.bit_string import EncodedBits
from qmoe_format.codec.dictionary import Dictionary, fit_dictionary, standard_dictionary
from qmoe_format.codec.gated import multiply_gated
from qmoe_format.codec.int_group import GroupedMatrix, pack_groups, unpack_groups
from qmoe_format.codec.matrix import (
    EncodedMatrix,
    Matrix,
    dequantize,
    dequantize_rows,
    encode_matrix,
)
from qmoe_format.codec.multiply import Matvec, matmul, matvec, matvecs
from qmoe_format.codec.packed import PackedMatrix, PackedProduct, multiply_packed, pack, packable
from qmoe_format.codec.profiles import PROFILES, Profile
from qmoe_format.codec.rounded import RoundedProduct, multiply_rounded
from qmoe_format.codec.segments import EncodedLevels, decode, encode

__all__ = [
    "PROFILES",
    "Dictionary",
    "EncodedBits",
    "EncodedLevels",
    "EncodedMatrix",
    "GroupedMatrix",
    "Matrix",
    "Matvec",
    "PackedMatrix",
    "PackedProduct",
    "Profile",
    "RoundedProduct",
    "decode",
    "dequantize",
    "dequantize_rows",
    "encode",
    "encode_matrix",
    "fit_dictionary",
    "matmul",
    "matvec",
    "matvecs",
    "multiply_gated",
    "multiply_packed",
    "multiply_rounded",
    "pack",
    "pack_groups",
    "packable",
    "standard_dictionary",
    "unpack_groups",
]
