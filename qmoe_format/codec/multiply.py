"""Products straight from the codewords: y = W x for one token or a few (SPEC.md section 7.4).

Column scales are multiplied into x once; the kernels add up x over the -1 and over the +1 trits of
each row and group, and the row scales are applied to the two sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.matrix import EncodedMatrix
from qmoe_format.codec.segments import Call, run, run_all, segment_arguments
from qmoe_format.dtypes import to_float32
from qmoe_format.errors import QMoEError

Product = tuple[EncodedMatrix, npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""W, x and the y to be written of a ``matvec``."""


def matvec(
    matrix: EncodedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """y = W x: W [rows, columns], x float32 [columns], y float32 [rows], into ``out`` if given.

    Raises ``QMoEError``: ``argument`` for shapes or types that do not fit, ``malformed`` for a
    segment that ends early. Other damage is for ``decode`` to find.
    """
    out = _output(out, (matrix.rows,))
    matvecs([(matrix, x, out)], threads)
    return out


def matvecs(products: Sequence[Product], threads: int = 1) -> None:
    """``matvec`` of each (matrix, x, out), with threads started once for all. Raises as it does."""
    run_all([_call(*product) for product in products if product[2].size], threads)


def _call(matrix: EncodedMatrix, x: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> Call:
    from qmoe_format.codec.kernels.dot import BEYOND_X, HAS_MASKS, dot_dense, dot_sparse
    from qmoe_format.codec.tables import tables

    padded = np.zeros(matrix.columns + BEYOND_X, np.float32)
    padded[: matrix.columns] = _scaled(matrix, _checked(x, (matrix.columns,), "x"))
    _checked(out, (matrix.rows,), "out")
    if not matrix.columns:
        out[:] = 0
    trits, dictionary = matrix.trits, matrix.dictionary
    columns = max(matrix.columns, 1)  # an empty row is never reached, only divided by
    look_up = tables(dictionary)
    kernel: Any = dot_sparse
    entries: tuple[Any, ...] = (look_up.positions, look_up.steps, look_up.nonzeros)
    if look_up.masks.size and HAS_MASKS:
        kernel, entries = dot_dense, (look_up.masks, look_up.negative)
    return kernel, range(trits.count), (
        trits.segments, trits.lengths, np.uint64(trits.length_base),
        np.uint64(dictionary.width), dictionary.signs == "codeword",
        *entries, np.uint64(dictionary.max_length), trits.rows_per_segment * trits.columns,
        columns, matrix.group_size or columns, _row_scale(matrix), padded, out,
    )  # fmt: skip


def matmul(
    matrix: EncodedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """y[b] = W x[b], with x float32 [tokens, columns], y float32 [tokens, rows].

    For small batches: the work grows with tokens x non-zeros. Raises as ``matvec``.
    """
    from qmoe_format.codec.kernels.dot import dot_tile
    from qmoe_format.codec.kernels.simd import WIDTH

    tokens = x.shape[0] if x.ndim == 2 else -1
    scaled = _scaled(matrix, _checked(x, (tokens, matrix.columns), "x"))
    out = _output(out, (tokens, matrix.rows))
    columns = max(matrix.columns, 1)
    tile = np.zeros((columns, WIDTH), np.float32)
    sums = np.zeros((matrix.rows, WIDTH), np.float32)
    for first in range(0, tokens, WIDTH):
        part = slice(first, min(first + WIDTH, tokens))
        count = part.stop - first
        tile[: matrix.columns, :count] = scaled[part].T
        run(
            dot_tile, range(matrix.trits.count), threads,
            *segment_arguments(matrix.trits), columns, matrix.group_size or columns,
            _row_scale(matrix), tile, sums,
        )  # fmt: skip
        out[part] = sums[:, :count].T
    return out


def _row_scale(matrix: EncodedMatrix) -> npt.NDArray[Any]:
    """As kernels take them: bf16 bits, or float32."""
    return matrix.row_scale.astype(np.float32) if matrix.scale_dtype == "F16" else matrix.row_scale


def _scaled(matrix: EncodedMatrix, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x times the column scales, contiguous."""
    if matrix.column_scale is None:
        return np.ascontiguousarray(x)
    return x * to_float32(matrix.column_scale, matrix.scale_dtype)


def _checked(x: npt.NDArray[Any], shape: tuple[int, ...], name: str) -> npt.NDArray[np.float32]:
    if x.shape != shape or x.dtype != np.float32:
        raise QMoEError(
            "argument", f"{name} has to be float32 of shape {shape}, not {x.dtype} {x.shape}"
        )
    return x


def _output(out: npt.NDArray[np.float32] | None, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.empty(shape, np.float32) if out is None else _checked(out, shape, "out")
