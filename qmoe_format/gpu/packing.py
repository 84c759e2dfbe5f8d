"""A stack of encoded matrices as the kernels read it: seven arrays in one buffer.

    segments      uint8 [bytes]: the segments of all experts one after another, each expert's first
                  one at a multiple of 16, with GUARD zero bytes before and after all of them
    offsets       uint32 [experts, segments + 1]: where each segment begins, and the last one ends,
                  relative to the expert's base
    bases         uint64 [experts]: where each expert's first segment begins in ``segments``
    row_scale     [experts, rows, groups, 1 or 2], column_scale [experts, columns or 0], as stored
    table_of      int32 [experts]: number of the expert's dictionary
    tables        uint32 [dictionaries, 2^width, 1, 2, 4 or 8]: entries as in ``kernels/entry.cu``

Pure numpy: nothing here needs a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import Dictionary, EncodedMatrix
from qmoe_format.errors import QMoEError

# Zero bytes around the segments. A lane takes up to 64 bits per step, and a warp loads the
# codewords of one step more than it walks: 2 x 32 x 8 bytes before a segment's first byte.
GUARD = 576
ALIGNMENT = 256  # of an array in the buffer
# The kernels count the weights and bits of one segment in 32 bits.
MAX_SEGMENT_WEIGHTS = 1 << 26
MAX_SEGMENT_BYTES = 1 << 27


class Arrays(NamedTuple):
    """The arrays of a stack, numpy's or a device's, in the order of the kernels' parameters."""

    segments: Any
    offsets: Any
    bases: Any
    row_scale: Any
    column_scale: Any
    table_of: Any
    tables: Any


@dataclass(frozen=True, slots=True, eq=False)  # by identity: a key that is hashed fast
class Layout:
    """What all matrices of a stack have in common, and where its arrays are.

    Attributes:
        scales: per row and group, 1 or 2.
        entry: form of the dictionaries' entries: ``ONE_WORD``, ``NIBBLES`` or ``BYTE_POSITIONS``.
        slots: most non-zeros of an entry.
        mean_codewords: per segment.
        places: offset in bytes, numpy dtype and shape of each array, by name.
        bytes: size of the whole buffer.
    """

    experts: int
    rows: int
    columns: int
    rows_per_segment: int
    width: int
    signs: str
    scales: int
    scale_dtype: str
    group_size: int
    column_scales: bool
    entry: str
    slots: int
    mean_codewords: int
    places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]
    bytes: int

    @property
    def segments(self) -> int:
        """Segments per matrix."""
        return -(-self.rows // self.rows_per_segment)

    @property
    def entry_bytes(self) -> int:
        """Size of a dictionary's entry."""
        return 4 * _entry_words(self.entry, self.slots)

    def arrays(self, buffer: Any) -> Arrays:
        """The arrays, as views of ``buffer`` uint8 [bytes]."""
        views = {}
        for name, (offset, dtype, shape) in self.places.items():
            size = math.prod(shape) * dtype.itemsize
            views[name] = buffer[offset : offset + size].view(dtype).reshape(shape)
        return Arrays(**views)


@dataclass(frozen=True, slots=True)
class PackedStack:
    """A stack ready for the kernels."""

    layout: Layout
    arrays: Arrays


def pack(matrices: Sequence[EncodedMatrix]) -> PackedStack:
    """Pack ``matrices`` into numpy's memory; errors as in ``layout``."""
    plan = layout(matrices)
    buffer = np.zeros(plan.bytes, np.uint8)
    for offset, data in pieces(plan, matrices):
        buffer[offset : offset + data.size] = data
    return PackedStack(plan, plan.arrays(buffer))


def layout(matrices: Sequence[EncodedMatrix]) -> Layout:
    """Decide where everything goes.

    Raises:
        QMoEError: ``argument`` for no matrix, or matrices that cannot form a stack; ``limit`` for a
            segment that is too large for the kernels.
    """
    if not matrices:
        raise QMoEError("argument", "there is no matrix to upload", "give at least one")
    first = _common(matrices[0])
    for number, matrix in enumerate(matrices):
        for (what, value), other in zip(first.items(), _common(matrix).values(), strict=True):
            if value != other:
                raise QMoEError(
                    "argument",
                    f"matrix {number}: {what} is {other}, of matrix 0 it is {value}",
                    "upload matrices that differ in more than their weights separately",
                )
        _check_segments(number, matrix)
    matrix = matrices[0]
    levels = matrix.levels
    experts, rows, columns = len(matrices), matrix.rows, matrix.columns
    dictionaries = _dictionaries(matrices)
    entry = _entry_form(dictionaries)
    slots = max(1, *(d.max_nonzeros for d in dictionaries))
    scale, words = matrix.row_scale.dtype, _entry_words(entry, slots)
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "segments": (np.uint8, (_bases(matrices)[1],)),
        "offsets": (np.uint32, (experts, levels.count + 1)),
        "bases": (np.uint64, (experts,)),
        "row_scale": (scale, (experts, *matrix.row_scale.shape)),
        "column_scale": (scale, (experts, 0 if matrix.column_scale is None else columns)),
        "table_of": (np.int32, (experts,)),
        "tables": (np.uint32, (len(dictionaries), 1 << levels.dictionary.width, words)),
    }
    places, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        places[name] = (end, np.dtype(dtype), shape)
        end = _align(end + math.prod(shape) * np.dtype(dtype).itemsize + 1, ALIGNMENT)
    return Layout(
        experts=experts,
        rows=rows,
        columns=columns,
        rows_per_segment=min(levels.rows_per_segment, max(rows, 1)),
        width=levels.dictionary.width,
        signs=levels.dictionary.signs,
        scales=matrix.row_scale.shape[2],
        scale_dtype=matrix.scale_dtype,
        group_size=matrix.group_size,
        column_scales=matrix.column_scale is not None,
        entry=entry,
        slots=slots,
        mean_codewords=_mean_codewords(matrices),
        places=places,
        bytes=end,
    )


