"""A stack of ``int-dict`` matrices as the kernels read it. S is 2 if any has a refinement, else 1:
a segment's mask comes first, then its refinement.

    segments      uint8 [bytes]: the segments of each expert's strings one after another, the first
                  one of each string at a multiple of 16; GUARD zero bytes before and after all
    offsets       uint32 [experts, S, segments + 1]: where each segment begins, and the last one
                  ends, relative to the string's base
    bases         uint64 [experts, S]: where each string's first segment begins in ``segments``
    row_scale     bf16 [experts, rows, 1 or 2], column_scale [experts, columns or 0], as stored
    table_of      int32 [experts, S]: where the dictionary's table begins in ``tables``, in KiB
    tables        uint32 [KiB, 256]: entries as in ``kernels/entry.cu``, first of the masks'
                  dictionaries, then of the refinements'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import Dictionary, EncodedBits, EncodedLevels, EncodedMatrix, decode, encode
from qmoe_format.errors import QMoEError
from qmoe_format.gpu.layout import MAX_SEGMENT_BYTES, MAX_WEIGHTS, Layout, align, places

# Zero bytes around the segments. A lane takes up to 64 bits per step, and a warp loads the
# codewords of one step more than it walks: 2 x 32 x 8 bytes before a segment's first byte.
GUARD = 576


@dataclass(frozen=True, slots=True)
class Tables:
    """The form of the tables of some dictionaries of one width.

    Attributes:
        width: of a codeword, in bits.
        entry: form of an entry: ``ONE_WORD``, ``NIBBLES`` or ``BYTE_POSITIONS``.
        slots: most ones of an entry.
    """

    width: int
    entry: str
    slots: int

    @property
    def entry_bytes(self) -> int:
        """Size of an entry."""
        if self.entry == "ONE_WORD":
            return 4
        return 8 if self.entry == "NIBBLES" or self.slots <= 4 else 16 if self.slots <= 12 else 32

    @property
    def bytes(self) -> int:
        """Size of a table."""
        return self.entry_bytes << self.width


@dataclass(frozen=True, slots=True, eq=False)
class DictLayout(Layout):
    """The layout of ``int-dict`` matrices.

    Attributes:
        scales: per row, 1 or 2.
        mask: the tables of the masks' dictionaries.
        refinement: of the refinements' dictionaries; None if all matrices are ternary.
        mean_codewords: of a mask's segment.
        landings: the sum of all magnitudes.
    """

    rows_per_segment: int
    scales: int
    column_scales: bool
    mask: Tables
    refinement: Tables | None
    mean_codewords: int
    landings: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' parameters after the arrays."""
        return self.experts, self.rows, self.columns, self.rows_per_segment


def of_one_width(matrices: Sequence[EncodedMatrix]) -> Sequence[EncodedMatrix]:
    """Encode matrices of other codeword widths than the first one's with its dictionaries."""
    first = [next(filter(None, string)).dictionary for string in _strings(matrices)]

    def differs(matrix: EncodedMatrix) -> bool:
        strings = (matrix.levels.mask, matrix.levels.refinement)
        pairs = zip(strings, first, strict=False)
        return any(bits and bits.dictionary.width != d.width for bits, d in pairs)

    def encoded_anew(levels: EncodedLevels) -> EncodedLevels:
        return encode(
            decode(levels),
            rows_per_segment=levels.rows_per_segment,
            dictionary=first[0],
            refinement_dictionary=first[1] if levels.refinement else None,
        )

    return [replace(m, levels=encoded_anew(m.levels)) if differs(m) else m for m in matrices]


def common(matrix: EncodedMatrix) -> dict[str, Any]:
    """What has to be the same for all matrices of a stack."""
    return {
        "shape": (matrix.rows, matrix.columns),
        "rows per segment": matrix.levels.rows_per_segment,
        "number of scales per row": matrix.row_scale.shape[1],
        "presence of column scales": matrix.column_scale is not None,
    }


