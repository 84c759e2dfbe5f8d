"""Named choices of codeword width and segment length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Profile:
    """How a matrix is encoded.

    A segment is the smallest unit that can be decoded by itself, and the unit of threading; it
    wastes half a codeword at its end, 3.5 bits of rounding to bytes, and a byte for its length.

    Attributes:
        width: the most bits in a codeword.
        segment_weights: weights in a segment, roughly.
    """

    width: int
    segment_weights: int

    def rows_per_segment(self, columns: int) -> int:
        """As many rows as hold about ``segment_weights``."""
        return max(1, round(self.segment_weights / max(columns, 1)))


# 12 bits decode fastest on a CPU: the tables fit the first-level cache, and a codeword covers 1.5
# times the weights of one with 8 bits. 16 bits give the smallest files.
PROFILES = {"fast": Profile(12, 4096), "size": Profile(16, 65536)}
FAST = PROFILES["fast"]
