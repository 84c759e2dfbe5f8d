"""A ternary matrix as stored: coded trits and their scales (SPEC.md sections 7.1 and 7.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.dictionary import Dictionary, standard_dictionary
from qmoe_format.codec.profiles import FAST
from qmoe_format.codec.segments import EncodedTrits, decode, encode, run, segment_arguments
from qmoe_format.codec.threads import in_parts
from qmoe_format.dtypes import SCALE_DTYPES, STORAGE, to_float32
from qmoe_format.errors import QMoEError


@dataclass(frozen=True, slots=True)
class EncodedMatrix:
    """Trits and scales; weight = row scale of its trit [x column scale].

    ``row_scale``     [rows, groups, 1] of s (low = -s, high = s), or [rows, groups, 2] of low, high
    ``column_scale``  [columns] or None
    ``scale_dtype``   ``BF16`` (arrays of uint16 bit patterns), ``F16`` or ``F32``
    ``group_size``    columns that share a pair of scales; 0: the whole row

    Raises ``QMoEError``: ``argument`` if these do not fit, ``value`` if a scale is not finite.
    """

    trits: EncodedTrits
    row_scale: npt.NDArray[Any]
    column_scale: npt.NDArray[Any] | None
    scale_dtype: str
    group_size: int

    def __post_init__(self) -> None:
        if self.scale_dtype not in SCALE_DTYPES or not 0 <= self.group_size < 1 << 31:
            raise QMoEError(
                "argument",
                f"scales of type {self.scale_dtype!r} in groups of {self.group_size} columns "
                f"cannot be stored: types are {', '.join(SCALE_DTYPES)}",
            )
        shape = (self.rows, self.groups)
        if self.row_scale.ndim != 3 or self.row_scale.shape[2] not in (1, 2):
            raise QMoEError("argument", "row scales have the shape [rows, groups, 1 or 2]")
        if self.row_scale.shape[:2] != shape:
            raise QMoEError(
                "argument", f"row scales are for {self.row_scale.shape[:2]} groups, not {shape}"
            )
        if self.column_scale is not None and self.column_scale.shape != (self.columns,):
            raise QMoEError("argument", f"there are {self.columns} columns to scale")
        for what, scale in (("row", self.row_scale), ("column", self.column_scale)):
            if scale is None:
                continue
            if scale.dtype != STORAGE[self.scale_dtype]:
                raise QMoEError(
                    "argument", f"{what} scales of type {self.scale_dtype} come as {scale.dtype}"
                )
            if not np.isfinite(to_float32(scale, self.scale_dtype)).all():
                raise QMoEError("value", f"a {what} scale is infinite or NaN")  # [E-7] [W-3]

    @property
    def rows(self) -> int:
        """R."""
        return self.trits.rows

    @property
    def columns(self) -> int:
        """C."""
        return self.trits.columns

    @property
    def symmetric(self) -> bool:
        """Whether low = -high."""
        return bool(self.row_scale.shape[2] == 1)

    @property
    def groups(self) -> int:
        """G, groups of columns with scales of their own ([E-2])."""
        return -(-self.columns // self.group_size) if self.group_size else 1

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary of the codewords."""
        return self.trits.dictionary

    def low_high(self) -> npt.NDArray[np.float32]:
        """float32 [rows, groups, 2]: the values of trits -1 and +1 ([V-1])."""
        scale = to_float32(self.row_scale, self.scale_dtype)
        return np.concatenate([-scale, scale], axis=2) if self.symmetric else scale


def encode_matrix(
    trits: npt.NDArray[np.int8],
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
    """Code ``trits`` int8 [rows, columns]; scales as in ``EncodedMatrix``, already in storage form.

    Without ``dictionary`` the standard one for the trits' share of zeros is taken; for
    ``rows_per_segment`` see ``encode``.
    """
    if dictionary is None:
        zero_fraction = 1.0 - np.count_nonzero(trits) / max(trits.size, 1)
        dictionary = standard_dictionary(zero_fraction, width, signs)
    encoded = encode(trits, dictionary, threads, rows_per_segment)
    return EncodedMatrix(encoded, row_scale, column_scale, scale_dtype, group_size)


def dequantize(matrix: EncodedMatrix, threads: int = 1) -> npt.NDArray[np.float32]:
    """The weights float32 [rows, columns], exact to the bit ([V-1], [V-2]).

    Raises ``QMoEError`` as ``decode`` does.
    """
    from qmoe_format.codec.kernels.decode import scale_rows

    trits = decode(matrix.trits, threads=threads)
    weights = np.empty(trits.shape, np.float32)
    scales = _scales(matrix)
    in_parts(
        matrix.rows, threads, lambda first, last: scale_rows(first, last, trits, *scales, weights)
    )
    return weights


def dequantize_rows(
    matrix: EncodedMatrix, first: int, out: npt.NDArray[np.float32], threads: int = 1
) -> None:
    """Rows ``first`` to ``first + len(out)`` of ``dequantize`` into ``out`` float32 [n, columns].

    Quickest where ``first`` and ``first + len(out)`` are multiples of the rows of a segment. Raises
    ``QMoEError``: ``argument`` for another type or shape, rows that there are not, or gaps in
    ``out``; ``malformed`` for a segment that ends early. Other damage is for ``decode`` to find.
    """
    from qmoe_format.codec.kernels.decode import weights_of_segments

    if (
        out.dtype != np.float32
        or out.ndim != 2
        or out.shape[1] != matrix.columns
        or not out.flags.c_contiguous
    ):
        raise QMoEError(
            "argument",
            f"out has to be a contiguous float32 array [rows, {matrix.columns}], "
            f"not {out.dtype} {out.shape}",
        )
    last = first + len(out)
    if not 0 <= first <= last <= matrix.rows:
        raise QMoEError("argument", f"there are no rows {first} to {last} of {matrix.rows}")
    out[:] = 0
    if not out.size:
        return
    group_size, low_high, column_scale = _scales(matrix)
    together = matrix.trits.rows_per_segment
    run(
        weights_of_segments, range(first // together, -(-last // together)), threads,
        *segment_arguments(matrix.trits), matrix.columns, group_size, low_high, column_scale,
        first, out,
    )  # fmt: skip


def _scales(
    matrix: EncodedMatrix,
) -> tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Columns of a group; low and high; column scales."""
    column_scale = np.ones(matrix.columns, np.float32)
    if matrix.column_scale is not None:
        column_scale = to_float32(matrix.column_scale, matrix.scale_dtype)
    return matrix.group_size or max(matrix.columns, 1), matrix.low_high(), column_scale
