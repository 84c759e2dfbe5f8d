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

# A step of one weight in each of the four 16-bit lanes of a word of positions.
LANES = np.uint64(0x0001_0001_0001_0001)
SIGN_BIT = np.uint64(0x8000)
# Weights of the longest entry for which there are masks: three of them, shifted by up to 7 bits,
# fit one word, with a bit to spare.
MASK_LENGTH = 18


@dataclass(frozen=True, slots=True)
class Tables:
    """What encoder and decoder look up; 2^w codewords, n inner nodes.

    Attributes:
        positions: uint64 [2^w, words], where the entry's non-zeros are, four 16-bit lanes a word;
            bit 15 of a lane is set where the sign is part of the codeword and negative.
        steps: uint64 [2^w], the entry's length in all four lanes; 0 for an unused codeword.
        nonzeros: uint8 [2^w].
        longest: the length of the longest entry.
        masks: uint32 [2^w], a bit for each non-zero, and the entry's length from bit
            ``MASK_LENGTH`` up; empty if there are longer entries.
        negative: uint32 [2^w], the same with bits only for those non-zeros whose sign is part of
            the codeword and negative.
        children: int32 [n, 2], the inner node after a zero / a non-zero, or ``~leaf``.
        codewords: uint16 [leaves], a leaf's first codeword.
        used: number of codewords that stand for something.
    """

    positions: npt.NDArray[np.uint64]
    steps: npt.NDArray[np.uint64]
    nonzeros: npt.NDArray[np.uint8]
    longest: np.uint64
    masks: npt.NDArray[np.uint32]
    negative: npt.NDArray[np.uint32]
    children: npt.NDArray[np.int32]
    codewords: npt.NDArray[np.uint16]
    used: int

    @property
    def entries(self) -> tuple[Any, ...]:
        """What kernels take to list the positions of non-zeros."""
        return self.positions, self.steps, self.nonzeros, self.longest


@lru_cache(maxsize=64)
def tables(dictionary: Dictionary) -> Tables:
    """The tables of ``dictionary``."""
    bits = np.unpackbits(np.frombuffer(dictionary.tree, np.uint8), bitorder="little")
    size = 1 << dictionary.width
    words = next(words for words in (1, 2, 4) if dictionary.max_nonzeros <= 4 * words)
    positions = np.zeros((size, words), np.uint64)
    steps = np.zeros(size, np.uint64)
    nonzeros = np.zeros(size, np.uint8)
    children = np.zeros((size, 2), np.int32)
    codewords = np.zeros(size, np.uint16)
    signed = dictionary.signs == "codeword"
    inner, used = _fill(bits, signed, positions, steps, nonzeros, children, codewords)
    return Tables(
        positions, steps, nonzeros, np.uint64(dictionary.max_length),
        *_masks(positions, steps, nonzeros), children[:inner], codewords[: inner + 1], used,
    )  # fmt: skip


def _masks(
    positions: npt.NDArray[np.uint64],
    steps: npt.NDArray[np.uint64],
    nonzeros: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """``masks`` and ``negative``."""
    sizes = (steps & np.uint64(255)).astype(np.uint32)
    if sizes.max() > MASK_LENGTH:
        return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    masks, negative = (sizes << np.uint32(MASK_LENGTH) for _ in range(2))
    for k in range(int(nonzeros.max())):
        place = (positions[:, k >> 2] >> np.uint64(16 * (k & 3))).astype(np.uint16)
        bit = (nonzeros > k) * (np.uint32(1) << (place & np.uint16(31)))
        masks |= bit
        negative |= bit * (place >> np.uint16(15))
    return masks, negative


@kernel
def _fill(bits, signed, positions, steps, nonzeros, children, codewords):
    # The path from the root is the entry so far: its length, and where its non-zeros are.
    path = np.zeros(256, np.int64)  # inner node at each depth
    second = np.zeros(256, np.uint8)  # 1: the path went on to the second child there
    depth = 0
    inner = leaf = code = 0
    for bit in bits:
        if depth > 0:
            parent = path[depth - 1]
            children[parent, second[depth - 1]] = inner if bit else ~leaf
        if bit:
            path[depth] = inner
            second[depth] = 0
            inner += 1
            depth += 1
            continue
        count = 0
        for c in range(depth):
            count += second[c]
        owned = 1 << count if signed else 1
        codewords[leaf] = code
        for signs in range(owned):
            steps[code + signs] = np.uint64(depth) * LANES
            nonzeros[code + signs] = count
            k = 0
            for c in range(depth):
                if second[c]:
                    lane = np.uint64(c)
                    if signs >> k & 1:
                        lane |= SIGN_BIT
                    positions[code + signs, k >> 2] |= lane << np.uint64(16 * (k & 3))
                    k += 1
        code += owned
        leaf += 1
        while depth > 0 and second[depth - 1]:
            depth -= 1
        if depth == 0:
            break
        second[depth - 1] = 1
    return inner, code
