"""A ternary matrix as stored: encoded levels and their scales (SPEC.md sections 7.1 and 7.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array
from qmoe_format.codec.dictionary import Dictionary, standard_dictionary
from qmoe_format.codec.profiles import FAST
from qmoe_format.codec.segments import EncodedLevels, decode, encode, kernel_segments, run_all
from qmoe_format.codec.threads import in_parts
from qmoe_format.dtypes import SCALE_DTYPES, STORAGE, to_float32
from qmoe_format.errors import QMoEError


@dataclass(frozen=True, slots=True)
class EncodedMatrix:
    """Levels and scales; weight = row scale of its level [x column scale].

    Attributes:
        row_scale: [rows, groups, 1] of s (low = -s, high = s), or [rows, groups, 2] of low, high.
        column_scale: [columns] or None.
        scale_dtype: ``BF16`` (arrays of uint16 bit patterns), ``F16`` or ``F32``.
        group_size: columns that share row scales; 0 for the whole row.

    Raises:
        QMoEError: ``argument`` if these do not fit each other; ``value`` if a scale is not finite.
    """

    levels: EncodedLevels
    row_scale: npt.NDArray[Any]
    column_scale: npt.NDArray[Any] | None
    scale_dtype: str
    group_size: int

    def __post_init__(self) -> None:
        if self.scale_dtype not in SCALE_DTYPES:
            raise QMoEError(
                "argument",
                f"scales cannot be stored as {self.scale_dtype!r}",
                f"use {', '.join(SCALE_DTYPES[:-1])} or {SCALE_DTYPES[-1]}",
            )
        if not 0 <= self.group_size < 1 << 31:
            raise QMoEError("argument", f"groups of {self.group_size} columns cannot be stored")
        dtype, shape = STORAGE[self.scale_dtype], (self.rows, self.groups, None)
        check_array(f"row_scale ({self.scale_dtype})", self.row_scale, dtype, shape)
        if not 1 <= self.row_scale.shape[2] <= 2:
            raise QMoEError("argument", f"groups have {self.row_scale.shape[2]} scales, not 1 or 2")
        scales = [self.row_scale]
        if self.column_scale is not None:
            name = f"column_scale ({self.scale_dtype})"
            check_array(name, self.column_scale, dtype, (self.columns,))
            scales.append(self.column_scale)
        if not all(np.isfinite(to_float32(scale, self.scale_dtype)).all() for scale in scales):
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
        return bool(self.row_scale.shape[2] == 1)

    @property
    def groups(self) -> int:
        """G, groups of columns that share row scales ([E-X])."""
        return -(-self.columns // self.group_size) if self.group_size else 1

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary of the codewords."""
        return self.levels.dictionary

    def low_high(self) -> npt.NDArray[np.float32]:
        """float32 [rows, groups, 2]: the values of levels -1 and +1 ([V-1])."""
        scale = to_float32(self.row_scale, self.scale_dtype)
        return np.concatenate([-scale, scale], axis=2) if self.symmetric else scale


def encode_matrix(
    levels: npt.NDArray[np.int8],
    row_scale: npt.NDArray[Any],
    column_scale: npt.NDArray[Any] | None = None,
    *,
    scale_dtype: str = "BF16",
    group_size: int = 0,
    dictionary: Dictionary | None = None,
    width: int = FAST.width,
    signs: str = "plane",
    rows_per_segment: int | None = None,
    threads: int = 1,
) -> EncodedMatrix:
    """Encode levels and attach their scales.

    Args:
        levels: int8 [rows, columns] of -1, 0, +1.
        row_scale: as in ``EncodedMatrix``, of the numpy type that ``scale_dtype`` is stored as.
        column_scale: likewise.
        dictionary: by default the standard one of ``width`` and ``signs`` for the share of zeros.
        rows_per_segment: by default as many as hold about 4096 weights (profile ``fast``).
        threads: do not change the result.

    Raises:
        QMoEError: as ``encode`` and ``EncodedMatrix``.

    Example:
        >>> from qmoe_format.codec import dequantize, encode_matrix
        >>> levels = np.array([[0, 0, 1, 0], [0, -1, 0, 1]], np.int8)
        >>> row_scale = np.array([0.5, 0.25], np.float32).reshape(2, 1, 1)
        >>> dequantize(encode_matrix(levels, row_scale, scale_dtype="F32"))
        array([[ 0.  ,  0.  ,  0.5 ,  0.  ],
               [ 0.  , -0.25,  0.  ,  0.25]], dtype=float32)
    """
    if dictionary is None:
        zero_fraction = 1.0 - np.count_nonzero(levels) / max(levels.size, 1)
        dictionary = standard_dictionary(zero_fraction, width, signs)
    encoded = encode(levels, dictionary, threads, rows_per_segment)
    return EncodedMatrix(encoded, row_scale, column_scale, scale_dtype, group_size)


def dequantize(matrix: EncodedMatrix, threads: int = 1) -> npt.NDArray[np.float32]:
    """Decode to weights float32 [rows, columns], exact to the bit ([V-1], [V-2]).

    Raises:
        QMoEError: as ``decode``.
    """
    from qmoe_format.codec.kernels.decode import scale_rows

    levels = decode(matrix.levels, threads=threads)
    weights = np.empty(levels.shape, np.float32)
    scales = _scales(matrix)
    in_parts(
        matrix.rows, threads, lambda first, last: scale_rows(first, last, levels, *scales, weights)
    )
    return weights


def dequantize_rows(
    matrix: EncodedMatrix, first: int, out: npt.NDArray[np.float32], threads: int = 1
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
    from qmoe_format.codec.kernels.decode import weights_of_segments
    from qmoe_format.codec.kernels.tables import tables

    columns = matrix.columns
    check_array("out", out, np.float32, (None, columns), contiguous=True)
    last = first + len(out)
    if not 0 <= first <= last <= matrix.rows:
        raise QMoEError("argument", f"rows {first} to {last} do not exist, {matrix.rows} do")
    out[:] = 0
    if not out.size:
        return
    group_size, low_high, column_scale = _scales(matrix)
    levels = matrix.levels
    segments = (first // levels.rows_per_segment, -(-last // levels.rows_per_segment))
    arguments = (
        kernel_segments(levels), tables(levels.dictionary).entries, (low_high, columns, group_size),
        column_scale, first, out,
    )  # fmt: skip
    run_all([(weights_of_segments, *segments, arguments)], threads)


def _scales(
    matrix: EncodedMatrix,
) -> tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Columns of a group; low and high; column scales; all contiguous."""
    column_scale = np.ones(matrix.columns, np.float32)
    if matrix.column_scale is not None:
        column_scale = np.ascontiguousarray(to_float32(matrix.column_scale, matrix.scale_dtype))
    group_size = matrix.group_size or max(matrix.columns, 1)
    return group_size, np.ascontiguousarray(matrix.low_high()), column_scale
