"""Whole experts of packed matrices, with one token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array
from qmoe_format.codec.packed import PackedMatrix, parts_for, product_table
from qmoe_format.codec.threads import share


def multiply_gated(
    inputs: Sequence[PackedMatrix],
    outputs: Sequence[PackedMatrix],
    x: npt.NDArray[np.float32],
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """down(silu(gate x) * up x) of some experts, by all threads in one go.

    Args:
        inputs: of each expert one matrix, gate above up, or these two; all of one shape.
        outputs: of each expert down; all of one shape.
        x: float32 [columns], contiguous.

    Returns:
        float32 [experts, rows].

    Raises:
        QMoEError: ``argument`` for another x.
    """
    from qmoe_format.codec.kernels.gated import multiply_gated
    from qmoe_format.codec.kernels.packed import round_all

    check_array("x", x, np.float32, (inputs[0].columns,), contiguous=True)
    experts, inner = len(outputs), outputs[0].columns
    gates = np.empty((experts, 2 * inner), np.float32)
    hidden = np.empty((experts, inner), np.float32)
    y = np.empty((experts, outputs[0].rows), np.float32)
    first, _scratch = _of_one_token(inputs, x.ctypes.data, 0, gates)
    second, _scratch_of_outputs = _of_one_token(outputs, hidden.ctypes.data, 4 * inner, y)
    round_all(first)
    job = [0, 0, parts_for(threads), first.ctypes.data, len(first)]
    job += [0, 0, 0, second.ctypes.data, experts, gates.ctypes.data, hidden.ctypes.data, inner]
    share(multiply_gated(), np.array(job), threads)
    return y


def _of_one_token(
    matrices: Sequence[PackedMatrix], x: int, step: int, out: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """``product_table`` of matrices of one shape.

    Args:
        x: address of the first matrix's x; those of others follow ``step`` bytes apart.
        out: what the matrices' products are written to, one behind another.
    """
    target, bytes_out = out.ctypes.data, out.nbytes // len(matrices)
    return product_table(
        (matrix, 1, x + i * step, 0, target + i * bytes_out, 0) for i, matrix in enumerate(matrices)
    )
