"""Lay out matrices of one encoding as a stack. Pure numpy: nothing here needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import EncodedMatrix, GroupedMatrix
from qmoe_format.errors import QMoEError
from qmoe_format.gpu import int_dict_packing, int_group_packing
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.int_group_packing import GroupLayout
from qmoe_format.gpu.runs import PackedRuns

Matrix = EncodedMatrix | GroupedMatrix
Layout = DictLayout | GroupLayout


@dataclass(frozen=True, slots=True)
class PackedStack:
    """A stack ready for the kernels.

    Attributes:
        arrays: numpy's or a device's, by name, in the order of the kernels' parameters; with runs,
            none.
        runs: ``int-dict`` matrices in the form for fast products, in place of their codewords.
    """

    layout: Layout
    arrays: dict[str, Any]
    runs: PackedRuns | None = None


def pack(matrices: Sequence[Matrix]) -> PackedStack:
    """Pack ``matrices`` into numpy's memory; errors as in ``alike``."""
    matrices = alike(matrices)
    plan = layout(matrices)
    buffer = np.zeros(plan.bytes, np.uint8)
    for offset, data in pieces(plan, matrices):
        buffer[offset : offset + data.size] = data
    return PackedStack(plan, plan.arrays(buffer))


def alike(matrices: Sequence[Matrix]) -> Sequence[Matrix]:
    """The matrices, some encoded anew if their codewords differ in width.

    Raises:
        QMoEError: ``argument`` for no matrix, or matrices that cannot form a stack; the codes of
            ``codec.decode`` for damage in a matrix that has to be encoded anew.
    """
    if not matrices:
        raise QMoEError("argument", "there is no matrix to upload", "give at least one")
    first = _common(matrices[0])
    for number, matrix in enumerate(matrices):
        for what, value in _common(matrix).items():
            if first[what] != value:
                raise QMoEError(
                    "argument",
                    f"matrix {number}: {what} is {value}, of matrix 0 it is {first[what]}",
                    "upload matrices that differ in more than their weights separately",
                )
    encoded, grouped = _by_encoding(matrices)
    return grouped or int_dict_packing.of_one_width(encoded)


def layout(matrices: Sequence[Matrix]) -> Layout:
    """Decide where everything goes, for matrices that are ``alike``.

    Raises:
        QMoEError: ``limit`` for a segment or row that is too large for the kernels.
    """
    encoded, grouped = _by_encoding(matrices)
    return int_group_packing.layout(grouped) if grouped else int_dict_packing.layout(encoded)


def pieces(
    layout: Layout, matrices: Sequence[Matrix]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """What the buffer holds besides zeros: offsets and bytes, uint8."""
    encoded, grouped = _by_encoding(matrices)
    module = int_group_packing if grouped else int_dict_packing
    for name, offset, array in module.pieces(grouped or encoded):
        yield (
            layout.places[name][0] + offset,
            np.ascontiguousarray(array).reshape(-1).view(np.uint8),
        )


def _common(matrix: Matrix) -> dict[str, Any]:
    """What is the same for all matrices of a stack."""
    if isinstance(matrix, GroupedMatrix):
        return {"encoding": "int-group", **int_group_packing.common(matrix)}
    return {"encoding": "int-dict", **int_dict_packing.common(matrix)}


def _by_encoding(
    matrices: Sequence[Matrix],
) -> tuple[list[EncodedMatrix], list[GroupedMatrix]]:
    """``int-dict`` and ``int-group``; one of them is empty."""
    encoded = [matrix for matrix in matrices if isinstance(matrix, EncodedMatrix)]
    return encoded, [matrix for matrix in matrices if isinstance(matrix, GroupedMatrix)]
