"""Trits of a matrix, coded a segment of rows at a time (SPEC.md section 7.2), and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.dictionary import Dictionary
from qmoe_format.codec.profiles import FAST
from qmoe_format.codec.threads import in_parts
from qmoe_format.errors import QMoEError

GUARD = 8  # zero bytes after the segments, so that kernels may load 8 bytes anywhere
BLOCK = 32  # segments for which one offset is stored
_ENCODE_WEIGHTS = 1 << 20  # weights coded into one scratch buffer


@dataclass(frozen=True, slots=True)
class EncodedTrits:
    """The trits of a matrix [rows, columns] as stored.

    ``rows_per_segment``  rows that a segment holds; the last one may hold fewer
    ``lengths``           uint8, uint16 or uint32 [number of segments]: bytes above ``length_base``
    ``block_offsets``     uint32 [ceil(number / 32)]: where every 32nd segment begins
    ``segments``          uint8 [segment_bytes + at least 8 guard bytes]
    """

    rows: int
    columns: int
    rows_per_segment: int
    dictionary: Dictionary
    nonzeros: int
    length_base: int
    lengths: npt.NDArray[Any]
    block_offsets: npt.NDArray[np.uint32]
    segments: npt.NDArray[np.uint8]
    segment_bytes: int

    def __post_init__(self) -> None:
        """Check what the kernels rely on: the segments lie within their array."""
        if self.rows_per_segment < 1:
            raise QMoEError(
                "argument", f"a segment has at least one row, not {self.rows_per_segment}"
            )
        lengths, segments = self.lengths, self.segments
        if lengths.shape != (self.count,) or lengths.dtype not in (np.uint8, np.uint16, np.uint32):
            raise QMoEError(
                "malformed",
                f"lengths of segments are uint8, uint16 or uint32 [{self.count}], not "
                f"{lengths.dtype} {list(lengths.shape)}",
            )
        if segments.dtype != np.uint8 or segments.size < self.segment_bytes + GUARD:
            raise QMoEError(
                "malformed",
                f"{self.segment_bytes} bytes of segments and {GUARD} guard bytes are uint8, in one "
                f"array, not {segments.dtype} {list(segments.shape)}",
            )
        held = int(lengths.sum(dtype=np.int64)) + self.count * self.length_base
        if held != self.segment_bytes:
            raise QMoEError(
                "malformed",
                f"the lengths of {self.count} segments come to {held} bytes, "
                f"{self.segment_bytes} are stored",
            )

    @property
    def count(self) -> int:
        """Number of segments."""
        return -(-self.rows // self.rows_per_segment)

    @property
    def zero_fraction(self) -> float:
        """Share of trits that are zero; 1.0 for an empty matrix."""
        return 1.0 - self.nonzeros / max(self.rows * self.columns, 1)

    @property
    def payload_bits_per_weight(self) -> float:
        """Bits of codewords and signs, rounding to bytes included; no lengths, no scales."""
        return 8.0 * self.segment_bytes / max(self.rows * self.columns, 1)

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [count + 1]: where each segment begins, and where the last one ends."""
        offsets = np.zeros(self.count + 1, np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=offsets[1:])
        offsets[1:] += self.length_base * np.arange(1, self.count + 1)
        return offsets


