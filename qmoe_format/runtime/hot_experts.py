"""Experts in use, in the layout that is multiplied the fastest, while there is memory for it.

That layout has 2 or 4 bits a weight, so it may take several times what the file does. A matrix is
packed when it has been used for as many tokens as pay for that, and kept as long as no other that
was used more needs the room.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qmoe_format.codec import Matrix, PackedMatrix, pack

_WORTH = 8  # tokens: packing a matrix takes as long as so many products with it as it is stored
_HALF_LIFE = 1 << 14  # products after which uses count half
_BITS = 2.5  # of a weight, as long as nothing is known

Key: TypeAlias = tuple[str, int]
"""A stack's name and an expert."""


@dataclass(slots=True)
class HotCounters:
    """What has been done so far.

    Attributes:
        hot: products with matrices that were there.
        cold: with matrices as they are stored.
        packed: matrices that were packed.
        evicted: given up for others.
    """

    hot: int = 0
    cold: int = 0
    packed: int = 0
    evicted: int = 0


class HotExperts:
    """The packed matrices of a model's experts; threads may use it at the same time.

    Attributes:
        budget: bytes that they may take.
        bytes: that they take.
        counters: what has been done.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.counters = HotCounters()
        self._kept: dict[Key, PackedMatrix] = {}
        self._uses: dict[Key, float] = {}
        self._until_halved = _HALF_LIFE
        self._lock = threading.Lock()

    def find(self, key: Key, matrix: Matrix, tokens: int, threads: int) -> PackedMatrix | None:
        """The packed matrix for a product with some tokens; None if that is faster as stored.

        Args:
            key: of ``matrix``, which is ``packable``.

        Raises:
            QMoEError: as ``pack``.
        """
        with self._lock:
            uses = self._count(key, tokens)
            found = self._kept.get(key)
            if found:
                self.counters.hot += 1
                return found
            size = int(_BITS / 8 * matrix.rows * matrix.columns)
            room = uses >= _WORTH and self._make_room(size, uses)
            if not room and tokens < _WORTH:
                self.counters.cold += 1
                return None
            self.counters.packed += 1
        found = pack(matrix, threads)
        with self._lock:
            if room and key not in self._kept and self._make_room(found.nbytes, uses):
                self._kept[key] = found
                self.bytes += found.nbytes
        return found

    def kept(self, keys: Sequence[Key]) -> list[PackedMatrix] | None:
        """Packed matrices for products with one token each; None if not all of them are there."""
        with self._lock:
            found = [self._kept[key] for key in keys if key in self._kept]
            if len(found) < len(keys):
                return None
            for key in keys:
                self._count(key, 1)
            self.counters.hot += len(keys)
        return found

    def _count(self, key: Key, tokens: int) -> float:
        self._until_halved -= 1
        if not self._until_halved:
            self._uses = {each: uses / 2 for each, uses in self._uses.items()}
            self._until_halved = _HALF_LIFE
        uses = self._uses.get(key, 0.0) + tokens
        self._uses[key] = uses
        return uses

    def _make_room(self, size: int, uses: float) -> bool:
        """Give up matrices that were used less than half as much, the ones kept longest first.

        One that was used more is not looked at again until all others have been.
        """
        while self._kept and self.bytes + size > self.budget:
            oldest = next(iter(self._kept))
            packed = self._kept.pop(oldest)
            if self._uses[oldest] > uses / 2:
                self._kept[oldest] = packed
                return False
            self.bytes -= packed.nbytes
            self.counters.evicted += 1
        return self.bytes + size <= self.budget
