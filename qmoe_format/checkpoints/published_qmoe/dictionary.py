"""QMoE's dictionary, which its checkpoints do not contain: 65,536 sequences of 1 to 14 pairs.

They are those that are most probable at 88.5 % zeros, most probable first, ties in lexicographic
order. Rounding breaks most ties, so it is part of the format: probabilities are binary64,
multiplied from left to right. (Exact arithmetic agrees in 486 of 65,536 places.)
"""

from __future__ import annotations

import hashlib
import heapq
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qmoe_format.errors import QMoEError

ENTRIES = 1 << 16
MAX_PAIRS = 14
SHA256 = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"
"""Of the table in QMoE's own kernel."""

_ZERO = 0.885


@lru_cache(maxsize=1)
def entries() -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8]]:
    """What the codewords stand for.

    Returns:
        Levels int8 [65536, 28], -1 for a row's lower value and 1 for its upper one, padded with 0;
        and how many pairs of them each codeword has, uint8 [65536].

    Raises:
        QMoEError: ``checkpoint`` if this machine rounds in another way.
    """
    pairs, counts = sequences()
    level = np.array([0, -1, 1], np.int8)
    return level[np.stack([pairs % 3, pairs // 3], axis=2)].reshape(ENTRIES, -1), counts


@lru_cache(maxsize=1)
def sequences() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Pairs of each codeword, uint8 [65536, 14], and how many there are, uint8 [65536].

    Pair k is the symbols k mod 3 and k div 3: 0, 1 and 2 for zero, lower and upper value.

    Raises:
        QMoEError: ``checkpoint`` if this machine rounds in another way.
    """
    pairs, counts = _most_probable()
    found = hashlib.sha256(kernel_table(pairs, counts).tobytes()).hexdigest()
    if found != SHA256:
        raise QMoEError(
            "checkpoint",
            "this machine's arithmetic does not give QMoE's dictionary, which published "
            f"checkpoints need (its SHA-256 is {found})",
            "convert on a machine whose floating-point numbers are IEEE 754 binary64",
        )
    return pairs, counts


def _most_probable() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """As ``sequences``, in whatever way this machine rounds."""
    other = (1 - _ZERO) / 2
    single = (_ZERO, other, other)
    probability = [1.0 * first * second for first in single for second in single]
    pairs = np.zeros((ENTRIES, MAX_PAIRS), np.uint8)
    counts = np.zeros(ENTRIES, np.uint8)
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    number = -1  # the empty sequence comes first, and is none of them
    while number < ENTRIES:
        # A sequence is less probable than its prefixes, so these leave the heap before it.
        negative, sequence = heapq.heappop(heap)
        if sequence:
            pairs[number, : len(sequence)] = sequence
            counts[number] = len(sequence)
        number += 1
        if len(sequence) < MAX_PAIRS:
            for k, each in enumerate(probability):
                heapq.heappush(heap, (negative * each, (*sequence, k)))
    return pairs, counts


def kernel_table(
    pairs: npt.NDArray[np.uint8], counts: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint32]:
    """As in QMoE's kernel: [65536, 2], seven pairs of four bits above the count; little-endian."""
    nibbles = (pairs % 3 | pairs // 3 << 2).astype(np.uint64)
    shifts = np.arange(4, 32, 4, dtype=np.uint64)
    halves = [(nibbles[:, first : first + 7] << shifts).sum(axis=1) for first in (0, 7)]
    return (np.stack(halves, axis=1) | counts[:, None]).astype("<u4")
