"""Look-up tables of a dictionary, built once and shared by all kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.kernels.jit import kernel

if TYPE_CHECKING:
    from qmoe_format.codec.dictionary import Dictionary

# A step of one bit in each of the four 16-bit lanes of a word of positions.
LANES = np.uint64(0x0001_0001_0001_0001)
# The highest bits of a pattern hold the entry's length, so that one load brings both.
LENGTH_BITS = 6
LONG = (
    1 << LENGTH_BITS
) - 1  # instead of a length, where the other bits have no room for the entry


@dataclass(frozen=True, slots=True)
class Tables:
    """What encoder and decoder look up; 2^w codewords, and one inner node less.

    Attributes:
        positions: uint64 [2^w, words], where the entry's ones are, four 16-bit lanes a word.
        steps: uint64 [2^w], the entry's length in all four lanes.
        ones: uint8 [2^w].
        longest: the length of the longest entry.
        patterns: uint32 or uint64 [2^w], the entry's bits and, in the highest ``LENGTH_BITS``, its
            length or ``LONG``.
        children: int32 [2^w - 1, 2], the inner node after a 0 / a 1, or ``~codeword``.
    """

    positions: npt.NDArray[np.uint64]
    steps: npt.NDArray[np.uint64]
    ones: npt.NDArray[np.uint8]
    longest: np.uint64
    patterns: npt.NDArray[Any]
    children: npt.NDArray[np.int32]

    @property
    def entries(self) -> tuple[Any, ...]:
        """What kernels take to list the positions of ones."""
        return self.positions, self.steps, self.ones, self.longest


@lru_cache(maxsize=64)
def tables(dictionary: Dictionary) -> Tables:
    """The tables of ``dictionary``."""
    bits = np.unpackbits(np.frombuffer(dictionary.tree, np.uint8), bitorder="little")
    size = 1 << dictionary.width
    words = next(words for words in (1, 2, 4) if dictionary.max_ones <= 4 * words)
    positions = np.zeros((size, words), np.uint64)
    steps = np.zeros(size, np.uint64)
    ones = np.zeros(size, np.uint8)
    children = np.zeros((size - 1, 2), np.int32)
    _fill(bits, positions, steps, ones, children)
    longest = np.uint64(dictionary.max_length)
    return Tables(positions, steps, ones, longest, _patterns(positions, steps, ones), children)


@lru_cache(maxsize=64)
def by_zeros(dictionary: Dictionary) -> tuple[Any, ...]:
    """``Tables.entries`` in which positions and lengths count only zeros."""
    table = tables(dictionary)
    lanes = table.positions.view(np.uint16)
    positions = (lanes - np.arange(lanes.shape[1], dtype=np.uint16)).view(np.uint64)
    steps = table.steps - table.ones * LANES
    return positions, steps, table.ones, (steps & np.uint64(255)).max()


def _patterns(
    positions: npt.NDArray[np.uint64],
    steps: npt.NDArray[np.uint64],
    ones: npt.NDArray[np.uint8],
) -> npt.NDArray[Any]:
    """``Tables.patterns``, in the smaller type if that has room for all entries."""
    lengths = steps & np.uint64(255)
    bits = 32 if lengths.max() <= 32 - LENGTH_BITS else 64
    room = np.uint64(bits - LENGTH_BITS)
    patterns = np.zeros(ones.size, np.uint64)
    for k in range(int(ones.max())):
        place = (positions[:, k >> 2] >> np.uint64(16 * (k & 3))) & np.uint64(0xFFFF)
        patterns |= (ones > k) * (np.uint64(1) << (place & np.uint64(63)))
    patterns |= lengths << room
    patterns[lengths > room] = np.uint64(LONG) << room
    return patterns.astype(f"uint{bits}")


@kernel
def _fill(bits, positions, steps, ones, children):
    # The path from the root is the entry so far: its length, and where its ones are.
    path = np.zeros(256, np.int64)  # inner node at each depth
    second = np.zeros(256, np.uint8)  # 1: the path went on to the second child there
    depth = 0
    inner = code = 0
    for bit in bits:
        if depth > 0:
            parent = path[depth - 1]
            children[parent, second[depth - 1]] = inner if bit else ~code
        if bit:
            path[depth] = inner
            second[depth] = 0
            inner += 1
            depth += 1
            continue
        steps[code] = np.uint64(depth) * LANES
        count = 0
        for c in range(depth):
            if second[c]:
                positions[code, count >> 2] |= np.uint64(c) << np.uint64(16 * (count & 3))
                count += 1
        ones[code] = count
        code += 1
        while depth > 0 and second[depth - 1]:
            depth -= 1
        if depth == 0:
            break
        second[depth - 1] = 1
