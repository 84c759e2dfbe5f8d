"""Trits of a matrix, coded row by row (SPEC.md section 7.2), and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.dictionary import Dictionary
from qmoe_format.codec.threads import over_rows
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec.tables import Tables

GUARD = 8  # zero bytes after the segments, so that kernels may load 8 bytes anywhere
BLOCK = 32  # rows for which one offset is stored
_ENCODE_WEIGHTS = 1 << 20  # weights coded into one scratch buffer


@dataclass(frozen=True, slots=True)
class EncodedTrits:
    """The trits of a matrix [rows, columns] as stored.

    ``lengths``        uint8, uint16 or uint32 [rows]: bytes of a segment above ``length_base``
    ``block_offsets``  uint32 [ceil(rows / 32)]: where the segment of every 32nd row begins
    ``segments``       uint8 [segment_bytes + at least 8 guard bytes]
    """

    rows: int
    columns: int
    dictionary: Dictionary
    nonzeros: int
    length_base: int
    lengths: npt.NDArray[Any]
    block_offsets: npt.NDArray[np.uint32]
    segments: npt.NDArray[np.uint8]
    segment_bytes: int

    def __post_init__(self) -> None:
        """Check what the kernels rely on: the segments lie within their array."""
        held = int(self.lengths.sum(dtype=np.int64)) + self.rows * self.length_base
        if (
            self.lengths.shape != (self.rows,)
            or self.lengths.dtype not in (np.uint8, np.uint16, np.uint32)
            or held != self.segment_bytes
            or self.segments.dtype != np.uint8
            or self.segments.size < self.segment_bytes + GUARD
        ):
            raise QMoEError(
                "malformed",
                f"the lengths of {self.rows} segments come to {held} bytes, "
                f"{self.segment_bytes} are stored",
            )

    @property
    def zero_fraction(self) -> float:
        """Share of trits that are zero; 1.0 for an empty matrix."""
        return 1.0 - self.nonzeros / max(self.rows * self.columns, 1)

    @property
    def payload_bits_per_weight(self) -> float:
        """Bits of codewords and signs, rounding to bytes included; no lengths, no scales."""
        return 8.0 * self.segment_bytes / max(self.rows * self.columns, 1)

    def row_offsets(self) -> npt.NDArray[np.int64]:
        """int64 [rows + 1]: where each segment begins, and where the last one ends."""
        offsets = np.zeros(self.rows + 1, np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=offsets[1:])
        offsets[1:] += self.length_base * np.arange(1, self.rows + 1)
        return offsets


def encode(trits: npt.NDArray[np.int8], dictionary: Dictionary, threads: int = 1) -> EncodedTrits:
    """Code ``trits`` int8 [rows, columns] of -1, 0, +1; the result is the same for any ``threads``.

    Raises ``QMoEError``: ``argument`` for another dtype, shape or value.
    """
    from qmoe_format.codec.kernels import encode_rows
    from qmoe_format.codec.tables import tables

    if trits.dtype != np.int8 or trits.ndim != 2:
        raise QMoEError(
            "argument", f"trits are int8 [rows, columns], not {trits.dtype} {trits.shape}"
        )
    trits = np.ascontiguousarray(trits)
    rows, columns = trits.shape
    if trits.size and (trits.min() < -1 or trits.max() > 1):
        raise QMoEError("argument", "a trit is -1, 0 or +1")
    look_up = tables(dictionary)
    lengths = np.zeros(rows, np.int64)
    totals = np.zeros(rows, np.int64)
    most = (columns * (dictionary.width + 1) + 7) // 8 + 1  # bytes of one row, at the very worst
    step = max(1, _ENCODE_WEIGHTS // max(columns, 1))

    def work(first: int, last: int) -> list[npt.NDArray[np.uint8]]:
        parts = []
        for start in range(first, last, step):
            stop = min(start + step, last)
            out = np.zeros((stop - start) * most + 2 * GUARD, np.uint8)
            written = encode_rows(
                start, stop, trits, dictionary.width, dictionary.signs == "codeword",
                look_up.children, look_up.codewords, out, lengths, totals,
            )  # fmt: skip
            parts.append(out[:written].copy())
        return parts

    parts = [part for thread in over_rows(rows, threads, work) for part in thread]
    segments = np.concatenate([*parts, np.zeros(GUARD, np.uint8)])
    segment_bytes = segments.size - GUARD
    if segment_bytes >= 1 << 32:
        raise QMoEError("limit", "the codewords of one matrix are above 4 GiB: split it")
    base = int(lengths.min()) if rows else 0
    spread = int(lengths.max()) - base if rows else 0
    narrow = np.uint8 if spread < 1 << 8 else np.uint16 if spread < 1 << 16 else np.uint32
    return EncodedTrits(
        rows=rows,
        columns=columns,
        dictionary=dictionary,
        nonzeros=int(totals.sum()),
        length_base=base,
        lengths=(lengths - base).astype(narrow),
        block_offsets=(np.cumsum(lengths) - lengths)[::BLOCK].astype(np.uint32),
        segments=segments,
        segment_bytes=segment_bytes,
    )


def decode(
    encoded: EncodedTrits, out: npt.NDArray[np.int8] | None = None, threads: int = 1
) -> npt.NDArray[np.int8]:
    """Trits int8 [rows, columns]; every rule of SPEC.md section 7.2 is checked.

    Raises ``QMoEError``: ``malformed`` or ``padding``, naming the row.
    """
    from qmoe_format.codec import kernels

    shape = (encoded.rows, encoded.columns)
    if out is None:
        out = np.empty(shape, np.int8)
    elif out.shape != shape or out.dtype != np.int8 or not out.flags.c_contiguous:
        raise QMoEError("argument", f"out has to be a contiguous int8 array of shape {shape}")
    kernel_arguments, look_up = segment_arguments(encoded)
    offsets = kernel_arguments[1]
    totals = np.zeros(encoded.rows, np.int64)
    width, steps = np.uint64(encoded.dictionary.width), look_up.steps
    if look_up.used < 1 << encoded.dictionary.width:
        columns = np.uint64(encoded.columns)
        check(
            over_rows(
                encoded.rows,
                threads,
                lambda first, last: kernels.find_unused_codeword(
                    first, last, encoded.segments, offsets, width, columns, steps
                ),
            )
        )
    check(
        over_rows(
            encoded.rows,
            threads,
            lambda first, last: kernels.decode_rows(first, last, *kernel_arguments, totals, out),
        )
    )
    if int(totals.sum()) != encoded.nonzeros:  # [E-13]
        raise QMoEError(
            "malformed", f"{totals.sum()} trits are not zero, the header says {encoded.nonzeros}"
        )
    return out


def segment_arguments(encoded: EncodedTrits) -> tuple[tuple[Any, ...], Tables]:
    """What every decoding kernel takes after the range of rows, and the dictionary's tables."""
    from qmoe_format.codec.kernels import SIGN_BYTES
    from qmoe_format.codec.tables import tables

    look_up = tables(encoded.dictionary)
    return (
        encoded.segments,
        encoded.row_offsets(),
        np.uint64(encoded.dictionary.width),
        encoded.dictionary.signs == "codeword",
        look_up.positions,
        look_up.steps,
        look_up.nonzeros,
        np.uint64(encoded.dictionary.max_length),
        SIGN_BYTES,
    ), look_up


def check(statuses: list[int]) -> None:
    """Raise for the first failure among what kernels returned."""
    from qmoe_format.codec import kernels

    for status in statuses:
        if status != kernels.OK:
            row, reason = divmod(status, 8)
            code, message = {
                kernels.ENDS_EARLY: ("malformed", "ends before the last column"),  # [E-12]
                kernels.BEYOND_ROW: (
                    "malformed",
                    "has a non-zero beyond the last column",
                ),  # [E-10]
                kernels.LEFT_OVER: (
                    "malformed",
                    "is longer than its codewords and signs",
                ),  # [E-12]
                kernels.PADDING: ("padding", "has padding bits that are not zero"),  # [E-12]
                kernels.NO_CODEWORD: ("malformed", "has a codeword that its dictionary lacks"),
            }[reason]
            raise QMoEError(code, f"the segment of row {row} {message}")
