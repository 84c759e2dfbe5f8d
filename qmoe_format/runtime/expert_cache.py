"""Experts of a file in a limited amount of memory, read from the disk when they are needed.

What the page cache would do for a mapped file, but with what it does not know: an expert is read
whole, all that a layer needs at once, and the one to give up is the one used least of late.

Nothing is read for the next layer while this one computes. Its router, asked about this layer's
tokens, was tried: it names most experts in time, but those that it is wrong about cost more reads
and room than that saves time.
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from qmoe_format.codec import Matrix
    from qmoe_format.container import QMoEFile

# Reads in flight. With extents of 256 KiB, one at a time reached half the throughput of a virtual
# disk, and twice as many were as fast.
_READERS = 8
# The policy is LRFU (Lee et al. 2001): an expert's uses count half as much after its layer has run
# this often. On the routing of two small trained models, with room for 10 to 50 % of the experts, 4
# reads from 14 % less to 8 % more than evicting the least recently used expert, 3 % less in the
# median; 16 and counts that do not fade read more (benchmarks/expert_cache.py compares with LRU).
_HALF_LIFE = 4

Key: TypeAlias = tuple[int, int]
"""A layer's number in the cache, and the expert's."""


@dataclass(slots=True)
class CacheCounters:
    """What a cache has done so far.

    Attributes:
        hits: uses of an expert that was there, or being read.
        misses: uses of one that had to be read.
        bytes_read: from the disk.
        evictions: experts given up for others.
        seconds_waited: for reads, while nothing was computed.
        prefetched: experts read before they were needed.
        wasted_prefetches: those of them that were given up unused.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    evictions: int = 0
    seconds_waited: float = 0.0
    prefetched: int = 0
    wasted_prefetches: int = 0


@dataclass(slots=True)
class Entry:
    """One expert of a layer.

    Attributes:
        bytes: charged to the budget.
        matrices: of the layer's stacks; none while they are being read.
    """

    bytes: int
    matrices: list[Matrix] = field(default_factory=list)