def encode(
    trits: npt.NDArray[np.int8],
    dictionary: Dictionary,
    threads: int = 1,
    rows_per_segment: int | None = None,
) -> EncodedTrits:
    """Code ``trits`` int8 [rows, columns] of -1, 0, +1; the result is the same for any ``threads``.

    ``rows_per_segment`` None: as many as come to about 4096 weights (profile ``fast``). Raises
    ``QMoEError``: ``argument`` for another dtype, shape or value.
    """
    from qmoe_format.codec.kernels.encode import encode_segments
    from qmoe_format.codec.tables import tables

    if trits.dtype != np.int8 or trits.ndim != 2:
        raise QMoEError(
            "argument", f"trits are int8 [rows, columns], not {trits.dtype} {trits.shape}"
        )
    if trits.size and (trits.min() < -1 or trits.max() > 1):
        raise QMoEError("argument", "a trit is -1, 0 or +1")
    rows, columns = trits.shape
    if rows_per_segment is None:
        rows_per_segment = FAST.rows_per_segment(columns)
    if rows_per_segment < 1:
        raise QMoEError("argument", f"a segment has at least one row, not {rows_per_segment}")
    together = min(rows_per_segment, max(rows, 1))
    span = together * columns
    count = -(-rows // together)
    flat = np.ascontiguousarray(trits).reshape(-1)
    look_up = tables(dictionary)
    lengths = np.zeros(count, np.int64)
    totals = np.zeros(count, np.int64)
    most = (span * (dictionary.width + 1) + 7) // 8 + 1  # bytes of one segment, at the very worst
    step = max(1, _ENCODE_WEIGHTS // max(span, 1))

    def work(first: int, last: int) -> list[npt.NDArray[np.uint8]]:
        parts = []
        for start in range(first, last, step):
            stop = min(start + step, last)
            out = np.zeros((stop - start) * most + 2 * GUARD, np.uint8)
            written = encode_segments(
                start, stop, flat, span, dictionary.width, dictionary.signs == "codeword",
                look_up.children, look_up.codewords, out, lengths, totals,
            )  # fmt: skip
            parts.append(out[:written].copy())
        return parts

    parts = [part for thread in in_parts(count, threads, work) for part in thread]
    segments = np.concatenate([*parts, np.zeros(GUARD, np.uint8)])
    segment_bytes = segments.size - GUARD
    if segment_bytes >= 1 << 32:
        raise QMoEError("limit", "the codewords of one matrix are above 4 GiB: split it")
    base = int(lengths.min()) if count else 0
    spread = int(lengths.max()) - base if count else 0
    narrow = np.uint8 if spread < 1 << 8 else np.uint16 if spread < 1 << 16 else np.uint32
    return EncodedTrits(
        rows=rows,
        columns=columns,
        rows_per_segment=together,
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

    Raises ``QMoEError``: ``malformed`` or ``padding``, naming the segment.
    """
    from qmoe_format.codec.kernels import decode as decoding
    from qmoe_format.codec.tables import tables

    shape = (encoded.rows, encoded.columns)
    if out is None:
        out = np.empty(shape, np.int8)
    elif out.shape != shape or out.dtype != np.int8 or not out.flags.c_contiguous:
        raise QMoEError("argument", f"out has to be a contiguous int8 array of shape {shape}")
    arguments = segment_arguments(encoded)
    flat = out.reshape(-1)
    totals = np.zeros(encoded.count, np.int64)
    look_up = tables(encoded.dictionary)
    if look_up.used < 1 << encoded.dictionary.width:
        span = encoded.rows_per_segment * encoded.columns
        run(
            decoding.find_unused_codeword, range(encoded.count), threads,
            *arguments[:4], span, flat.size, look_up.steps,
        )  # fmt: skip
    run(decoding.decode_segments, range(encoded.count), threads, *arguments, totals, flat)
    if int(totals.sum()) != encoded.nonzeros:  # [E-13]
        raise QMoEError(
            "malformed", f"{totals.sum()} trits are not zero, the header says {encoded.nonzeros}"
        )
    return out


def segment_arguments(encoded: EncodedTrits) -> tuple[Any, ...]:
    """What every decoding kernel takes after the range of segments."""
    from qmoe_format.codec.kernels.scan import SIGN_BYTES
    from qmoe_format.codec.tables import tables

    look_up = tables(encoded.dictionary)
    return (
        encoded.segments,
        encoded.lengths,
        np.uint64(encoded.length_base),
        np.uint64(encoded.dictionary.width),
        encoded.dictionary.signs == "codeword",
        look_up.positions,
        look_up.steps,
        look_up.nonzeros,
        np.uint64(encoded.dictionary.max_length),
        SIGN_BYTES,
        encoded.rows_per_segment * encoded.columns,
    )


Call = tuple[Any, range, tuple[Any, ...]]
"""A kernel, the segments it is for, and its arguments after their first and last."""


def run(kernel: Any, segments: range, threads: int, *arguments: Any) -> None:
    """``kernel(first, last, *arguments)`` over ``segments``; raise what it found wrong."""
    run_all([(kernel, segments, arguments)], threads)


def run_all(calls: Sequence[Call], threads: int) -> None:
    """All of ``calls``; each thread has its share of every one's segments."""
    from qmoe_format.codec.kernels import scan as chunks

    most = max((len(segments) for _, segments, _ in calls), default=0)
    parts = max(1, min(threads, most))

    def work(first: int, last: int) -> int:
        for kernel, segments, arguments in calls:
            share = segments[len(segments) * first // parts : len(segments) * last // parts]
            if share and (status := int(kernel(share[0], share[-1] + 1, *arguments))) != chunks.OK:
                return status
        return chunks.OK

    for status in in_parts(parts, parts, work):
        if status != chunks.OK:
            segment, reason = divmod(status, 8)
            code, message = {
                chunks.ENDS_EARLY: ("malformed", "ends before its last weight"),  # [E-12]
                chunks.BEYOND_END: ("malformed", "has a non-zero beyond its last row"),  # [E-10]
                chunks.LEFT_OVER: (
                    "malformed",
                    "is longer than its codewords and signs",
                ),  # [E-12]
                chunks.PADDING: ("padding", "has padding bits that are not zero"),  # [E-12]
                chunks.NO_CODEWORD: ("malformed", "has a codeword that its dictionary lacks"),
            }[reason]  # [D-5]
            raise QMoEError(code, f"segment {segment} {message}")
