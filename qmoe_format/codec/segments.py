"""Levels of a matrix to segments of a few rows each, and back (SPEC.md section 7.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array, output
from qmoe_format.codec.bit_string import GUARD, EncodedBits
from qmoe_format.codec.dictionary import Dictionary, standard_dictionary
from qmoe_format.codec.profiles import FAST
from qmoe_format.codec.threads import in_parts
from qmoe_format.errors import QMoEError

MOST = 127  # the largest magnitude of a level
_ENCODE_WEIGHTS = 1 << 20  # encoded into one scratch buffer


@dataclass(frozen=True, slots=True)
class EncodedLevels:
    """The levels of a matrix [rows, columns] as stored.

    Attributes:
        rows_per_segment: rows in a segment; the last one may hold fewer.
        mask: where levels are not zero, and their signs.
        refinement: how large they are; None if none is beyond -1 to 1.

    Raises:
        QMoEError: ``argument`` or ``malformed`` if these do not fit each other.
    """

    rows: int
    columns: int
    rows_per_segment: int
    mask: EncodedBits
    refinement: EncodedBits | None

    def __post_init__(self) -> None:
        """Check that both strings have all segments."""
        _check_rows_per_segment(self.rows_per_segment)
        for bits in self.strings:
            if bits.lengths.size != self.count:
                wrong = f"{bits.lengths.size} lengths for {self.count} segments"
                raise QMoEError("malformed", wrong)
        if self.refinement is not None and self.refinement.ones == 0:  # [E-16]
            raise QMoEError("malformed", "the refinement refines nothing")

    @property
    def strings(self) -> tuple[EncodedBits, ...]:
        """Mask and, where there is one, refinement."""
        return (self.mask,) if self.refinement is None else (self.mask, self.refinement)

    @property
    def count(self) -> int:
        """Number of segments."""
        return -(-self.rows // self.rows_per_segment)

    @property
    def nonzeros(self) -> int:
        """Number of levels that are not zero."""
        return self.mask.ones

    @property
    def zero_fraction(self) -> float:
        """Share of levels that are zero; 1.0 for an empty matrix."""
        return 1.0 - self.nonzeros / max(self.rows * self.columns, 1)

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary of the mask."""
        return self.mask.dictionary

    @property
    def payload_bits_per_weight(self) -> float:
        """Bits of codewords, signs and padding to bytes, without lengths and scales."""
        stored = sum(each.segment_bytes for each in self.strings)
        return 8.0 * stored / max(self.rows * self.columns, 1)


def _check_rows_per_segment(rows: int) -> None:
    if rows < 1:
        raise QMoEError("argument", f"a segment holds {rows} rows", "give it at least one")


