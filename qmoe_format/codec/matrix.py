"""A matrix of levels as stored: encoded levels and their scales (SPEC.md sections 7.1 and 7.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import int_group
from qmoe_format.codec.arrays import check_array
from qmoe_format.codec.dictionary import Dictionary
from qmoe_format.codec.int_group import GroupedMatrix
from qmoe_format.codec.profiles import FAST
from qmoe_format.codec.segments import EncodedLevels, decode, encode, kernel_strings, run_all
from qmoe_format.codec.threads import in_parts
from qmoe_format.dtypes import to_float32
from qmoe_format.errors import QMoEError


@dataclass(frozen=True, slots=True)
class EncodedMatrix:
    """Levels and scales; weight = level times row scale of its sign [times column scale].

    Attributes:
        row_scale: bf16 bits, uint16 [rows, 1] of s (low = -s, high = s), or [rows, 2] of low, high.
        column_scale: bf16 bits, uint16 [columns], or None.

    Raises:
        QMoEError: ``argument`` if these do not fit each other; ``value`` if a scale is not finite.
    """

    levels: EncodedLevels
    row_scale: npt.NDArray[np.uint16]
    column_scale: npt.NDArray[np.uint16] | None

    def __post_init__(self) -> None:
        scales = [self.row_scale]
        check_array("row_scale", self.row_scale, np.uint16, (self.rows, None))
        if not 1 <= self.row_scale.shape[1] <= 2:
            raise QMoEError("argument", f"rows have {self.row_scale.shape[1]} scales, not 1 or 2")
        if self.column_scale is not None:
            check_array("column_scale", self.column_scale, np.uint16, (self.columns,))
            scales.append(self.column_scale)
        if any((scale & 0x7F80 == 0x7F80).any() for scale in scales):
            raise QMoEError("value", "a scale is infinite or NaN")  # [E-8] [W-3]

    @property
    def rows(self) -> int:
        """R."""
        return self.levels.rows

    @property
    def columns(self) -> int:
        """C."""
        return self.levels.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def symmetric(self) -> bool:
        """Whether low = -high."""
        return bool(self.row_scale.shape[1] == 1)

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary of the mask."""
        return self.levels.dictionary

    def low_high(self) -> npt.NDArray[np.float32]:
        """float32 [rows, 2]: the values of levels -1 and +1 ([V-1])."""
        scale = to_float32(self.row_scale, "BF16")
        return np.concatenate([-scale, scale], axis=1) if self.symmetric else scale


Matrix: TypeAlias = EncodedMatrix | GroupedMatrix
"""What can be decoded and multiplied."""


def encode_matrix(
    levels: npt.NDArray[np.int8],
    row_scale: npt.NDArray[np.uint16],
    column_scale: npt.NDArray[np.uint16] | None = None,
    *,
    width: int = FAST.width,
    rows_per_segment: int | None = None,
    dictionary: Dictionary | None = None,
    refinement_dictionary: Dictionary | None = None,
    threads: int = 1,
) -> EncodedMatrix:
    """Encode levels and attach their scales.

    Args:
        levels, width, rows_per_segment, dictionary, refinement_dictionary, threads: see ``encode``.
        row_scale, column_scale: see ``EncodedMatrix``.

    Raises:
        QMoEError: as ``encode`` and ``EncodedMatrix``.

    Example:
        >>> from qmoe_format.codec import dequantize, encode_matrix
        >>> levels = np.array([[0, 0, 1, 0], [0, -1, 0, 3]], np.int8)
        >>> row_scale = np.array([[0x3F00], [0x3E80]], np.uint16)  # 0.5 and 0.25
        >>> dequantize(encode_matrix(levels, row_scale))
        array([[ 0.  ,  0.  ,  0.5 ,  0.  ],
               [ 0.  , -0.25,  0.  ,  0.75]], dtype=float32)
    """
    encoded = encode(
        levels, threads, width=width, rows_per_segment=rows_per_segment, dictionary=dictionary,
        refinement_dictionary=refinement_dictionary,
    )  # fmt: skip
    return EncodedMatrix(encoded, row_scale, column_scale)


def dequantize(matrix: Matrix, threads: int = 1) -> npt.NDArray[np.float32]:
    """Decode to weights float32 [rows, columns], exact to the bit ([V-1], [V-2]).

    Raises:
        QMoEError: as ``decode``.
    """
    weights = np.empty(matrix.shape, np.float32)
    if isinstance(matrix, GroupedMatrix):
        int_group.dequantize_rows(matrix, 0, weights, threads)
        return weights
    from qmoe_format.codec.kernels.decode import scale_rows

    levels = decode(matrix.levels, threads=threads)
    refined = None if matrix.levels.refinement is None else True
    arguments = (levels, refined, *_scales(matrix), weights)
    in_parts(matrix.rows, threads, lambda first, last: scale_rows(first, last, *arguments))
    return weights


def dequantize_rows(
    matrix: Matrix, first: int, out: npt.NDArray[np.float32], threads: int = 1
) -> None:
    """Decode some rows to weights: those that ``dequantize`` would return.

    Quickest where ``first`` and ``first + len(out)`` are multiples of ``rows_per_segment``.

    Args:
        first: the row that goes into ``out[0]``.
        out: float32 [n, columns], contiguous.

    Raises:
        QMoEError: ``argument`` for another ``out`` or rows that do not exist; ``malformed`` for a
            segment that ends early. Only ``decode`` finds other damage.
    """
    check_array("out", out, np.float32, (None, matrix.columns), contiguous=True)
    last = first + len(out)
    if not 0 <= first <= last <= matrix.rows:
        raise QMoEError("argument", f"rows {first} to {last} do not exist, {matrix.rows} do")
    if isinstance(matrix, GroupedMatrix):
        int_group.dequantize_rows(matrix, first, out, threads)
    elif out.size:
        _dequantize_rows(matrix, first, last, out, threads)


def _dequantize_rows(
    matrix: EncodedMatrix, first: int, last: int, out: npt.NDArray[np.float32], threads: int
) -> None:
    from qmoe_format.codec.kernels.decode import weights_of_segments

    out[:] = 0
    levels = matrix.levels
    segments = (first // levels.rows_per_segment, -(-last // levels.rows_per_segment))
    arguments = (*kernel_strings(levels), *_scales(matrix), first, out)
    run_all([(weights_of_segments, *segments, arguments)], threads)


def _scales(matrix: EncodedMatrix) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Low and high; column scales; both contiguous."""
    column_scale = np.ones(matrix.columns, np.float32)
    if matrix.column_scale is not None:
        column_scale = np.ascontiguousarray(to_float32(matrix.column_scale, "BF16"))
    return np.ascontiguousarray(matrix.low_high()), column_scale
