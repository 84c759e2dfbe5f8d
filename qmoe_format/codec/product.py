"""Products straight from the codewords: y = W x for one token or a few (SPEC.md section 7.4).

Column scales are multiplied into x once; the kernels add up x over the -1 and over the +1 trits of
a row, and the row's scales are applied to the two sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.matrix import EncodedMatrix
from qmoe_format.codec.segments import check, segment_arguments
from qmoe_format.codec.threads import over_rows
from qmoe_format.dtypes import to_float32
from qmoe_format.errors import QMoEError

_OVERRUN = 255  # the last entry of a row may reach this far beyond it


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
    from qmoe_format.codec import kernels

    x = _checked(x, (matrix.columns,), "x")
    out = _output(out, (matrix.rows,))
    if matrix.groups != 1:
        matmul(matrix, x[None], out[None], threads)
        return out
    scaled = _padded(matrix, x[None])[0]
    arguments, _ = segment_arguments(matrix.trits)
    sums = np.empty((matrix.rows, 2), np.float32)
    _run(kernels.dot_rows, matrix, threads, *arguments, np.uint64(matrix.columns), scaled, sums)
    sums *= matrix.low_high()[:, 0]
    return np.add(sums[:, 0], sums[:, 1], out=out)


def matmul(
    matrix: EncodedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """y[b] = W x[b], with x float32 [tokens, columns], y float32 [tokens, rows].

    For small batches: the work grows with tokens x non-zeros. Raises as ``matvec``.
    """
    from qmoe_format.codec import kernels
    from qmoe_format.codec.memory import TILE

    tokens = x.shape[0] if x.ndim == 2 else -1
    x = _checked(x, (tokens, matrix.columns), "x")
    out = _output(out, (tokens, matrix.rows))
    padded = _padded(matrix, x)
    arguments, _ = segment_arguments(matrix.trits)
    columns = np.uint64(matrix.columns)
    low_high = matrix.low_high()
    if matrix.groups != 1:
        by_group = np.empty((matrix.rows, matrix.groups, tokens, 2), np.float32)
        _run(
            kernels.dot_rows_by_group, matrix, threads, *arguments, columns,
            matrix.group_size or max(matrix.columns, 1), padded, by_group,
        )  # fmt: skip
        np.einsum("rgts,rgs->tr", by_group, low_high, out=out)
        return out
    tile = np.zeros((padded.shape[1], TILE), np.float32)
    sums = np.empty((matrix.rows, 2, TILE), np.float32)
    for first in range(0, tokens, TILE):
        count = min(TILE, tokens - first)
        tile[:, :count] = padded[first : first + count].T
        _run(kernels.dot_rows_tile, matrix, threads, *arguments, columns, tile, sums)
        y = sums[:, :, :count] * low_high[:, 0, :, None]
        out[first : first + count] = (y[:, 0] + y[:, 1]).T
    return out


def _run(kernel: Any, matrix: EncodedMatrix, threads: int, *arguments: Any) -> None:
    def work(first: int, last: int) -> int:
        return int(kernel(first, last, *arguments))

    check(over_rows(matrix.rows, threads, work))


def _padded(matrix: EncodedMatrix, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x [tokens, columns] times the column scales, and zeros where the last entry overruns."""
    padded = np.zeros((x.shape[0], matrix.columns + _OVERRUN), np.float32)
    if matrix.column_scale is None:
        padded[:, : matrix.columns] = x
    else:
        np.multiply(
            x,
            to_float32(matrix.column_scale, matrix.scale_dtype),
            out=padded[:, : matrix.columns],
        )
    return padded


def _checked(x: npt.NDArray[Any], shape: tuple[int, ...], name: str) -> npt.NDArray[np.float32]:
    if x.shape != shape or x.dtype != np.float32:
        raise QMoEError(
            "argument", f"{name} has to be float32 of shape {shape}, not {x.dtype} {x.shape}"
        )
    return x


def _output(out: npt.NDArray[np.float32] | None, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.empty(shape, np.float32) if out is None else _checked(out, shape, "out")
