"""QMoE's own code (arXiv 2310.16795, section 4), for comparison: no ``.qmoe`` file uses it.

Codewords of 16 bits stand for the 65,536 sequences of 1 to 14 pairs of levels that are most
probable at 88.5 % zeros; a row is parsed greedily, longest match first. The set contains every
prefix of its members. This costs it 17 %, for codewords that always lose to a longer match.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from qmoe_format.checkpoints.published_qmoe.dictionary import ENTRIES, entries, sequences


@lru_cache(maxsize=1)
def _trie() -> npt.NDArray[np.int32]:
    """Codeword + 1 after one more pair, or 0, int32 ``[entries + 1, 9]``; node 0 is the root."""
    trie = np.zeros((ENTRIES + 1, 9), np.int32)
    for codeword, (pairs, count) in enumerate(zip(*sequences(), strict=True)):
        node = 0
        for pair in pairs[: count - 1]:  # prefixes have smaller codewords
            node = trie[node, pair]
        trie[node, pairs[count - 1]] = codeword + 1
    return trie


def encode(levels: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32]]:
    """Codewords of int8 ``[rows, columns]``, and the offset of each row's, int32 ``[rows + 1]``."""
    codewords = np.empty(levels.shape[0] * ((levels.shape[1] + 1) // 2), np.uint16)
    offsets = np.zeros(levels.shape[0] + 1, np.int32)
    count = _encode(levels, _trie(), codewords, offsets)
    return codewords[:count].copy(), offsets


def decode(
    codewords: npt.NDArray[np.uint16], offsets: npt.NDArray[np.int32], out: npt.NDArray[np.int8]
) -> None:
    """The inverse of ``encode``, into ``out`` int8 ``[rows, columns]``."""
    levels, pairs = entries()
    _decode(codewords, offsets, levels, 2 * pairs, out)


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
