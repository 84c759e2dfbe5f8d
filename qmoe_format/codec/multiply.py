"""y = W x straight from the codewords, for one token or a few (SPEC.md section 7.4).

Column scales are multiplied into x once; the kernels add up x, times magnitudes if there are any,
over the negative and over the positive levels of each row, and apply the row scales to both sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import int_group
from qmoe_format.codec.arrays import check_array, output
from qmoe_format.codec.int_group import GroupedMatrix
from qmoe_format.codec.matrix import EncodedMatrix, Matrix
from qmoe_format.codec.segments import Call, kernel_strings, run_all
from qmoe_format.dtypes import to_float32

Matvec = tuple[Matrix, npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""W, x and out of one ``matvec``."""


def matvec(
    matrix: Matrix,
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
        >>> levels = np.array([[0, 0, 1, 0], [0, -1, 0, 2]], np.int8)
        >>> matrix = encode_matrix(levels, np.full((2, 1), 0x3F80, np.uint16))  # scales of 1
        >>> matvec(matrix, np.array([1, 2, 3, 4], np.float32))
        array([3., 6.], dtype=float32)
    """
    out = output(out, np.float32, (matrix.rows,), contiguous=False)
    matvecs([(matrix, x, out)], threads)
    return out


def matvecs(products: Sequence[Matvec], threads: int = 1) -> None:
    """Do several ``matvec`` (matrix, x, out) at once: threads share each of them.

    Raises:
        QMoEError: as ``matvec``.
    """
    run_all([matvec_call(*each) for each in products if each[2].size], threads)


def matvec_call(
    matrix: Matrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
    dense: bool | None = None,
) -> Call:
    """A ``matvec`` to be run.

    Args:
        dense: whether a ternary matrix is multiplied by a kernel that takes a step for each weight;
            by default where it is faster than one that takes a step for each non-zero.
    """
    if isinstance(matrix, GroupedMatrix):
        return int_group.matvec_call(matrix, x, out)
    from qmoe_format.codec.kernels.dot import BEYOND_X, DENSE_UNTIL, dot_dense, dot_sparse
    from qmoe_format.codec.kernels.tables import tables

    levels = matrix.levels
    columns = levels.columns
    padded = np.zeros(max(columns, 1) + BEYOND_X, np.float32)
    check_array("x", x, np.float32, (columns,))
    padded[:columns] = _scaled(matrix, x)
    check_array("out", out, np.float32, (levels.rows,))
    if not columns:
        out[:] = 0
    strings, last = kernel_strings(levels), (matrix.row_scale, padded, out)
    if dense is None:
        dense = levels.zero_fraction < DENSE_UNTIL
    if dense and not levels.refinement:
        patterns = tables(levels.dictionary).patterns
        return dot_dense, 0, levels.count, (*strings[:3], patterns, *last)
    return dot_sparse, 0, levels.count, (*strings, *last)


def matmul(
    matrix: Matrix,
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
    if isinstance(matrix, GroupedMatrix):
        return int_group.matmul(matrix, x, out, threads)
    from qmoe_format.codec.kernels.dot import dot_tile
    from qmoe_format.codec.kernels.simd import WIDTH

    levels = matrix.levels
    check_array("x", x, np.float32, (None, levels.columns))
    scaled, tokens = _scaled(matrix, x), len(x)
    out = output(out, np.float32, (tokens, levels.rows), contiguous=False)
    tile = np.zeros((max(levels.columns, 1), WIDTH), np.float32)
    sums = np.zeros((levels.rows, WIDTH), np.float32)
    arguments = (*kernel_strings(levels), matrix.row_scale, tile, sums)
    for first in range(0, tokens, WIDTH):
        part = slice(first, min(first + WIDTH, tokens))
        count = part.stop - first
        tile[: levels.columns, :count] = scaled[part].T
        run_all([(dot_tile, 0, levels.count, arguments)], threads)
        out[part] = sums[:, :count].T
    return out


def _scaled(matrix: EncodedMatrix, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x times the column scales."""
    if matrix.column_scale is None:
        return x
    return x * to_float32(matrix.column_scale, "BF16")