def pieces(
    layout: Layout, matrices: Sequence[EncodedMatrix]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """What the buffer holds besides zeros: offsets and bytes, uint8."""
    where = {name: offset for name, (offset, _, _) in layout.places.items()}
    dictionaries = _dictionaries(matrices)
    bases = _bases(matrices)[0]
    table_of = [dictionaries[matrix.dictionary] for matrix in matrices]
    yield where["bases"], _bytes(np.array(bases, np.uint64))
    yield where["table_of"], _bytes(np.array(table_of, np.int32))
    size = layout.entry_bytes << layout.width
    for dictionary, number in dictionaries.items():
        entries = _entries(dictionary, layout.entry, layout.entry_bytes // 4)
        yield where["tables"] + number * size, _bytes(entries)
    for e, (matrix, base) in enumerate(zip(matrices, bases, strict=True)):
        levels = matrix.levels
        yield where["segments"] + base, levels.segments[: levels.segment_bytes]
        for name, array in (
            ("offsets", levels.offsets().astype(np.uint32)),
            ("row_scale", matrix.row_scale),
            ("column_scale", matrix.column_scale),
        ):
            if array is not None:
                yield where[name] + e * array.nbytes, _bytes(array)


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _common(matrix: EncodedMatrix) -> dict[str, Any]:
    return {
        "shape": (matrix.rows, matrix.columns),
        "rows per segment": matrix.levels.rows_per_segment,
        "codeword width": matrix.dictionary.width,
        "sign mode": matrix.dictionary.signs,
        "number of scales per row": matrix.row_scale.shape[2],
        "scale dtype": matrix.scale_dtype,
        "group size": matrix.group_size,
        "presence of column scales": matrix.column_scale is not None,
    }


def _check_segments(number: int, matrix: EncodedMatrix) -> None:
    levels = matrix.levels
    weights = min(levels.rows_per_segment, levels.rows) * levels.columns
    longest = int(levels.lengths.max()) + levels.length_base if levels.count else 0
    if weights > MAX_SEGMENT_WEIGHTS or longest > MAX_SEGMENT_BYTES:
        raise QMoEError(
            "limit",
            f"matrix {number}: a segment of {weights} weights in {longest} bytes is too large for "
            f"the kernels, which take {MAX_SEGMENT_WEIGHTS} and {MAX_SEGMENT_BYTES}",
            "encode it with fewer rows per segment",
        )


def _align(size: int, step: int) -> int:
    return -(-size // step) * step


def _bases(matrices: Sequence[EncodedMatrix]) -> tuple[list[int], int]:
    """Where each matrix's segments begin, and the size of ``segments``, guards included."""
    bases, end = [], GUARD
    for matrix in matrices:
        bases.append(end)
        end = _align(end + matrix.levels.segment_bytes, 16)
    return bases, end + GUARD


def _dictionaries(matrices: Sequence[EncodedMatrix]) -> dict[Dictionary, int]:
    """The distinct dictionaries, numbered in order of first use."""
    return {d: i for i, d in enumerate(dict.fromkeys(m.dictionary for m in matrices))}


def _mean_codewords(matrices: Sequence[EncodedMatrix]) -> int:
    """Codewords per segment: the bits that are not signs."""
    levels = [matrix.levels for matrix in matrices]
    bits = sum(8 * t.segment_bytes for t in levels)
    if levels[0].dictionary.signs == "plane":
        bits -= sum(t.nonzeros for t in levels)
    return bits // max(sum(t.count for t in levels) * levels[0].dictionary.width, 1)


def _entry_form(dictionaries: Iterable[Dictionary]) -> str:
    length = max(d.max_length for d in dictionaries)
    nonzeros = max(d.max_nonzeros for d in dictionaries)
    if any(d.signs == "codeword" for d in dictionaries):
        return "BYTE_POSITIONS"
    if nonzeros <= 3 and length < 64:
        return "ONE_WORD"
    return "NIBBLES" if 4 < nonzeros <= 8 and length <= 16 else "BYTE_POSITIONS"


def _entry_words(entry: str, slots: int) -> int:
    if entry != "BYTE_POSITIONS":
        return 1 if entry == "ONE_WORD" else 2
    return 2 if slots <= 4 else 4 if slots <= 12 else 8


def _entries(dictionary: Dictionary, entry: str, words: int) -> npt.NDArray[np.uint32]:
    """uint32 [2^width, words]: the entries of a dictionary."""
    from qmoe_format.codec.kernels.tables import tables

    table = tables(dictionary)
    lanes = table.positions.view(np.uint16)  # one per non-zero; bit 15: minus, if in the codeword
    positions = np.zeros((len(lanes), 28), np.uint8)
    positions[:, : lanes.shape[1]] = lanes & 0xFF
    lengths = table.steps.astype(np.uint32) & np.uint32(0xFF)
    nonzeros = table.nonzeros.astype(np.uint32)
    entries = np.zeros((len(lanes), words), np.uint32)
    if entry == "ONE_WORD":
        positions[:, 3] = lengths | nonzeros << 6
        entries[:] = positions[:, :4].view(np.uint32)
        return entries
    if dictionary.signs == "codeword":
        signs = (lanes >> 15).astype(np.uint32) << np.arange(lanes.shape[1], dtype=np.uint32)
        entries[:, 0] = lengths | nonzeros << 8 | signs.sum(axis=1, dtype=np.uint32) << 16
    else:
        entries[:, 0] = lengths | nonzeros << 16
    if entry == "NIBBLES":
        positions[:, :4] |= positions[:, 4:8] << 4
    entries[:, 1:] = positions[:, : 4 * (words - 1)].view(np.uint32)[:, : words - 1]
    return entries
