"""Encoding ``int-dict``: the extent of a ternary matrix (SPEC.md section 7.1).

The extent is the arrays of an ``EncodedMatrix`` one after the other, so ``encoded`` copies nothing;
the codec knows what the segments mean.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format import codec
from qmoe_format.codec.dictionary import SIGN_MODES
from qmoe_format.codec.segments import BLOCK, GUARD
from qmoe_format.container import limits
from qmoe_format.container.encodings.base import (
    Encoding,
    GetDictionary,
    Sink,
    as_bytes,
    wrong_type,
)
from qmoe_format.container.entries import Item, Parameter
from qmoe_format.container.extent_table import align
from qmoe_format.dtypes import SCALE_DTYPES, STORAGE, Bytes, from_float32
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec import EncodedMatrix

DTYPES = ("BF16", "F16", "F32", "F64")  # [E-2]
_ALIGNMENT = 16
# dictionary, length base, length width, zeros, non-zeros, segment bytes
_HEADER = struct.Struct("<IIB7sQQ")


class IntDict(Encoding):
    """Levels in codewords of a dictionary, values from scales of rows, groups and columns."""

    name = "int-dict"
    defaults = {  # noqa: RUF012 -- never changed
        "column_scale": False,
        "group_size": 0,
        "rows_per_segment": 1,
        "scale_dtype": "BF16",
        "signs": "plane",
        "symmetric": False,
        "width": codec.PROFILES["fast"].width,
    }
    header_bytes = _HEADER.size
    multipliable = True

    def check_entry(self, item: Item) -> None:
        p = item.parameters
        if item.dtype not in DTYPES and item.dtype in STORAGE:  # [E-2]
            raise QMoEError("malformed", f"a ternary matrix cannot be {item.dtype}")
        if len(item.shape) != 2:  # [E-2]
            raise QMoEError("malformed", f"a matrix has 2 dimensions, not {len(item.shape)}")
        for side in item.shape:
            limits.check("a side of a ternary matrix", side, 0, limits.MATRIX_SIDE)
        limits.check("group_size", p["group_size"], 0, limits.GROUP_SIZE)
        limits.check("rows_per_segment", p["rows_per_segment"], *limits.ROWS_PER_SEGMENT)
        limits.check("width", p["width"], *limits.WIDTH)
        if p["signs"] not in SIGN_MODES:
            raise QMoEError("malformed", f"signs are {p['signs']!r}, not plane or codeword")
        if p["scale_dtype"] not in SCALE_DTYPES:
            raise QMoEError("malformed", f"scales cannot be of type {p['scale_dtype']!r}")

    def encoded(self, stored: Bytes, item: Item, dictionary: GetDictionary) -> EncodedMatrix:
        """The extent as a matrix of views; everything but the segments is checked.

        Raises:
            QMoEError: ``malformed``, ``padding``, ``limit``, ``value``.
        """
        if stored.size < _HEADER.size:  # [E-4]
            raise QMoEError("malformed", f"{stored.size} bytes are too few for a header")
        number, base, length_width, zeros, nonzeros, segment_bytes = _HEADER.unpack_from(
            stored.data
        )
        rows, columns = item.shape
        p = item.parameters
        limits.check("segment_bytes", segment_bytes, 0, limits.SEGMENT_BYTES)  # [E-4]
        if length_width not in (1, 2, 4):  # [E-4]
            raise QMoEError("malformed", f"lengths have {length_width} bytes each, not 1, 2 or 4")
        sections, end = _layout(item, length_width, segment_bytes)
        if stored.size != end:  # [E-4] [N-3]
            raise QMoEError(
                "malformed", f"{stored.size} bytes are stored, the header describes {end}"
            )
        gaps = zip(sections, [*(each.start for each in sections[1:]), end], strict=True)
        if any(zeros) or any(stored[each.stop : next_].any() for each, next_ in gaps):  # [E-5]
            raise QMoEError("padding", "bytes between the sections of a matrix are not zero")
        row_scale, column_scale, *rest = (stored[each] for each in sections)
        offsets = rest[0].view("<u4")
        lengths = rest[1].view(f"<u{length_width}")
        _check_lengths(lengths, base, offsets, segment_bytes)
        _check_room(item, lengths, base)
        tree = dictionary(number)
        if (tree.width, tree.signs) != (p["width"], p["signs"]):  # [E-1]
            raise QMoEError(
                "malformed",
                f"dictionary {number} has width {tree.width} and signs {tree.signs!r}, unlike the "
                "tensor's entry in the index",
            )
        scale = STORAGE[p["scale_dtype"]]
        return codec.EncodedMatrix(  # checks [E-8]
            levels=codec.EncodedLevels(
                rows=rows,
                columns=columns,
                rows_per_segment=p["rows_per_segment"],
                dictionary=tree,
                nonzeros=nonzeros,
                length_base=base,
                lengths=lengths,
                block_offsets=offsets,
                segments=stored[sections[-1].start :],
                segment_bytes=segment_bytes,
            ),
            row_scale=row_scale.view(scale).reshape(rows, _groups(item), 2 - p["symmetric"]),
            column_scale=column_scale.view(scale) if p["column_scale"] else None,
            scale_dtype=p["scale_dtype"],
            group_size=p["group_size"],
        )

    def decode(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> npt.NDArray[Any]:
        matrix = self._of_known_type(stored, item, dictionary)
        if not item.elements:
            # A matrix of 0 rows, in a few bytes, may have 2^31 groups of columns: do not walk them.
            codec.decode(matrix.levels, threads=threads)
            return np.empty(item.shape, STORAGE[item.dtype])
        return from_float32(codec.dequantize(matrix, threads), item.dtype)  # [V-3]

    def verify(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> None:
        matrix = self._of_known_type(stored, item, dictionary)
        codec.decode(matrix.levels, threads=threads)

    def _of_known_type(self, stored: Bytes, item: Item, dictionary: GetDictionary) -> EncodedMatrix:
        """``encoded``, of an element type that can be decoded to."""
        if item.dtype not in STORAGE:  # [T-5]
            raise QMoEError("unsupported", f"element type {item.dtype!r} is unknown")
        return self.encoded(stored, item, dictionary)

    def payload(self, header: bytes) -> tuple[int, int]:
        *_, nonzeros, segment_bytes = _HEADER.unpack(header)
        return segment_bytes, nonzeros

    def parameters_of(self, value: Any) -> dict[str, Parameter]:
        if not isinstance(value, codec.EncodedMatrix):
            return {}
        return {
            "column_scale": value.column_scale is not None,
            "group_size": value.group_size,
            "rows_per_segment": value.levels.rows_per_segment,
            "scale_dtype": value.scale_dtype,
            "signs": value.dictionary.signs,
            "symmetric": value.symmetric,
            "width": value.dictionary.width,
        }

    def check_value(self, value: Any, item: Item) -> None:
        if not isinstance(value, codec.EncodedMatrix):
            raise wrong_type(self, value, "an EncodedMatrix (codec.encode_matrix)")
        declared = {"shape": item.shape, **item.parameters}
        for key, actual in {"shape": value.shape, **self.parameters_of(value)}.items():
            if declared[key] != actual:
                raise QMoEError(
                    "argument",
                    f"{key} of the matrix is {actual}, not {declared[key]}",
                    "give a matrix as declared, or declare another one",
                )

    def encode(self, value: EncodedMatrix, item: Item, sink: Sink) -> None:
        levels = value.levels
        length_width = levels.lengths.itemsize
        sections, end = _layout(item, length_width, levels.segment_bytes)
        extent = np.zeros(end, np.uint8)
        _HEADER.pack_into(
            extent.data, 0, sink.dictionary_number(levels.dictionary), levels.length_base,
            length_width, bytes(7), levels.nonzeros, levels.segment_bytes,
        )  # fmt: skip
        segments = levels.segments[: levels.segment_bytes]
        arrays = (
            value.row_scale, value.column_scale, levels.block_offsets, levels.lengths, segments
        )  # fmt: skip
        for section, array in zip(sections, arrays, strict=True):
            if array is not None:
                extent[section] = as_bytes(np.ascontiguousarray(array))
        sink.write(extent.data)


def _layout(item: Item, length_width: int, segment_bytes: int) -> tuple[list[slice], int]:
    """Where the five sections of an extent are, and its length, including the guard.

    Python's integers do not wrap around. [N-2]
    """
    rows, columns = item.shape
    p = item.parameters
    scale = STORAGE[p["scale_dtype"]].itemsize
    segments = -(-rows // p["rows_per_segment"])  # [E-3]
    end = _HEADER.size
    sections = []
    for length in (
        rows * _groups(item) * (2 - p["symmetric"]) * scale,
        columns * scale if p["column_scale"] else 0,
        4 * -(-segments // BLOCK),
        segments * length_width,
        segment_bytes,
    ):
        start = align(end, _ALIGNMENT)
        end = start + length
        sections.append(slice(start, end))
    return sections, align(end + GUARD, _ALIGNMENT)


def _groups(item: Item) -> int:
    """G, the number of column groups. [E-X]"""
    size: int = item.parameters["group_size"]
    return -(-item.shape[1] // size) if size else 1


def extent_length(item: Item, length_width: int, segment_bytes: int) -> int:
    """Bytes of the extent of a matrix with these numbers in its header, including the guard."""
    return _layout(item, length_width, segment_bytes)[1]


def _check_room(item: Item, lengths: npt.NDArray[Any], base: int) -> None:
    """A codeword has at most 255 weights, which bounds a segment's bytes from below. [E-7]"""
    rows, columns = item.shape
    together = item.parameters["rows_per_segment"]
    width: int = item.parameters["width"]

    def least(weights: int) -> int:
        return -(-width * -(-weights // limits.ENTRY_LENGTH[1]) // 8)

    if lengths.size == 0:
        return
    full, last = lengths[:-1], int(lengths[-1])
    weights = (rows - full.size * together) * columns
    if base + last < least(weights) or (
        full.size and base + int(full.min()) < least(together * columns)
    ):
        raise QMoEError("malformed", f"a segment is too short for rows of {columns} weights")


def _check_lengths(
    lengths: npt.NDArray[Any], base: int, offsets: npt.NDArray[np.uint32], segment_bytes: int
) -> None:
    count = lengths.size
    spread = int(lengths.max()) if count else 0
    narrowest = 1 if spread < 1 << 8 else 2 if spread < 1 << 16 else 4
    if lengths.itemsize != narrowest or (int(lengths.min()) if count else base):  # [E-9]
        raise QMoEError("malformed", "segment lengths are not stored in the shortest form")
    total = int(lengths.sum(dtype=np.uint64)) + count * base
    if total != segment_bytes:  # [E-6]
        raise QMoEError(
            "malformed", f"the segments have {total} bytes, the header says {segment_bytes}"
        )
    if count:
        # No sum can wrap around: all are at most the total.
        blocks = np.add.reduceat(lengths, np.arange(0, count, BLOCK), dtype=np.int64)[:-1]
        expected = np.zeros(offsets.size, np.int64)
        np.cumsum(blocks + BLOCK * base, out=expected[1:])
        if not np.array_equal(expected, offsets):  # [E-6]
            raise QMoEError("malformed", "the offset of a block of segments is wrong")
