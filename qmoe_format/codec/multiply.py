"""y = W x straight from the codewords, for one token or a few (SPEC.md section 7.4).

Column scales are multiplied into x once; the kernels add up x over the -1 and over the +1 levels of
each row and group, and apply the row scales to the two sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array, output
from qmoe_format.codec.matrix import EncodedMatrix
from qmoe_format.codec.segments import Call, kernel_segments, run_all
from qmoe_format.dtypes import to_float32

Matvec = tuple[EncodedMatrix, npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""W, x and out of one ``matvec``."""


def matvec(
    matrix: EncodedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Multiply a matrix with a vector.

    Args:
        matrix: W [rows, columns].
        x: float32 [columns].
        out: float32 [rows], to be overwritten and returned.

    Returns:
        W x, float32 [rows].

    Raises:
        QMoEError: ``argument`` for shapes or types that do not fit; ``malformed`` for a segment
            that ends early. Only ``decode`` finds other damage.

    Example:
        >>> from qmoe_format.codec import encode_matrix, matvec
        >>> levels = np.array([[0, 0, 1, 0], [0, -1, 0, 1]], np.int8)
        >>> matrix = encode_matrix(levels, np.ones((2, 1, 1), np.float32), scale_dtype="F32")
        >>> matvec(matrix, np.array([1, 2, 3, 4], np.float32))
        array([3., 2.], dtype=float32)
    """
    out = output(out, np.float32, (matrix.rows,), contiguous=False)
    matvecs([(matrix, x, out)], threads)
    return out


def matvecs(products: Sequence[Matvec], threads: int = 1) -> None:
    """Do several ``matvec`` (matrix, x, out) at once: threads share each of them.

    Raises:
        QMoEError: as ``matvec``.
    """
    run_all([matvec_call(*product) for product in products if product[2].size], threads)


def matvec_call(
    matrix: EncodedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
    dense: bool | None = None,
) -> Call:
    """A ``matvec`` to be run.

    Args:
        dense: whether to use ``dot_dense`` if the entries are short enough; by default where it is
            the faster kernel.
    """
    from qmoe_format.codec.kernels.dot import BEYOND_X, PREFER_DENSE, dot_dense, dot_sparse
    from qmoe_format.codec.kernels.tables import tables

    levels = matrix.levels
    columns = levels.columns
    padded = np.zeros(columns + BEYOND_X, np.float32)
    check_array("x", x, np.float32, (columns,))
    padded[:columns] = _scaled(matrix, x)
    check_array("out", out, np.float32, (levels.rows,))
    if not columns:
        out[:] = 0
    table = tables(levels.dictionary)
    kernel: Any = dot_sparse
    entries = table.entries
    if table.masks.size and (PREFER_DENSE if dense is None else dense):
        kernel, entries = dot_dense, (table.masks, table.negative, table.longest)
    arguments = (kernel_segments(levels), entries, _row_scales(matrix), padded, out)
    return kernel, 0, levels.count, arguments


def matmul(
    matrix: EncodedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """Multiply a matrix with a small batch: the work grows with tokens x non-zeros.

    Args:
        matrix: W [rows, columns].
        x: float32 [tokens, columns].
        out: float32 [tokens, rows], to be overwritten and returned.

    Returns:
        x W^T, float32 [tokens, rows].

    Raises:
        QMoEError: as ``matvec``.
    """
    from qmoe_format.codec.kernels.dot import dot_tile
    from qmoe_format.codec.kernels.simd import WIDTH
    from qmoe_format.codec.kernels.tables import tables

    levels = matrix.levels
    check_array("x", x, np.float32, (None, levels.columns))
    scaled, tokens = _scaled(matrix, x), len(x)
    out = output(out, np.float32, (tokens, levels.rows), contiguous=False)
    tile = np.zeros((max(levels.columns, 1), WIDTH), np.float32)
    sums = np.zeros((levels.rows, WIDTH), np.float32)
    arguments = (
        kernel_segments(levels), tables(levels.dictionary).entries, _row_scales(matrix), tile, sums
    )  # fmt: skip
    for first in range(0, tokens, WIDTH):
        part = slice(first, min(first + WIDTH, tokens))
        count = part.stop - first
        tile[: levels.columns, :count] = scaled[part].T
        run_all([(dot_tile, 0, levels.count, arguments)], threads)
        out[part] = sums[:, :count].T
    return out


def _row_scales(matrix: EncodedMatrix) -> tuple[npt.NDArray[Any], int, int]:
    """``kernels.cursor.Scales``: bf16 bits or float32; columns; columns of a group."""
    values = matrix.row_scale
    if matrix.scale_dtype == "F16":
        values = values.astype(np.float32)
    columns = matrix.levels.columns or 1  # an empty row is never reached, only divided by
    return values, columns, matrix.group_size or columns


def _scaled(matrix: EncodedMatrix, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x times the column scales."""
    if matrix.column_scale is None:
        return x
    return x * to_float32(matrix.column_scale, matrix.scale_dtype)
