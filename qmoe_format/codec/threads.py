"""A pool of threads that share segments; kernels release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qmoe")


# A forked child has none of its parent's threads, so it makes a pool of its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_parts(count: int, threads: int, work: Callable[[int, int], T]) -> list[T]:
    """Call ``work(first, last)`` for equal parts of ``range(count)``; results in their order."""
    parts = max(1, min(threads, count))
    if parts == 1:
        return [work(0, count)]
    cuts = [count * part // parts for part in range(parts + 1)]
    others = [_pool(threads - 1).submit(work, *cuts[i : i + 2]) for i in range(1, parts)]
    mine = work(*cuts[:2])
    return [mine, *(other.result() for other in others)]
