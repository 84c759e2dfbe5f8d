"""Encoding ``int-dict``: the extent of a matrix of levels in codewords (SPEC.md section 7.1).

The extent is the arrays of an ``EncodedMatrix`` one after the other, so ``encoded`` copies nothing;
the codec knows what the segments mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmoe_format import codec
from qmoe_format.codec.bit_string import BLOCK, GUARD
from qmoe_format.container import limits
from qmoe_format.container.encodings.base import (
    Encoding,
    GetDictionary,
    Payload,
    Sink,
    as_bytes,
    wrong_type,
)
from qmoe_format.container.entries import Item, Parameter
from qmoe_format.container.extent_table import align
from qmoe_format.dtypes import STORAGE, Bytes, from_float32
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec import EncodedBits, EncodedMatrix

DTYPES = ("BF16", "F16", "F32", "F64")  # [E-2]
_ALIGNMENT = 16
_HEADER = struct.Struct("<IIBB6sQQ")


class Header(NamedTuple):
    """What the extent says about one string of bits, in the order of its fields."""

    dictionary: int
    length_base: int
    length_width: int
    refined: int
    zeros: bytes
    ones: int
    segment_bytes: int


class IntDict(Encoding):
    """Levels in codewords of dictionaries, values from scales of rows and columns."""

    name = "int-dict"
    defaults = {  # noqa: RUF012 -- never changed
        "column_scale": False,
        "rows_per_segment": 1,
        "symmetric": False,
    }
    header_bytes = 2 * _HEADER.size
    multipliable = True

    def check_entry(self, item: Item) -> None:
        check_matrix(item)
        together = item.parameters["rows_per_segment"]
        limits.check("rows_per_segment", together, *limits.ROWS_PER_SEGMENT)

    def encoded(self, stored: Bytes, item: Item, dictionary: GetDictionary) -> EncodedMatrix:
        """The extent as a matrix of views; everything but the segments is checked.

        Raises:
            QMoEError: ``malformed``, ``padding``, ``limit``, ``value``.
        """
        headers = _headers(stored)
        sections, end = _layout(item, headers)
        if stored.size != end:  # [E-4] [N-3]
            raise QMoEError(
                "malformed", f"{stored.size} bytes are stored, the header describes {end}"
            )
        gaps = zip(sections, [*(each.start for each in sections[1:]), end], strict=True)
        spare = (stored[each.stop : after] for each, after in gaps)
        if any(any(each.zeros) for each in headers) or any(each.any() for each in spare):  # [E-5]
            raise QMoEError("padding", "bytes between the sections of a matrix are not zero")
        row_scale, column_scale = (stored[each].view("<u2") for each in sections[:2])
        mask, *refinement = (
            _string(stored, header, sections[3 * number + 2 :], dictionary)
            for number, header in enumerate(headers)
        )
        _check_room(item, mask)
        rows, columns = item.shape
        return codec.EncodedMatrix(  # checks [E-8]
            levels=codec.EncodedLevels(  # checks [E-16]
                rows=rows,
                columns=columns,
                rows_per_segment=item.parameters["rows_per_segment"],
                mask=mask,
                refinement=refinement[0] if refinement else None,
            ),
            row_scale=row_scale.reshape(rows, 2 - item.parameters["symmetric"]),
            column_scale=column_scale if item.parameters["column_scale"] else None,
        )

    def decode(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> npt.NDArray[Any]:
        matrix = self._of_known_type(stored, item, dictionary)
        if not item.elements:
            # A matrix of 0 rows, in a few bytes, may have 2^31 columns: make no array of them.
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

    def payload(self, header: Bytes, item: Item) -> Payload:
        mask, *refinement = _headers(header)
        if not refinement:
            return Payload(mask.segment_bytes, mask.ones)
        refined = refinement[0]
        return Payload(
            mask.segment_bytes + refined.segment_bytes, mask.ones, refined.segment_bytes,
            mask.ones, refined.ones,
        )  # fmt: skip

    def parameters_of(self, value: Any) -> dict[str, Parameter]:
        if not isinstance(value, codec.EncodedMatrix):
            return {}
        return {
            "column_scale": value.column_scale is not None,
            "rows_per_segment": value.levels.rows_per_segment,
            "symmetric": value.symmetric,
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
        strings = value.levels.strings
        headers = [
            Header(
                sink.dictionary_number(each.dictionary), each.length_base, each.lengths.itemsize,
                int(len(strings) > number + 1), bytes(6), each.ones, each.segment_bytes,
            )
            for number, each in enumerate(strings)
        ]  # fmt: skip
        sections, end = _layout(item, headers)
        extent = np.zeros(end, np.uint8)
        for number, header in enumerate(headers):
            _HEADER.pack_into(extent.data, number * _HEADER.size, *header)
        column_scale = np.empty(0, np.uint16) if value.column_scale is None else value.column_scale
        arrays: list[npt.NDArray[Any]] = [value.row_scale, column_scale]
        for each in strings:
            arrays += each.block_offsets, each.lengths, each.segments[: each.segment_bytes]
        for section, array in zip(sections, arrays, strict=True):
            extent[section] = as_bytes(np.ascontiguousarray(array))
        sink.write(extent.data)


def check_matrix(item: Item) -> None:
    """Check dtype and shape of a matrix. [E-2] [L-1]

    Raises:
        QMoEError: ``malformed``, ``limit``.
    """
    if item.dtype not in DTYPES and item.dtype in STORAGE:
        raise QMoEError("malformed", f"a quantized matrix cannot be {item.dtype}")
    if len(item.shape) != 2:
        raise QMoEError("malformed", f"a matrix has 2 dimensions, not {len(item.shape)}")
    for side in item.shape:
        limits.check("a side of a quantized matrix", side, 0, limits.MATRIX_SIDE)


def extent_length(item: Item, strings: Iterable[tuple[int, int]]) -> int:
    """Bytes of the extent of a matrix, including the guard.

    Args:
        strings: of the mask and, in a refined matrix, of the refinement: bytes of a length, and of
            all segments.
    """
    headers = [Header(0, 0, width, 0, b"", 0, size) for width, size in strings]
    return _layout(item, headers)[1]


def _headers(stored: Bytes) -> list[Header]:
    """The one or two headers at the beginning of an extent. [E-4]"""
    mask = _header(stored, 0)
    if mask.refined > 1:
        raise QMoEError("malformed", f"refined is {mask.refined}, not 0 or 1")
    headers = [mask, _header(stored, _HEADER.size)] if mask.refined else [mask]
    for each in headers:
        limits.check("segment_bytes", each.segment_bytes, 0, limits.SEGMENT_BYTES)
    for each in headers:
        if each.length_width not in (1, 2, 4):
            wrong = f"lengths have {each.length_width} bytes each, not 1, 2 or 4"
            raise QMoEError("malformed", wrong)
    if mask.refined and headers[1].refined:
        raise QMoEError("malformed", "a refinement is refined")
    return headers


def _header(stored: Bytes, start: int) -> Header:
    if stored.size < start + _HEADER.size:
        raise QMoEError("malformed", f"{stored.size} bytes are too few for a header")
    return Header(*_HEADER.unpack_from(stored.data, start))


def _layout(item: Item, headers: Sequence[Header]) -> tuple[list[slice], int]:
    """Where the five or eight sections of an extent are, and its length, including the guard.

    Python's integers do not wrap around. [N-2]
    """
    rows, columns = item.shape
    p = item.parameters
    segments = -(-rows // p["rows_per_segment"])  # [E-3]
    lengths = [2 * rows * (2 - p["symmetric"]), 2 * columns * p["column_scale"]]
    for each in headers:
        lengths += 4 * -(-segments // BLOCK), segments * each.length_width, each.segment_bytes
    end = len(headers) * _HEADER.size
    sections = []
    for length in lengths:
        start = align(end, _ALIGNMENT)
        end = start + length
        sections.append(slice(start, end))
    return sections, align(end + GUARD, _ALIGNMENT)


def _string(
    stored: Bytes, header: Header, sections: Sequence[slice], dictionary: GetDictionary
) -> EncodedBits:
    """One string of bits: views of its three ``sections``, the first ones."""
    offsets = stored[sections[0]].view("<u4")
    lengths = stored[sections[1]].view(f"<u{header.length_width}")
    _check_lengths(lengths, header.length_base, offsets, header.segment_bytes)
    return codec.EncodedBits(
        dictionary=dictionary(header.dictionary),  # checks [E-1]
        ones=header.ones,
        length_base=header.length_base,
        lengths=lengths,
        block_offsets=offsets,
        segments=stored[sections[2].start :],
        segment_bytes=header.segment_bytes,
    )


def _check_room(item: Item, mask: EncodedBits) -> None:
    """A codeword has at most 255 weights, which bounds a segment's bytes from below. [E-7]"""
    rows, columns = item.shape
    together = item.parameters["rows_per_segment"]
    width, base = mask.dictionary.width, mask.length_base

    def least(weights: int) -> int:
        return -(-width * -(-weights // limits.ENTRY_LENGTH[1]) // 8)

    if mask.lengths.size == 0:
        return
    full, last = mask.lengths[:-1], int(mask.lengths[-1])
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
