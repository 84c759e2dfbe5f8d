"""Levels to codewords and back, and products straight from the codewords. Arrays in, arrays out.

    encode, decode              int8 levels <-> ``EncodedLevels``
    encode_matrix, dequantize   the same with scales: ``EncodedMatrix`` -> float32
    dequantize_rows             some rows of it, into an array
    matvec, matvecs, matmul     y = W x without decoding W
    fit_dictionary, standard_dictionary

Numba is loaded by the first call that encodes, decodes or multiplies.
"""

from qmoe_format.codec.dictionary import Dictionary, fit_dictionary, standard_dictionary
from qmoe_format.codec.matrix import EncodedMatrix, dequantize, dequantize_rows, encode_matrix
from qmoe_format.codec.multiply import Matvec, matmul, matvec, matvecs
from qmoe_format.codec.profiles import PROFILES, Profile
from qmoe_format.codec.segments import EncodedLevels, decode, encode

__all__ = [
    "PROFILES",
    "Dictionary",
    "EncodedLevels",
    "EncodedMatrix",
    "Matvec",
    "Profile",
    "decode",
    "dequantize",
    "dequantize_rows",
    "encode",
    "encode_matrix",
    "fit_dictionary",
    "matmul",
    "matvec",
    "matvecs",
    "standard_dictionary",
]
