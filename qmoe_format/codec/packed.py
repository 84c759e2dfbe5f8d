"""A matrix in a layout for fast products: 2 or 4 bits a weight, whatever the file holds.

``pack`` decodes once; a product then costs about as much as reading the codes. x is rounded to int8
in blocks of 256 with a unit of their own, as in llama.cpp; sums are exact within a block, and in
float32 between them. The few levels beyond what the codes can hold are kept apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array
from qmoe_format.codec.matrix import EncodedMatrix, Matrix
from qmoe_format.codec.segments import decode
from qmoe_format.codec.threads import in_parts, share
from qmoe_format.dtypes import to_float32
from qmoe_format.errors import QMoEError

_EXCEPTION_BITS = 24  # of a level beyond the codes
_MOST_COLUMNS = 1 << 16  # columns of exceptions are uint16
_BEYOND = 16  # exceptions that kernels may read after the last one

_PARTS = 4  # of the rows, for each thread: where one is held up, others take more

PackedProduct = tuple["PackedMatrix", npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""W, x [tokens, columns] and out [tokens, rows]."""


@dataclass(frozen=True, eq=False, slots=True)
class PackedMatrix:
    """Levels as codes of 2 or 4 bits, exceptions, and scales as in ``EncodedMatrix``.

    Attributes:
        rows, columns: of the matrix.
        bits: of a code.
        two_scales: whether negative levels have a scale of their own; sums are then taken twice.
        codes, begins, places, excess, row_scale, column_scale: see ``kernels.packed.Product``.
        nbytes: of all arrays.
        fields: the first ones of ``kernels.packed.Product``.
    """

    rows: int
    columns: int
    bits: int
    two_scales: bool
    codes: npt.NDArray[np.uint8]
    begins: npt.NDArray[np.int64]
    places: npt.NDArray[np.uint16]
    excess: npt.NDArray[np.int8]
    row_scale: npt.NDArray[np.float32]
    column_scale: npt.NDArray[np.float32]
    nbytes: int = field(init=False)
    fields: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        exceptions = (self.begins, self.places, self.excess)
        arrays = (self.codes, *exceptions, self.row_scale, self.column_scale)
        object.__setattr__(self, "nbytes", sum(each.nbytes for each in arrays))
        codes, *parts, row_scale, column_scale = (each.ctypes.data for each in arrays)
        sizes = (self.bits, self.rows, self.columns, self.codes.shape[1])
        fields = (codes, *sizes, *parts, int(self.two_scales), row_scale, column_scale)
        object.__setattr__(self, "fields", fields)


def packable(matrix: Matrix) -> TypeGuard[EncodedMatrix]:
    """Whether ``pack`` takes a matrix: not integers in groups, not more than 65,536 columns."""
    some = matrix.rows * matrix.columns > 0
    return isinstance(matrix, EncodedMatrix) and some and matrix.columns <= _MOST_COLUMNS


def pack(matrix: Matrix, threads: int = 1) -> PackedMatrix:
    """Decode a matrix into the layout.

    Raises:
        QMoEError: ``argument`` if it is not ``packable``; as ``decode``.
    """
    if not packable(matrix):
        raise QMoEError("argument", "this matrix cannot be packed", "multiply it as it is stored")
    from qmoe_format.codec.kernels.packed import GROUP, LIMITS, count_beyond, pack_rows
    from qmoe_format.codec.kernels.rounding import BLOCK

    levels = decode(matrix.levels, threads=threads)
    rows, columns = levels.shape
    counts = np.zeros((rows, 2), np.int64)
    if matrix.levels.refinement is not None:
        in_parts(rows, threads, lambda first, last: count_beyond(first, last, levels, counts))
    costs = [
        bits * rows * columns + _EXCEPTION_BITS * int(beyond)
        for bits, beyond in zip(LIMITS, counts.sum(0), strict=True)
    ]
    choice = int(np.argmin(costs))
    bits = [*LIMITS][choice]
    begins = np.concatenate([[0], counts[:, choice].cumsum()])
    groups, blocks = -(-rows // GROUP), -(-columns // BLOCK)
    codes = np.zeros((groups, blocks, GROUP, bits * BLOCK // 8), np.uint8)
    places = np.zeros(begins[-1] + _BEYOND, np.uint16)
    excess = np.zeros(begins[-1] + _BEYOND, np.int8)
    arguments = (levels, bits, LIMITS[bits], codes, begins, places, excess)
    in_parts(rows, threads, lambda first, last: pack_rows(first, last, *arguments))
    column_scale = np.ones(columns, np.float32)
    if matrix.column_scale is not None:
        column_scale = np.ascontiguousarray(to_float32(matrix.column_scale, "BF16"))
    low, high = matrix.low_high().T
    row_scale = np.stack([(high - low) / 2, (high + low) / 2], 1)  # a level's, a magnitude's
    two_scales = bool(row_scale[:, 1].any())
    return PackedMatrix(
        rows, columns, bits, two_scales, codes, begins, places, excess, row_scale, column_scale
    )


def multiply_packed(products: Sequence[PackedProduct], threads: int = 1) -> None:
    """``out = x W^T`` for several matrices at once: threads share the rows of each of them.

    Args:
        products: x and out are float32, and their rows contiguous.

    Raises:
        QMoEError: ``argument`` for other arrays.
    """
    from qmoe_format.codec.kernels.packed import multiply_all, round_all

    if not products:
        return
    rows = []
    for matrix, x, out in products:
        tokens = len(x)
        _check("x", x, (tokens, matrix.columns))
        _check("out", out, (tokens, matrix.rows))
        places = x.ctypes.data, x.strides[0] // 4, out.ctypes.data, out.strides[0] // 4
        rows.append((matrix, tokens, *places))
    table, _scratch = product_table(rows)
    round_all(table)
    job = np.array([0, 0, parts_for(threads), table.ctypes.data, len(table)])
    share(multiply_all(), job, threads)


def product_table(
    products: Iterable[tuple[PackedMatrix, int, int, int, int, int]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Rows of ``kernels.packed.Product``, and the scratch memory that they point to.

    Args:
        products: matrix, tokens; address and stride, in elements, of x, and the same of out.
    """
    from qmoe_format.codec.kernels.packed import SCRATCH

    rows, scaled = [], 0
    for matrix, tokens, x, x_stride, out, out_stride in products:
        blocks = matrix.codes.shape[1]
        units = scaled + 4 * tokens * matrix.columns
        offsets = units + 4 * tokens * blocks
        rounded = offsets + 4 * tokens  # bytes after floats, so that all are aligned
        places = scaled, rounded, units, offsets
        rows.append((*matrix.fields, x, x_stride, tokens, *places, out, out_stride))
        scaled = rounded + 256 * tokens * blocks
    scratch, table = np.empty(scaled, np.uint8), np.array(rows)
    table[:, SCRATCH] += scratch.ctypes.data
    return table, scratch


def parts_for(threads: int) -> int:
    """Parts of products that threads share."""
    return 1 if threads == 1 else _PARTS * threads


def _check(name: str, array: npt.NDArray[np.float32], shape: tuple[int, int]) -> None:
    contiguous = array.strides[-1] == 4 or not array.size
    if array.shape != shape or array.dtype != np.float32 or not contiguous:
        check_array(name, array, np.float32, shape, contiguous=True)