def layout(matrices: Sequence[EncodedMatrix]) -> DictLayout:
    """Decide where everything goes; ``limit`` for a segment that is too large for the kernels."""
    for number, matrix in enumerate(matrices):
        _check_segments(number, matrix)
    experts, rows, columns = len(matrices), matrices[0].rows, matrices[0].columns
    levels, scales = matrices[0].levels, matrices[0].row_scale.shape[1]
    column_scales = matrices[0].column_scale is not None
    strings = _strings(matrices)
    dictionaries = [_dictionaries(string) for string in strings]
    tables = [_tables(found) for found in dictionaries]
    size = sum(form.bytes * len(found) for form, found in zip(tables, dictionaries, strict=True))
    found, end = places(
        {
            "segments": (np.uint8, (_bases(strings)[1],)),
            "offsets": (np.uint32, (experts, len(strings), levels.count + 1)),
            "bases": (np.uint64, (experts, len(strings))),
            "row_scale": (np.uint16, (experts, rows, scales)),
            "column_scale": (np.uint16, (experts, columns if column_scales else 0)),
            "table_of": (np.int32, (experts, len(strings))),
            "tables": (np.uint32, (size // 1024, 256)),
        }
    )
    return DictLayout(
        experts=experts,
        rows=rows,
        columns=columns,
        units=levels.count,
        places=found,
        bytes=end,
        rows_per_segment=min(levels.rows_per_segment, max(rows, 1)),
        scales=scales,
        column_scales=column_scales,
        mask=tables[0],
        refinement=tables[1] if len(tables) > 1 else None,
        mean_codewords=_mean_codewords(matrices),
        landings=sum(bits.ones for string in strings for bits in string if bits),
    )


def pieces(matrices: Sequence[EncodedMatrix]) -> Iterator[tuple[str, int, npt.NDArray[Any]]]:
    """What the arrays hold besides zeros: an array's name, an offset in bytes, and the values."""
    strings = _strings(matrices)
    bases = _bases(strings)[0]
    yield "bases", 0, bases
    table_of, end = np.zeros(bases.shape, np.int32), 0
    for s, string in enumerate(strings):
        dictionaries = _dictionaries(string)
        form = _tables(dictionaries)
        for e, bits in enumerate(string):
            number = dictionaries[bits.dictionary] if bits else 0  # any table will do
            table_of[e, s] = (end + number * form.bytes) // 1024
        for dictionary in dictionaries:
            yield "tables", end, _entries(dictionary, form)
            end += form.bytes
    yield "table_of", 0, table_of
    for e, matrix in enumerate(matrices):
        for s, string in enumerate(strings):
            if bits := string[e]:
                yield "segments", int(bases[e, s]), bits.segments[: bits.segment_bytes]
                offsets = bits.offsets().astype(np.uint32)
                yield "offsets", (e * len(strings) + s) * offsets.nbytes, offsets
        yield "row_scale", e * matrix.row_scale.nbytes, matrix.row_scale
        if matrix.column_scale is not None:
            yield "column_scale", e * matrix.column_scale.nbytes, matrix.column_scale


String = list[EncodedBits | None]  # of each matrix


def _strings(matrices: Sequence[EncodedMatrix]) -> list[String]:
    """The masks, and the refinements if there are any."""
    masks: String = [matrix.levels.mask for matrix in matrices]
    refinements: String = [matrix.levels.refinement for matrix in matrices]
    return [masks, refinements] if any(refinements) else [masks]


def _bases(strings: Sequence[String]) -> tuple[npt.NDArray[np.uint64], int]:
    """``bases``, and the size of ``segments``."""
    bases, end = np.zeros((len(strings[0]), len(strings)), np.uint64), GUARD
    for e, s in np.ndindex(*bases.shape):
        bits = strings[s][e]
        bases[e, s] = end
        end = align(end + (bits.segment_bytes if bits else 0), 16)
    return bases, end + GUARD


def _dictionaries(string: String) -> dict[Dictionary, int]:
    """The distinct dictionaries, numbered in order of first use."""
    return {d: i for i, d in enumerate(dict.fromkeys(bits.dictionary for bits in string if bits))}


def _check_segments(number: int, matrix: EncodedMatrix) -> None:
    levels = matrix.levels
    weights = min(levels.rows_per_segment, levels.rows) * levels.columns
    longest = 0
    for bits in (levels.mask, levels.refinement):
        if bits and bits.lengths.size:
            longest = max(longest, int(bits.lengths.max()) + bits.length_base)
    if weights > MAX_WEIGHTS or longest > MAX_SEGMENT_BYTES:
        raise QMoEError(
            "limit",
            f"matrix {number}: a segment of {weights} weights in {longest} bytes is too large for "
            f"the kernels, which take {MAX_WEIGHTS} and {MAX_SEGMENT_BYTES}",
            "encode it with fewer rows per segment",
        )


def _mean_codewords(matrices: Sequence[EncodedMatrix]) -> int:
    """Codewords per mask's segment: the bits that are not signs."""
    masks = [matrix.levels.mask for matrix in matrices]
    bits = sum(8 * mask.segment_bytes - mask.ones for mask in masks)
    return bits // max(sum(mask.lengths.size for mask in masks) * masks[0].dictionary.width, 1)


def _tables(dictionaries: Iterable[Dictionary]) -> Tables:
    found = list(dictionaries)
    length, ones = max(d.max_length for d in found), max(d.max_ones for d in found)
    entry = "NIBBLES" if 4 < ones <= 8 and length <= 16 else "BYTE_POSITIONS"
    if ones <= 3 and length < 64:
        entry = "ONE_WORD"
    return Tables(found[0].width, entry, max(1, ones))


def _entries(dictionary: Dictionary, form: Tables) -> npt.NDArray[np.uint32]:
    """uint32 [2^width, words]: the entries of a dictionary."""
    from qmoe_format.codec.kernels.tables import tables

    table = tables(dictionary)
    lanes = table.positions.view(np.uint16)  # one per one
    positions = np.zeros((len(lanes), 28), np.uint8)
    positions[:, : lanes.shape[1]] = lanes
    lengths = table.steps.astype(np.uint32) & np.uint32(0xFF)
    ones = table.ones.astype(np.uint32)
    words = form.entry_bytes // 4
    entries = np.zeros((len(lanes), words), np.uint32)
    if form.entry == "ONE_WORD":
        positions[:, 3] = lengths | ones << 6
        entries[:] = positions[:, :4].view(np.uint32)
        return entries
    entries[:, 0] = lengths | ones << 16
    if form.entry == "NIBBLES":
        positions[:, :4] |= positions[:, 4:8] << 4
    entries[:, 1:] = positions[:, : 4 * (words - 1)].view(np.uint32)[:, : words - 1]
    return entries