def encode(
    levels: npt.NDArray[np.int8],
    threads: int = 1,
    *,
    width: int = FAST.width,
    rows_per_segment: int | None = None,
    dictionary: Dictionary | None = None,
    refinement_dictionary: Dictionary | None = None,
) -> EncodedLevels:
    """Encode levels.

    Args:
        levels: int8 [rows, columns] of -127 to 127.
        threads: do not change the result.
        width: of the dictionaries that are not given, see ``standard_dictionary``.
        rows_per_segment: by default as many as hold about 4096 weights (profile ``fast``).
        dictionary: by default the standard one for the share of zeros.
        refinement_dictionary: by default the standard one for the share of zeros in the refinement.

    Raises:
        QMoEError: ``argument`` for another dtype, shape or value; ``limit`` beyond 4 GiB.

    Example:
        >>> from qmoe_format.codec import decode, encode
        >>> levels = np.array([[0, 0, 3, 0], [0, -1, 0, 0]], np.int8)
        >>> encoded = encode(levels)
        >>> encoded.nonzeros, encoded.refinement.ones
        (2, 2)
        >>> np.array_equal(decode(encoded), levels)
        True
    """
    from qmoe_format.codec.kernels.encode import encode_masks, encode_refinements

    check_array("levels", levels, np.int8, (None, None))
    least, greatest = (int(levels.min()), int(levels.max())) if levels.size else (0, 0)
    if least < -MOST:
        raise QMoEError("argument", f"a level is {least}, below -{MOST}")
    rows, columns = levels.shape
    if rows_per_segment is None:
        rows_per_segment = FAST.rows_per_segment(columns)
    _check_rows_per_segment(rows_per_segment)
    rows_per_segment = min(rows_per_segment, max(rows, 1))
    flat = np.ascontiguousarray(levels).reshape(-1)
    span = rows_per_segment * columns
    nonzeros = int(np.count_nonzero(flat))

    def encoded(kernel: Any, dictionary: Dictionary | None, ones: int, bits: int) -> EncodedBits:
        if dictionary is None:
            dictionary = standard_dictionary(1 - ones / max(bits, 1), width)
        return _encode(kernel, flat, span, -(-rows // rows_per_segment), dictionary, threads)

    mask = encoded(encode_masks, dictionary, nonzeros, flat.size)
    refinement = None
    if least < -1 or greatest > 1:
        bits = int(np.abs(flat).sum(dtype=np.int64))
        refinement = encoded(encode_refinements, refinement_dictionary, bits - nonzeros, bits)
    return EncodedLevels(rows, columns, rows_per_segment, mask, refinement)


def _encode(
    kernel: Any,
    levels: npt.NDArray[np.int8],
    span: int,
    count: int,
    dictionary: Dictionary,
    threads: int,
) -> EncodedBits:
    """Encode one string of ``count`` segments of ``span`` levels."""
    from qmoe_format.codec.kernels.tables import tables

    tree = (dictionary.width, tables(dictionary).children)
    lengths, totals = np.zeros(count, np.int64), np.zeros(count, np.int64)
    step = max(1, _ENCODE_WEIGHTS // max(span, 1))

    def work(first: int, last: int) -> list[npt.NDArray[np.uint8]]:
        parts = []
        for start in range(first, last, step):
            stop = min(start + step, last)
            some = levels[start * span : stop * span]
            # In the worst case each bit takes a codeword; a mask has one a weight, and a sign.
            bits = max(some.size, int(np.abs(some).sum(dtype=np.int64)))
            most = (bits * (dictionary.width + 1) + 7) // 8 + stop - start
            out = np.zeros(most + 2 * GUARD, np.uint8)
            written = kernel(start, stop, levels, span, tree, out, lengths, totals)
            parts.append(out[:written].copy())
        return parts

    parts = [part for thread in in_parts(count, threads, work) for part in thread]
    segments = np.concatenate([*parts, np.zeros(GUARD, np.uint8)])
    return EncodedBits.from_lengths(dictionary, int(totals.sum()), lengths, segments)


def decode(
    encoded: EncodedLevels, out: npt.NDArray[np.int8] | None = None, threads: int = 1
) -> npt.NDArray[np.int8]:
    """Decode all levels and check every rule of SPEC.md section 7.2.

    Args:
        out: int8 [rows, columns], contiguous, to be overwritten and returned.

    Returns:
        int8 [rows, columns] of -127 to 127.

    Raises:
        QMoEError: ``malformed``, ``padding`` or ``limit``, with the number of the segment;
            ``argument`` for another ``out``.
    """
    from qmoe_format.codec.kernels.decode import decode_segments

    out = output(out, np.int8, (encoded.rows, encoded.columns), contiguous=True)
    totals = np.zeros((encoded.count, 2), np.int64)
    arguments = (*kernel_strings(encoded), totals, out.reshape(-1))
    run_all([(decode_segments, 0, encoded.count, arguments)], threads)
    for bits, total in zip(encoded.strings, totals.sum(axis=0), strict=False):
        if total != bits.ones:  # [E-14]
            raise QMoEError("malformed", f"a string has {total} ones, not {bits.ones}")
    return out


def kernel_strings(encoded: EncodedLevels) -> tuple[Any, ...]:
    """What most kernels take first: weights of a segment, mask, its entries, refinement."""
    from qmoe_format.codec.kernels.tables import by_zeros, tables

    refinement = encoded.refinement
    return (
        min(encoded.rows_per_segment, encoded.rows) * encoded.columns,
        kernel_segments(encoded.mask),
        tables(encoded.dictionary).entries,
        refinement and (kernel_segments(refinement), by_zeros(refinement.dictionary)),
    )


def kernel_segments(bits: EncodedBits) -> tuple[Any, ...]:
    """``kernels.scan.Segments`` as a plain tuple."""
    base, width = np.uint64(bits.length_base), np.uint64(bits.dictionary.width)
    return bits.segments, bits.lengths, base, width


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
            _fail(status)


def _fail(status: int) -> NoReturn:
    from qmoe_format.codec.kernels import scan

    segment, reason = divmod(status, scan.REASONS)
    code, problem = {
        scan.ENDS_EARLY: ("malformed", "ends before its last weight"),  # [E-13]
        scan.BEYOND_END: ("malformed", "has a one beyond its end"),  # [E-11]
        scan.LEFT_OVER: ("malformed", "is longer than its codewords and signs"),  # [E-13]
        scan.PADDING: ("padding", "has padding bits that are not zero"),  # [E-13]
        scan.TOO_LARGE: ("limit", f"has a level beyond {MOST}"),  # [E-15]
    }[reason % scan.REFINEMENT]
    what = "the refinement of segment" if reason >= scan.REFINEMENT else "segment"
    raise QMoEError(code, f"{what} {segment} {problem}")
