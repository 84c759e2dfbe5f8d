"""QMoE's own code (arXiv 2310.16795, section 4), for comparison: no ``.qmoe`` file uses it.

Codewords of 16 bits stand for the 65,536 sequences of 1 to 14 pairs of levels that are most
probable at 88.5 % zeros; a row is parsed greedily, longest match first. The set contains every
prefix of its members. This costs it 17 %, for codewords that always lose to a longer match.

The table must be generated in IEEE binary64, multiplying from left to right, because rounding
breaks ties between equal probabilities (exact arithmetic agrees in 486 of 65,536 places).
``DECODER_SHA256`` is the hash of the table of the authors' code.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

ENTRIES = 1 << 16
MAX_PAIRS = 14
DECODER_SHA256 = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"


@dataclass(frozen=True, slots=True)
class QMoEDictionary:
    """Pair k is the levels k mod 3, k div 3, with 0, 1, 2 for 0, low, high.

    Attributes:
        trie: codeword + 1 after one more pair, or 0, int32 ``[entries + 1, 9]``; node 0 is the
            root.
        pairs: of each codeword, uint8 ``[entries, 14]``.
        counts: how many of them it has, uint8 ``[entries]``.
    """

    trie: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.uint8]
    counts: npt.NDArray[np.uint8]

    def decoder_table(self) -> npt.NDArray[np.uint32]:
        """The table of QMoE's kernel, 7 pairs of 4 bits above a count, uint32 ``[2 * entries]``."""
        nibbles = (self.pairs % 3 | (self.pairs // 3) << 2).astype(np.uint64)
        nibbles[np.arange(MAX_PAIRS) >= self.counts[:, None]] = 0
        shifts = np.uint64(4) * (np.arange(1, 8, dtype=np.uint64))
        halves = [(nibbles[:, h : h + 7] << shifts).sum(axis=1) for h in (0, 7)]
        table = np.stack(halves, axis=1) | self.counts[:, None]
        return table.astype(np.uint32).ravel()

    def levels(self) -> npt.NDArray[np.int8]:
        """The levels of each codeword, padded with zeros, int8 ``[entries, 28]``."""
        level = np.array([0, -1, 1], np.int8)
        return level[np.stack([self.pairs % 3, self.pairs // 3], axis=2)].reshape(ENTRIES, -1)


@lru_cache(maxsize=1)
def qmoe_dictionary() -> QMoEDictionary:
    """Generate the dictionary: most probable first, ties in lexicographic order."""
    nonzero = (1 - 0.885) / 2
    single = (0.885, nonzero, nonzero)
    probability = [single[k // 3] * single[k % 3] for k in range(9)]
    trie = np.zeros((ENTRIES + 1, 9), np.int32)
    pairs = np.zeros((ENTRIES, MAX_PAIRS), np.uint8)
    counts = np.zeros(ENTRIES, np.uint8)
    # A sequence is less probable than its prefix, so its parent leaves the heap first.
    heap: list[tuple[float, tuple[int, ...], int]]
    heap = [(-probability[k], (k,), 0) for k in range(9)]
    heapq.heapify(heap)
    for codeword in range(ENTRIES):
        negative, sequence, parent = heapq.heappop(heap)
        trie[parent, sequence[-1]] = codeword + 1
        pairs[codeword, : len(sequence)] = sequence
        counts[codeword] = len(sequence)
        if len(sequence) < MAX_PAIRS:
            for k in range(9):
                heapq.heappush(heap, (negative * probability[k], (*sequence, k), codeword + 1))
    dictionary = QMoEDictionary(trie, pairs, counts)
    found = hashlib.sha256(dictionary.decoder_table().astype("<u4").tobytes()).hexdigest()
    if found != DECODER_SHA256:
        raise AssertionError("this machine's arithmetic does not give QMoE's dictionary")
    return dictionary


def encode(levels: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32]]:
    """Codewords of int8 ``[rows, columns]``, and the offset of each row's, int32 ``[rows + 1]``."""
    codewords = np.empty(levels.shape[0] * ((levels.shape[1] + 1) // 2), np.uint16)
    offsets = np.zeros(levels.shape[0] + 1, np.int32)
    count = _encode(levels, qmoe_dictionary().trie, codewords, offsets)
    return codewords[:count].copy(), offsets


def decode(
    codewords: npt.NDArray[np.uint16], offsets: npt.NDArray[np.int32], out: npt.NDArray[np.int8]
) -> None:
    """The inverse of ``encode``, into ``out`` int8 ``[rows, columns]``."""
    _decode(codewords, offsets, *_decoding_tables(), out)


@lru_cache(maxsize=1)
def _decoding_tables() -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8]]:
    return qmoe_dictionary().levels(), 2 * qmoe_dictionary().counts


@njit(cache=True)
def _encode(levels: Any, trie: Any, codewords: Any, offsets: Any) -> Any:
    rows, columns = levels.shape
    symbol = np.array([0, 2, 1])  # of levels 0, +1, -1: an index of -1 is the last
    count = 0
    for row in range(rows):
        node = 0
        for column in range(0, columns, 2):
            pair = symbol[levels[row, column]]
            if column + 1 < columns:
                pair += 3 * symbol[levels[row, column + 1]]
            following = trie[node, pair]
            if following == 0:
                codewords[count] = node - 1
                count += 1
                following = trie[0, pair]
            node = following
        if node > 0:
            codewords[count] = node - 1
            count += 1
        offsets[row + 1] = count
    return count


@njit(cache=True)
def _decode(codewords: Any, offsets: Any, levels: Any, lengths: Any, out: Any) -> None:
    rows, columns = out.shape
    for row in range(rows):
        column = 0
        for i in range(offsets[row], offsets[row + 1]):
            entry = levels[codewords[i]]
            length = min(np.int64(lengths[codewords[i]]), columns - column)
            for j in range(length):
                out[row, column + j] = entry[j]
            column += length
