"""A stack of encoded matrices as the kernels read it: seven arrays in one buffer.

    segments      uint8 [bytes]: the segments of all experts one after another, each expert's first
                  one at a multiple of 16, with GUARD zero bytes before and after all of them
    offsets       uint32 [experts, segments + 1]: where each begins, and the last one ends, from
                  where the expert's do
    bases         uint64 [experts]: where the expert's begin in ``segments``
    row_scale     [experts, rows, groups, 1 or 2], column_scale [experts, columns or 0], as stored
    table_of      int32 [experts]: number of the expert's dictionary
    tables        uint32 [dictionaries, 2^width, 1, 2, 4 or 8]: entries as in ``kernels/entry.cu``

Pure numpy: nothing here needs a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import Dictionary, EncodedMatrix
from qmoe_format.errors import QMoEError

# Zero bytes around the segments. A lane takes up to 64 bits a step, and a warp reads the codewords
# of a step that it then does not make: 2 x 32 x 8 bytes before a segment's first byte.
GUARD = 576
ALIGNMENT = 256  # of an array in the buffer
# The kernels count the weights and bits of one segment in 32 bits.
MAX_SEGMENT_WEIGHTS = 1 << 26
MAX_SEGMENT_BYTES = 1 << 27


@dataclass(frozen=True, slots=True)
class Arrays:
    """The arrays of a stack; numpy's, or a device's."""

    segments: Any
    offsets: Any
    bases: Any
    row_scale: Any
    column_scale: Any
    table_of: Any
    tables: Any


@dataclass(frozen=True, slots=True, eq=False)  # to be looked up fast
class Layout:
    """What all members of a stack have in common, and where its arrays are.

    ``entry``     how dictionaries' entries are packed: ``ONE_WORD``, ``NIBBLES`` or ``BYTE_PLACES``
    ``slots``     most non-zeros of an entry
    ``codewords`` in a segment, on average
    ``places``    name, offset in bytes, numpy type and shape of each array
    ``bytes``     size of the whole buffer
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
    codewords: int
    places: tuple[tuple[str, int, np.dtype[Any], tuple[int, ...]], ...]
    bytes: int

    @property
    def segments(self) -> int:
        """Number of segments of a matrix."""
        return -(-self.rows // self.rows_per_segment)

    @property
    def entry_bytes(self) -> int:
        """Size of a dictionary's entry."""
        return 4 * _entry_words(self.entry, self.slots)

    def arrays(self, buffer: Any) -> Arrays:
        """The arrays, as views of ``buffer`` uint8 [bytes]."""
        views = {}
        for name, offset, dtype, shape in self.places:
            size = math.prod(shape) * dtype.itemsize
            views[name] = buffer[offset : offset + size].view(dtype).reshape(shape)
        return Arrays(**views)


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack ready for the kernels."""

    layout: Layout
    arrays: Arrays


def pack(matrices: Sequence[EncodedMatrix]) -> Stack:
    """Pack into memory of numpy's own. Raises as ``layout``."""
    plan = layout(matrices)
    buffer = np.empty(plan.bytes, np.uint8)
    fill(plan, matrices, buffer)
    return Stack(plan, plan.arrays(buffer))


def layout(matrices: Sequence[EncodedMatrix]) -> Layout:
    """Where everything goes.

    Raises ``QMoEError``: ``argument`` for no matrix or for matrices that do not fit each other,
    ``limit`` for a segment that is too large.
    """
    if not matrices:
        raise QMoEError("argument", "there is no matrix to upload")
    first = _common(matrices[0])
    for number, matrix in enumerate(matrices):
        for (what, value), (_, other) in zip(first.items(), _common(matrix).items(), strict=True):
            if value != other:
                raise QMoEError(
                    "argument",
                    f"matrix {number} has {what} {other}, the first one {value}: matrices of one "
                    "stack differ in their weights only, upload others apart",
                )
        _check_segments(number, matrix)
    matrix = matrices[0]
    trits = matrix.trits
    experts, rows, columns = len(matrices), matrix.rows, matrix.columns
    dictionaries = _dictionaries(matrices)
    entry = _entry_form(dictionaries)
    slots = max(1, *(d.max_nonzeros for d in dictionaries))
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "segments": (np.dtype(np.uint8), (_bases(matrices)[1],)),
        "offsets": (np.dtype(np.uint32), (experts, trits.count + 1)),
        "bases": (np.dtype(np.uint64), (experts,)),
        "row_scale": (matrix.row_scale.dtype, (experts, *matrix.row_scale.shape)),
        "column_scale": (
            matrix.row_scale.dtype,
            (experts, 0 if matrix.column_scale is None else columns),
        ),
        "table_of": (np.dtype(np.int32), (experts,)),
        "tables": (
            np.dtype(np.uint32),
            (len(dictionaries), 1 << trits.dictionary.width, _entry_words(entry, slots)),
        ),
    }
    places, end = [], 0
    for name, (dtype, shape) in shapes.items():
        places.append((name, end, dtype, shape))
        end = _align(end + math.prod(shape) * dtype.itemsize + 1, ALIGNMENT)
    return Layout(
        experts=experts,
        rows=rows,
        columns=columns,
        rows_per_segment=min(trits.rows_per_segment, max(rows, 1)),
        width=trits.dictionary.width,
        signs=trits.dictionary.signs,
        scales=matrix.row_scale.shape[2],
        scale_dtype=matrix.scale_dtype,
        group_size=matrix.group_size,
        column_scales=matrix.column_scale is not None,
        entry=entry,
        slots=slots,
        codewords=_mean_codewords(matrices),
        places=tuple(places),
        bytes=end,
    )


