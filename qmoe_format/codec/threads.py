"""Threads that share work; kernels release the interpreter lock."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qmoe")


_forked = False


def _after_fork() -> None:
    """A forked child has none of its parent's threads, so it makes a pool of its own."""
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@lru_cache(maxsize=1)
def _parallel() -> Any:
    """GNU OpenMP's entry point, in the library that torch has loaded; None if it uses another."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def _torchs_threads() -> Any:
    """``_parallel`` beside torch, whose threads are awake between its operations.

    They start within microseconds, and others would fight with them for cores.
    """
    return _parallel() if "torch" in sys.modules and not _forked else None


def in_parts(count: int, threads: int, work: Callable[[int, int], T]) -> list[T]:
    """Call ``work(first, last)`` for equal parts of ``range(count)``; results in their order."""
    parts = max(1, min(threads, count))
    if parts == 1:
        return [work(0, count)]
    cuts = [count * part // parts for part in range(parts + 1)]
    if parallel := _torchs_threads():
        return _in_parallel(parallel, work, [*pairwise(cuts)])
    first, *rest = pairwise(cuts)
    others = [_pool(threads - 1).submit(work, *part) for part in rest]
    mine = work(*first)
    return [mine, *(other.result() for other in others)]


def _in_parallel(
    parallel: Any, work: Callable[[int, int], T], parts: Sequence[tuple[int, int]]
) -> list[T]:
    left, results = iter(range(len(parts))), dict[int, T]()
    errors: list[BaseException] = []

    def take(_: Any) -> None:
        try:
            for i in left:  # each thread takes the next one, under Python's lock
                results[i] = work(*parts[i])
        except BaseException as error:  # nothing may be raised into C
            errors.append(error)

    parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(take), None, len(parts), 0)
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(parts))]


def share(work: Any, job: npt.NDArray[np.int64], threads: int) -> None:
    """Let some threads work on the same job: each takes parts of it while there are any.

    Args:
        work: a ``kernels.jit.callback``.
        job: its argument is the address of this.
    """
    address = job.ctypes.data
    if threads == 1:
        work(address)
    elif parallel := _torchs_threads():
        parallel(work, address, threads, 0)
    else:
        in_parts(threads, threads, lambda *_: work(address))
