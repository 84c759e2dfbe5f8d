"""y = W x straight from the codewords, with x rounded to int8 as for packed matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array
from qmoe_format.codec.matrix import EncodedMatrix
from qmoe_format.codec.packed import packable
from qmoe_format.codec.segments import Call, kernel_strings, run_all
from qmoe_format.dtypes import to_float32
from qmoe_format.errors import QMoEError

RoundedProduct = tuple[EncodedMatrix, npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""W, x [tokens, columns] and out [tokens, rows]."""


def multiply_rounded(products: Sequence[RoundedProduct], threads: int = 1) -> None:
    """``out = x W^T`` for several matrices at once: threads share the rows of each of them.

    The result is that of ``multiply_packed`` but for the order of sums.

    Raises:
        QMoEError: ``argument`` for other arrays, and for matrices that are not ``packable``;
            ``malformed`` for a segment that ends early, as in ``matvec``.
    """
    run_all([call for product in products for call in rounded_calls(*product)], threads)


def rounded_calls(
    matrix: EncodedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
    dense: bool | None = None,
) -> list[Call]:
    """A product to be run.

    Args:
        dense: see ``matvec_call``; otherwise tokens come one at a time.
    """
    from qmoe_format.codec.kernels.dot import BEYOND_X, dot_sparse
    from qmoe_format.codec.kernels.dot_rounded import DENSE_UNTIL, dot_rounded
    from qmoe_format.codec.kernels.rounding import BLOCK, round_tokens
    from qmoe_format.codec.kernels.tables import tables

    if not packable(matrix):
        raise QMoEError("argument", "x of this product cannot be rounded", "use matmul")
    levels, (tokens, columns) = matrix.levels, x.shape
    check_array("x", x, np.float32, (tokens, matrix.columns))
    check_array("out", out, np.float32, (tokens, matrix.rows))
    scaled = np.zeros((tokens, columns + BEYOND_X), np.float32)
    scaled[:, :columns] = x
    if matrix.column_scale is not None:
        scaled[:, :columns] *= to_float32(matrix.column_scale, "BF16")
    blocks = -(-columns // BLOCK)
    rounded = np.empty((tokens, blocks * BLOCK), np.int8)
    units = np.empty((tokens, blocks), np.float32)
    round_tokens(scaled, columns, rounded, units)
    strings = kernel_strings(levels)
    if dense is None:
        dense = levels.zero_fraction < DENSE_UNTIL[tokens > 1]
    if dense and not levels.refinement:
        patterns = tables(levels.dictionary).patterns
        last = (patterns, columns, matrix.row_scale, rounded, units, out)
        return [(dot_rounded, 0, levels.count, (*strings[:3], *last))]
    return [
        (dot_sparse, 0, levels.count, (*strings, matrix.row_scale, scaled[i], out[i]))
        for i in range(tokens)
    ]