def fill(layout: Layout, matrices: Sequence[EncodedMatrix], buffer: npt.NDArray[np.uint8]) -> None:
    """Write the arrays of ``matrices``, for which ``layout`` was made, into ``buffer``."""
    buffer[:] = 0
    for offset, data in parts(layout, matrices):
        buffer[offset : offset + data.size] = data


def parts(
    layout: Layout, matrices: Sequence[EncodedMatrix]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """What is in the buffer, zeros aside: pieces, uint8, and where they go."""
    where = {name: offset for name, offset, _, _ in layout.places}
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
        trits = matrix.trits
        yield where["segments"] + base, trits.segments[: trits.segment_bytes]
        for name, array in (
            ("offsets", trits.offsets().astype(np.uint32)),
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
        "rows per segment": matrix.trits.rows_per_segment,
        "codeword width": matrix.dictionary.width,
        "sign mode": matrix.dictionary.signs,
        "scales a row": matrix.row_scale.shape[2],
        "scale type": matrix.scale_dtype,
        "group size": matrix.group_size,
        "column scales": matrix.column_scale is not None,
    }


def _check_segments(number: int, matrix: EncodedMatrix) -> None:
    trits = matrix.trits
    weights = min(trits.rows_per_segment, trits.rows) * trits.columns
    longest = int(trits.lengths.max()) + trits.length_base if trits.count else 0
    if weights > MAX_SEGMENT_WEIGHTS or longest > MAX_SEGMENT_BYTES:
        raise QMoEError(
            "limit",
            f"matrix {number} has a segment of {weights} weights and {longest} bytes; a warp takes "
            f"{MAX_SEGMENT_WEIGHTS} and {MAX_SEGMENT_BYTES}: encode it with fewer rows a segment",
        )


def _align(size: int, step: int) -> int:
    return -(-size // step) * step


def _bases(matrices: Sequence[EncodedMatrix]) -> tuple[list[int], int]:
    """Where each matrix's segments begin, and the bytes of all with what lies around them."""
    bases, end = [], GUARD
    for matrix in matrices:
        bases.append(end)
        end = _align(end + matrix.trits.segment_bytes, 16)
    return bases, end + GUARD


def _dictionaries(matrices: Sequence[EncodedMatrix]) -> dict[Dictionary, int]:
    """Each dictionary once, numbered in the order in which they come."""
    return {d: i for i, d in enumerate(dict.fromkeys(m.dictionary for m in matrices))}


def _mean_codewords(matrices: Sequence[EncodedMatrix]) -> int:
    """Codewords in a segment, on average: the bits that are not signs."""
    trits = [matrix.trits for matrix in matrices]
    bits = sum(8 * t.segment_bytes for t in trits)
    if trits[0].dictionary.signs == "plane":
        bits -= sum(t.nonzeros for t in trits)
    return bits // max(sum(t.count for t in trits) * trits[0].dictionary.width, 1)


def _entry_form(dictionaries: Iterable[Dictionary]) -> str:
    length = max(d.max_length for d in dictionaries)
    nonzeros = max(d.max_nonzeros for d in dictionaries)
    if any(d.signs == "codeword" for d in dictionaries):
        return "BYTE_PLACES"
    if nonzeros <= 3 and length < 64:
        return "ONE_WORD"
    return "NIBBLES" if 4 < nonzeros <= 8 and length <= 16 else "BYTE_PLACES"


def _entry_words(entry: str, slots: int) -> int:
    if entry != "BYTE_PLACES":
        return 1 if entry == "ONE_WORD" else 2
    return 2 if slots <= 4 else 4 if slots <= 12 else 8


def _entries(dictionary: Dictionary, entry: str, words: int) -> npt.NDArray[np.uint32]:
    """uint32 [2^width, words]: the entries of a dictionary."""
    from qmoe_format.codec.tables import tables

    look_up = tables(dictionary)
    lanes = look_up.positions.view(np.uint16)  # a non-zero each; bit 15: minus, if in the codeword
    places = np.zeros((len(lanes), 28), np.uint8)
    places[:, : lanes.shape[1]] = lanes & 0xFF
    about = look_up.steps.astype(np.uint32) & np.uint32(0xFF)  # an entry's length
    nonzeros = look_up.nonzeros.astype(np.uint32)
    entries = np.zeros((len(lanes), words), np.uint32)
    if entry == "ONE_WORD":
        places[:, 3] = about | nonzeros << 6
        entries[:] = places[:, :4].view(np.uint32)
        return entries
    if dictionary.signs == "codeword":
        signs = (lanes >> 15).astype(np.uint32) << np.arange(lanes.shape[1], dtype=np.uint32)
        entries[:, 0] = about | nonzeros << 8 | signs.sum(axis=1, dtype=np.uint32) << 16
    else:
        entries[:, 0] = about | nonzeros << 16
    if entry == "NIBBLES":
        places[:, :4] |= places[:, 4:8] << 4
    entries[:, 1:] = places[:, : 4 * (words - 1)].view(np.uint32)[:, : words - 1]
    return entries