class ExpertCache:
    """The experts of all layers of an open file; threads may use it at the same time.

    A process made by a fork may use it, too, and begins with what was there.

    Args:
        file: stays open while the cache is used.
        budget: bytes of the file that are kept; in memory, each matrix takes up to two pages more.
            What one call of ``using`` asks for may exceed it, until that use is over.

    Attributes:
        bytes: of all entries.
        counters: what it has done so far.
    """

    def __init__(self, file: QMoEFile, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.counters = CacheCounters()
        self._file = file
        self._layers: list[tuple[str, ...]] = []
        self._entries: dict[Key, Entry] = {}
        self._reads: dict[Key, list[Future[Matrix]]] = {}  # of entries without matrices
        self._prefetched: set[Key] = set()  # and not used since
        self._users: Counter[Key] = Counter()  # of entries that must not go
        self._calls = 0
        # Base 2 logarithms of each expert's uses, where a use now counts as 2 to the power of the
        # half-lives until now: so old uses fade without being touched, and keep their order.
        self._ratings: defaultdict[Key, float] = defaultdict(lambda: -math.inf)
        self._order: list[tuple[float, Key]] = []  # a heap of entries by a rating they have had
        self._begin()

    def layer(self, stacks: Sequence[str]) -> CachedLayer:
        """A further layer, whose experts have one matrix in each of these stacks of the file."""
        self._layers.append(tuple(stacks))
        experts = self._file.tensors[stacks[0]].extent_count
        return CachedLayer(self, len(self._layers) - 1, stacks, experts)

    @contextmanager
    def using(self, keys: Sequence[Key]) -> Iterator[None]:
        """While in this context, these experts are there; missing ones are read first, together.

        Raises:
            QMoEError: ``not-found`` for an unknown expert; the codes of reading. The cache stays
                usable.
        """
        self._check_process()
        try:
            with self._lock:
                self._calls += 1
                self._users.update(keys)
                for key in keys:
                    self._rate(key)
                    if _failed(self._reads.get(key, ())):
                        self._forget(key)
                missing = [key for key in keys if key not in self._entries]
                for key in missing:
                    self._start(key)
                self._prefetched.difference_update(keys)
                self.counters.hits += len(keys) - len(missing)
                self.counters.misses += len(missing)
            self._wait(keys)
            yield
        finally:
            with self._lock:
                self._users.subtract(keys)
                for key in keys:
                    if self._users[key] <= 0:
                        del self._users[key]
                self._make_room(0)

    def matrix(self, key: Key, place: int) -> Matrix:
        """An expert's matrix in one of its layer's stacks; it is read if it is not there.

        Raises:
            QMoEError: as ``using``.
        """
        entry = self._entries.get(key)
        if entry is None or not entry.matrices:
            with self.using([key]):
                return self._entries[key].matrices[place]
        return entry.matrices[place]

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Begin to read those of these experts for which there is room beside those in use."""
        self._check_process()
        with self._lock:
            in_use = (self._entries.get(key) for key in self._users)
            taken = sum(each.bytes for each in in_use if each)
            for key in keys:
                if key in self._users:
                    continue
                taken += self.size(key)
                if taken <= self.budget and key not in self._entries:
                    self._start(key)
                    self._prefetched.add(key)
                    self.counters.prefetched += 1

    def size(self, key: Key) -> int:
        """Bytes of an expert in the file."""
        layer, expert = key
        return sum(self._file.stored_bytes(name, expert) for name in self._layers[layer])

    def _check_process(self) -> None:
        if self._process != os.getpid():
            self._begin()

    def _begin(self) -> None:
        """Make what a process cannot take over from the one that it was forked from."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_READERS, "qmoe-expert-reader")
        self._users.clear()
        for key in list(self._reads):
            self._forget(key)

    def _rate(self, key: Key) -> None:
        now = self._calls / (_HALF_LIFE * len(self._layers))
        before = self._ratings[key]
        self._ratings[key] = now + math.log2(1 + 2.0 ** (before - now))

    def _start(self, key: Key) -> None:
        """Begin to read a missing expert."""
        size = self.size(key)
        self._make_room(size)
        self.bytes += size
        self._entries[key] = Entry(size)
        heapq.heappush(self._order, (self._ratings[key], key))
        layer, expert = key
        stacks = self._layers[layer]
        self._reads[key] = [self._pool.submit(self._read, name, expert) for name in stacks]

    def _read(self, name: str, expert: int) -> Matrix:
        matrix: Matrix
        matrix, count = self._file.read_encoded(name, expert)
        with self._lock:
            self.counters.bytes_read += count
        return matrix

    def _wait(self, keys: Sequence[Key]) -> None:
        """Wait until experts have been read that nobody will evict meanwhile."""
        begun = time.perf_counter()
        for key in keys:
            while reads := self._reads_of(key):
                wait(reads)
                with self._lock:
                    if self._reads.get(key) is not reads:  # another thread was here before
                        continue
                    if _failed(reads):
                        self._forget(key)
                    else:
                        self._entries[key].matrices = [each.result() for each in reads]
                        del self._reads[key]
                for each in reads:
                    each.result()
        with self._lock:
            self.counters.seconds_waited += time.perf_counter() - begun

    def _reads_of(self, key: Key) -> list[Future[Matrix]] | None:
        """The reads to wait for, begun again if they have failed for another thread."""
        with self._lock:
            if key not in self._entries:
                self._start(key)
            return self._reads.get(key)

    def _make_room(self, size: int) -> None:
        """Evict until ``size`` bytes more fit or all others are in use."""
        self._evict(size, self._users.keys() | self._prefetched)
        self._evict(size, self._users)

    def _evict(self, size: int, spared: Container[Key]) -> None:
        """Evict the experts used least of late, as far as necessary."""
        passed_over = []
        while self.bytes + size > self.budget and self._order:
            rating, key = heapq.heappop(self._order)
            if key not in self._entries:
                continue
            if rating != self._ratings[key]:
                heapq.heappush(self._order, (self._ratings[key], key))
            elif key in spared:
                passed_over.append((rating, key))
            else:
                self._forget(key)
                self.counters.evictions += 1
        for each in passed_over:
            heapq.heappush(self._order, each)

    def _forget(self, key: Key) -> None:
        self.bytes -= self._entries.pop(key).bytes
        for each in self._reads.pop(key, ()):
            each.cancel()
        if key in self._prefetched:
            self._prefetched.remove(key)
            self.counters.wasted_prefetches += 1


def _failed(reads: Iterable[Future[Matrix]]) -> bool:
    return any(each.done() and each.exception() for each in reads)


class CachedLayer:
    """The experts of one layer in a cache.

    Args:
        stacks: their names.

    Attributes:
        most: how many of the experts fit into half the budget, whichever they are; at least 1. So
            that many can be used while as many are prefetched.
    """

    def __init__(
        self, cache: ExpertCache, number: int, stacks: Sequence[str], experts: int
    ) -> None:
        self.cache = cache
        self._number = number
        self._places = {name: place for place, name in enumerate(stacks)}
        largest = max((cache.size((number, expert)) for expert in range(experts)), default=0)
        self.most = max(1, cache.budget // 2 // max(largest, 1))

    def using(self, experts: Sequence[int]) -> AbstractContextManager[None]:
        """See ``ExpertCache.using``."""
        return self.cache.using([(self._number, expert) for expert in experts])

    def prefetch(self, experts: Sequence[int]) -> None:
        """See ``ExpertCache.prefetch``."""
        self.cache.prefetch([(self._number, expert) for expert in experts])

    def matrix(self, name: str, expert: int) -> Matrix:
        """See ``ExpertCache.matrix``."""
        return self.cache.matrix((self._number, expert), self._places[name])
