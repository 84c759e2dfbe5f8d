"""Levels of a matrix to segments of a few rows each, and back (SPEC.md section 7.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array, output
from qmoe_format.codec.dictionary import Dictionary
from qmoe_format.codec.profiles import FAST
from qmoe_format.codec.threads import in_parts
from qmoe_format.errors import QMoEError

GUARD = 8  # zero bytes after the segments, so that kernels may load 8 bytes anywhere
BLOCK = 32  # segments per stored offset
_ENCODE_WEIGHTS = 1 << 20  # encoded into one scratch buffer


@dataclass(frozen=True, slots=True)
class EncodedLevels:
    """The levels of a matrix [rows, columns] as stored.

    Attributes:
        rows_per_segment: rows in a segment; the last one may hold fewer.
        nonzeros: number of levels that are not zero.
        lengths: uint8, uint16 or uint32 [count], bytes of each segment above ``length_base``.
        block_offsets: uint32 [ceil(count / 32)], where every 32nd segment begins.
        segments: uint8 [segment_bytes + at least 8 guard bytes], contiguous.

    Raises:
        QMoEError: ``argument`` or ``malformed`` if these do not fit each other.
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
        _check_rows_per_segment(self.rows_per_segment)
        lengths, segments = self.lengths, self.segments
        if lengths.shape != (self.count,) or lengths.dtype not in (np.uint8, np.uint16, np.uint32):
            wrong = f"{lengths.dtype} {list(lengths.shape)} lengths for {self.count} segments"
            raise QMoEError("malformed", wrong)
        needed = self.segment_bytes + GUARD
        if segments.dtype != np.uint8 or segments.size < needed or not segments.flags.c_contiguous:
            wrong = f"{segments.dtype} {list(segments.shape)} segments, not {needed} adjacent bytes"
            raise QMoEError("malformed", wrong)
        total = int(lengths.sum(dtype=np.int64)) + self.count * self.length_base
        if total != self.segment_bytes:
            wrong = f"segment lengths add up to {total} bytes, not {self.segment_bytes}"
            raise QMoEError("malformed", wrong)

    @property
    def count(self) -> int:
        """Number of segments."""
        return -(-self.rows // self.rows_per_segment)

    @property
    def zero_fraction(self) -> float:
        """Share of levels that are zero; 1.0 for an empty matrix."""
        return 1.0 - self.nonzeros / max(self.rows * self.columns, 1)

    @property
    def payload_bits_per_weight(self) -> float:
        """Bits of codewords, signs and padding to bytes, without lengths and scales."""
        return 8.0 * self.segment_bytes / max(self.rows * self.columns, 1)

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [count + 1]: where each segment begins, and where the last one ends."""
        offsets = np.zeros(self.count + 1, np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=offsets[1:])
        offsets[1:] += self.length_base * np.arange(1, self.count + 1)
        return offsets


def _check_rows_per_segment(rows: int) -> None:
    if rows < 1:
        raise QMoEError("argument", f"a segment holds {rows} rows", "give it at least one")


def encode(
    levels: npt.NDArray[np.int8],
    dictionary: Dictionary,
    threads: int = 1,
    rows_per_segment: int | None = None,
) -> EncodedLevels:
    """Encode levels.

    Args:
        levels: int8 [rows, columns] of -1, 0, +1.
        dictionary: any; one that fits the share of zeros gives the fewest bits.
        threads: do not change the result.
        rows_per_segment: by default as many as hold about 4096 weights (profile ``fast``).

    Raises:
        QMoEError: ``argument`` for another dtype, shape or value; ``limit`` beyond 4 GiB.

    Example:
        >>> from qmoe_format.codec import decode, encode, standard_dictionary
        >>> levels = np.array([[0, 0, 1, 0], [0, -1, 0, 0]], np.int8)
        >>> encoded = encode(levels, standard_dictionary(0.75))
        >>> encoded.nonzeros, encoded.segment_bytes
        (2, 2)
        >>> np.array_equal(decode(encoded), levels)
        True
    """
    from qmoe_format.codec.kernels.encode import encode_segments
    from qmoe_format.codec.kernels.tables import tables

    check_array("levels", levels, np.int8, (None, None))
    if levels.size and (levels.min() < -1 or levels.max() > 1):
        raise QMoEError("argument", "levels have other values than -1, 0 and +1")
    rows, columns = levels.shape
    if rows_per_segment is None:
        rows_per_segment = FAST.rows_per_segment(columns)
    _check_rows_per_segment(rows_per_segment)
    rows_per_segment = min(rows_per_segment, max(rows, 1))
    span = rows_per_segment * columns
    count = -(-rows // rows_per_segment)
    flat = np.ascontiguousarray(levels).reshape(-1)
    table = tables(dictionary)
    tree = (dictionary.width, dictionary.signs == "codeword", table.children, table.codewords)
    lengths = np.zeros(count, np.int64)
    totals = np.zeros(count, np.int64)
    most = (span * (dictionary.width + 1) + 7) // 8 + 1  # bytes of one segment, in the worst case
    step = max(1, _ENCODE_WEIGHTS // max(span, 1))

    def work(first: int, last: int) -> list[npt.NDArray[np.uint8]]:
        parts = []
        for start in range(first, last, step):
            stop = min(start + step, last)
            out = np.zeros((stop - start) * most + 2 * GUARD, np.uint8)
            written = encode_segments(start, stop, flat, span, tree, out, lengths, totals)
            parts.append(out[:written].copy())
        return parts

    parts = [part for thread in in_parts(count, threads, work) for part in thread]
    segments = np.concatenate([*parts, np.zeros(GUARD, np.uint8)])
    segment_bytes = segments.size - GUARD
    if segment_bytes >= 1 << 32:
        raise QMoEError("limit", "the codewords of one matrix exceed 4 GiB", "split the matrix")
    base = int(lengths.min()) if count else 0
    spread = int(lengths.max()) - base if count else 0
    narrow = np.uint8 if spread < 1 << 8 else np.uint16 if spread < 1 << 16 else np.uint32
    return EncodedLevels(
        rows=rows,
        columns=columns,
        rows_per_segment=rows_per_segment,
        dictionary=dictionary,
        nonzeros=int(totals.sum()),
        length_base=base,
        lengths=(lengths - base).astype(narrow),
        block_offsets=(np.cumsum(lengths) - lengths)[::BLOCK].astype(np.uint32),
        segments=segments,
        segment_bytes=segment_bytes,
    )


def decode(
    encoded: EncodedLevels, out: npt.NDArray[np.int8] | None = None, threads: int = 1
) -> npt.NDArray[np.int8]:
    """Decode all levels and check every rule of SPEC.md section 7.2.

    Args:
        out: int8 [rows, columns], contiguous, to be overwritten and returned.

    Returns:
        int8 [rows, columns] of -1, 0, +1.

    Raises:
        QMoEError: ``malformed`` or ``padding``, with the number of the segment; ``argument`` for
            another ``out``.
    """
    from qmoe_format.codec.kernels.decode import decode_segments, find_unused_codeword
    from qmoe_format.codec.kernels.tables import tables

    out = output(out, np.int8, (encoded.rows, encoded.columns), contiguous=True)
    flat = out.reshape(-1)
    totals = np.zeros(encoded.count, np.int64)
    table = tables(encoded.dictionary)
    segments = kernel_segments(encoded)
    if table.used < 1 << encoded.dictionary.width:
        call = (find_unused_codeword, 0, encoded.count, (segments, flat.size, table.steps))
        run_all([call], threads)
    arguments = (segments, table.entries, totals, flat)
    run_all([(decode_segments, 0, encoded.count, arguments)], threads)
    if int(totals.sum()) != encoded.nonzeros:  # [E-14]
        raise QMoEError(
            "malformed", f"{totals.sum()} levels are not zero, the header says {encoded.nonzeros}"
        )
    return out


def kernel_segments(encoded: EncodedLevels) -> tuple[Any, ...]:
    """``kernels.scan.Segments`` as a plain tuple."""
    dictionary = encoded.dictionary
    return (
        encoded.segments,
        encoded.lengths,
        np.uint64(encoded.length_base),
        np.uint64(dictionary.width),
        dictionary.signs == "codeword",
        encoded.rows_per_segment * encoded.columns,
    )


Call = tuple[Any, int, int, tuple[Any, ...]]
"""A kernel, the first and last segment it is for, and its other arguments."""


def run_all(calls: Sequence[Call], threads: int) -> None:
    """Make several calls; each thread has a share of the segments of every one.

    Raises:
        QMoEError: what a kernel found wrong.
    """
    most = max([last - first for _, first, last, _ in calls], default=0)
    parts = max(1, min(threads, most))

    def work(part: int, _: int) -> int:
        for kernel, first, last, arguments in calls:
            count = last - first
            start, stop = first + count * part // parts, first + count * (part + 1) // parts
            if start < stop and (status := kernel(start, stop, *arguments)) >= 0:
                return int(status)
        return -1

    for status in in_parts(parts, parts, work):
        if status >= 0:
            _fail(*divmod(status, 8))


def _fail(segment: int, reason: int) -> NoReturn:
    from qmoe_format.codec.kernels import scan

    code, problem = {
        scan.ENDS_EARLY: ("malformed", "ends before its last weight"),  # [E-13]
        scan.BEYOND_END: ("malformed", "has a non-zero beyond its last row"),  # [E-11]
        scan.LEFT_OVER: ("malformed", "is longer than its codewords and signs"),  # [E-13]
        scan.PADDING: ("padding", "has padding bits that are not zero"),  # [E-13]
        scan.NO_CODEWORD: ("malformed", "has a codeword that its dictionary lacks"),  # [D-X]
    }[reason]
    raise QMoEError(code, f"segment {segment} {problem}")
