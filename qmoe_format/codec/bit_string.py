"""A string of bits per segment, in codewords: a matrix's mask, or its refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.dictionary import Dictionary
from qmoe_format.errors import QMoEError

GUARD = 8  # zero bytes after the segments, so that kernels may load 8 bytes anywhere
BLOCK = 32  # segments per stored offset


@dataclass(frozen=True, slots=True)
class EncodedBits:
    """The codewords of all segments (SPEC.md section 7.1); a mask's end with the signs.

    Attributes:
        ones: in all segments' strings.
        lengths: uint8, uint16 or uint32 [segments], bytes of each above ``length_base``.
        block_offsets: uint32 [ceil(segments / 32)], where every 32nd segment begins.
        segments: uint8 [segment_bytes + at least 8 guard bytes], contiguous.

    Raises:
        QMoEError: ``malformed`` if these do not fit each other.
    """

    dictionary: Dictionary
    ones: int
    length_base: int
    lengths: npt.NDArray[Any]
    block_offsets: npt.NDArray[np.uint32]
    segments: npt.NDArray[np.uint8]
    segment_bytes: int

    def __post_init__(self) -> None:
        """Check what the kernels rely on: the segments lie within their array."""
        lengths, segments = self.lengths, self.segments
        if lengths.ndim != 1 or lengths.dtype not in (np.uint8, np.uint16, np.uint32):
            wrong = f"{lengths.dtype} {list(lengths.shape)} lengths of segments"
            raise QMoEError("malformed", wrong)
        needed = self.segment_bytes + GUARD
        if segments.dtype != np.uint8 or segments.size < needed or not segments.flags.c_contiguous:
            wrong = f"{segments.dtype} {list(segments.shape)} segments, not {needed} adjacent bytes"
            raise QMoEError("malformed", wrong)
        total = int(lengths.sum(dtype=np.int64)) + lengths.size * self.length_base
        if total != self.segment_bytes:
            wrong = f"segment lengths add up to {total} bytes, not {self.segment_bytes}"
            raise QMoEError("malformed", wrong)

    @classmethod
    def from_lengths(
        cls,
        dictionary: Dictionary,
        ones: int,
        lengths: npt.NDArray[np.int64],
        segments: npt.NDArray[np.uint8],
    ) -> EncodedBits:
        """Segments of these ``lengths``, in bytes, followed by the guard.

        Raises:
            QMoEError: ``limit`` beyond 4 GiB.
        """
        segment_bytes = segments.size - GUARD
        if segment_bytes >= 1 << 32:
            raise QMoEError("limit", "the codewords of one matrix exceed 4 GiB", "split the matrix")
        base = int(lengths.min()) if lengths.size else 0
        spread = int((lengths - base).max(initial=0))
        narrow = np.uint8 if spread < 1 << 8 else np.uint16 if spread < 1 << 16 else np.uint32
        return cls(
            dictionary=dictionary,
            ones=ones,
            length_base=base,
            lengths=(lengths - base).astype(narrow),
            block_offsets=(np.cumsum(lengths) - lengths)[::BLOCK].astype(np.uint32),
            segments=segments,
            segment_bytes=segment_bytes,
        )

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [segments + 1]: where each segment begins, and where the last one ends."""
        offsets = np.zeros(self.lengths.size + 1, np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=offsets[1:])
        offsets[1:] += self.length_base * np.arange(1, offsets.size)
        return offsets
