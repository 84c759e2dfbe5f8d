"""Encoding ``int-group``: the extent of a matrix of integers in groups (SPEC.md section 8).

The extent is the arrays of a ``GroupedMatrix`` one after the other, so ``encoded`` copies nothing.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format import codec
from qmoe_format.codec.int_group import BITS, GRIDS, GROUP_SIZES, groups_of, row_bytes
from qmoe_format.container.encodings.base import (
    Encoding,
    GetDictionary,
    Payload,
    Sink,
    as_bytes,
    wrong_type,
)
from qmoe_format.container.encodings.int_dict import check_matrix
from qmoe_format.container.entries import Item, Parameter
from qmoe_format.container.extent_table import align
from qmoe_format.dtypes import STORAGE, Bytes, from_float32
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec import GroupedMatrix

_ALIGNMENT = 16
_HEADER = struct.Struct("<I12x")  # group size
_USED = 4  # bytes of the header


class IntGroup(Encoding):
    """Integers of 2 to 8 bits, values from scales and zero points of groups of columns."""

    name = "int-group"
    defaults = {"bits": 4, "grid": "linear", "zero_points": False}  # noqa: RUF012 -- never changed
    header_bytes = _HEADER.size
    multipliable = True

    def check_entry(self, item: Item) -> None:
        p = item.parameters
        check_matrix(item)
        if p["bits"] not in BITS or p["grid"] not in GRIDS:  # [G-1]
            raise QMoEError("malformed", f"there is no grid {p['grid']!r} of {p['bits']} bits")
        if p["grid"] == "log" and p["zero_points"]:  # [G-1]
            raise QMoEError("malformed", "the grid log has no zero points")

    def encoded(self, stored: Bytes, item: Item, dictionary: GetDictionary) -> GroupedMatrix:
        """The extent as a matrix of views; everything is checked.

        Raises:
            QMoEError: ``malformed``, ``padding``, ``value``.
        """
        group_size = _group_size(stored)
        sections, end = _layout(item, group_size)
        if stored.size != end:  # [G-3] [N-3]
            raise QMoEError("malformed", f"{stored.size} bytes are stored, not {end}")
        starts = [*(each.start for each in sections), end]
        stops = [_USED, *(each.stop for each in sections)]
        if any(stored[a:b].any() for a, b in zip(stops, starts, strict=True)):  # [G-4]
            raise QMoEError("padding", "bytes between the parts of a matrix are not zero")
        rows, columns = item.shape
        p = item.parameters
        groups = rows, groups_of(columns, group_size)
        scales, zero_points, packed = (stored[each] for each in sections)
        packed = packed.reshape(rows, row_bytes(columns, p["bits"]))
        full, more = divmod(columns * p["bits"], 8)
        if (packed[:, full : full + 1] >> more).any() or packed[:, full + 1 :].any():  # [G-4]
            raise QMoEError("padding", "bits after the last weight of a row are not zero")
        if int(zero_points.max(initial=0)) >> p["bits"]:  # [G-5]
            raise QMoEError("malformed", f"a zero point is beyond {p['bits']} bits")
        return codec.GroupedMatrix(  # checks [G-5] of the scales
            columns=columns,
            bits=p["bits"],
            grid=p["grid"],
            group_size=group_size,
            scales=scales.view("<u2").reshape(groups),
            zero_points=zero_points.reshape(groups) if p["zero_points"] else None,
            packed=packed,
        )

    def decode(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> npt.NDArray[Any]:
        matrix = self._of_known_type(stored, item, dictionary)
        return from_float32(codec.dequantize(matrix, threads), item.dtype)  # [G-8]

    def verify(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> None:
        self._of_known_type(stored, item, dictionary)

    def _of_known_type(self, stored: Bytes, item: Item, dictionary: GetDictionary) -> GroupedMatrix:
        """``encoded``, of an element type that can be decoded to."""
        if item.dtype not in STORAGE:  # [T-5]
            raise QMoEError("unsupported", f"element type {item.dtype!r} is unknown")
        return self.encoded(stored, item, dictionary)

    def payload(self, header: Bytes, item: Item) -> Payload:
        _group_size(header)
        rows, columns = item.shape
        return Payload(rows * row_bytes(columns, item.parameters["bits"]))

    def parameters_of(self, value: Any) -> dict[str, Parameter]:
        if not isinstance(value, codec.GroupedMatrix):
            return {}
        return {
            "bits": value.bits,
            "grid": value.grid,
            "zero_points": value.zero_points is not None,
        }

    def check_value(self, value: Any, item: Item) -> None:
        if not isinstance(value, codec.GroupedMatrix):
            raise wrong_type(self, value, "a GroupedMatrix (codec.pack_groups)")
        declared = {"shape": item.shape, **item.parameters}
        for key, actual in {"shape": value.shape, **self.parameters_of(value)}.items():
            if declared[key] != actual:
                raise QMoEError(
                    "argument",
                    f"{key} of the matrix is {actual}, not {declared[key]}",
                    "give a matrix as declared, or declare another one",
                )

    def encode(self, value: GroupedMatrix, item: Item, sink: Sink) -> None:
        sections, end = _layout(item, value.group_size)
        extent = np.zeros(end, np.uint8)
        _HEADER.pack_into(extent.data, 0, value.group_size)
        arrays = (value.scales, value.zero_points, value.packed)
        for section, array in zip(sections, arrays, strict=True):
            if array is not None:
                extent[section] = as_bytes(array)
        sink.write(extent.data)


def _group_size(header: Bytes) -> int:
    """What the header says. [G-3]"""
    if header.size < _HEADER.size:
        raise QMoEError("malformed", f"{header.size} bytes are too few for a header")
    (size,) = _HEADER.unpack_from(header.data)
    if size not in GROUP_SIZES:
        raise QMoEError("malformed", f"groups have {size} columns, not 0, 32, 64 or 128")
    return int(size)


def extent_length(item: Item, group_size: int) -> int:
    """Bytes of the extent of a matrix."""
    return _layout(item, group_size)[1]


def _layout(item: Item, group_size: int) -> tuple[list[slice], int]:
    """Where the three sections of an extent are, and its length.

    Python's integers do not wrap around. [N-2]
    """
    rows, columns = item.shape
    p = item.parameters
    groups = rows * groups_of(columns, group_size)
    end = _HEADER.size
    sections = []
    for length in (
        2 * groups,
        groups if p["zero_points"] else 0,
        rows * row_bytes(columns, p["bits"]),
    ):
        start = align(end, _ALIGNMENT)
        end = start + length
        sections.append(slice(start, end))
    return sections, align(end, _ALIGNMENT)
