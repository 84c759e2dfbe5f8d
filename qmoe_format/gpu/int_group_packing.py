"""A stack of ``int-group`` matrices as the kernels read it.

codes         uint8 [bytes]: the rows of all experts as stored, and GUARD zero bytes
scales        bf16 [groups of all experts], as stored
zero_points   uint8 [groups of all experts], as stored; empty without them
bases         uint64 [experts]: the expert's first group
runs_shift    int32 [experts]: binary logarithm of a group's number of runs of 32 columns
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import GroupedMatrix
from qmoe_format.errors import QMoEError
from qmoe_format.gpu.layout import MAX_WEIGHTS, Layout, places

RUN = 32  # columns that a lane takes at a time
GUARD = 16  # bytes of a row's last run that may come after the row
ROW_SHIFT = 26  # of a group that is a whole row


@dataclass(frozen=True, slots=True, eq=False)
class GroupLayout(Layout):
    """The layout of ``int-group`` matrices."""

    bits: int
    grid: str
    zero_points: bool


def common(matrix: GroupedMatrix) -> dict[str, Any]:
    """What has to be the same for all matrices of a stack."""
    return {
        "shape": matrix.shape,
        "number of bits": matrix.bits,
        "grid": matrix.grid,
        "presence of zero points": matrix.zero_points is not None,
    }


def layout(matrices: Sequence[GroupedMatrix]) -> GroupLayout:
    """Decide where everything goes; ``limit`` for rows that are too long for the kernels."""
    first = matrices[0]
    if first.rows and first.columns > MAX_WEIGHTS:
        raise QMoEError(
            "limit",
            f"a row of {first.columns} weights is too long for the kernels, which take "
            f"{MAX_WEIGHTS}",
        )
    groups = sum(matrix.scales.size for matrix in matrices)
    zero_points = first.zero_points is not None
    found, end = places(
        {
            "codes": (np.uint8, (sum(matrix.packed.size for matrix in matrices) + GUARD,)),
            "scales": (np.uint16, (groups,)),
            "zero_points": (np.uint8, (groups if zero_points else 0,)),
            "bases": (np.uint64, (len(matrices),)),
            "runs_shift": (np.int32, (len(matrices),)),
        }
    )
    return GroupLayout(
        experts=len(matrices),
        rows=first.rows,
        columns=first.columns,
        units=first.rows,
        places=found,
        bytes=end,
        bits=first.bits,
        grid=first.grid,
        zero_points=zero_points,
    )


def pieces(matrices: Sequence[GroupedMatrix]) -> Iterator[tuple[str, int, npt.NDArray[Any]]]:
    """What the arrays hold besides zeros: an array's name, an offset in bytes, and the values."""
    runs = [matrix.group_size // RUN for matrix in matrices]
    shifts = [size.bit_length() - 1 if size else ROW_SHIFT for size in runs]
    yield "runs_shift", 0, np.array(shifts, np.int32)
    groups = np.cumsum([0, *(matrix.scales.size for matrix in matrices)], dtype=np.uint64)
    yield "bases", 0, groups[:-1]
    for e, (matrix, base) in enumerate(zip(matrices, groups.tolist(), strict=False)):
        yield "codes", e * matrix.packed.nbytes, matrix.packed
        yield "scales", 2 * base, matrix.scales
        if matrix.zero_points is not None:
            yield "zero_points", base, matrix.zero_points
