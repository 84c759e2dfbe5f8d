"""Experts side by side, or one at a time if they are large."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Experts at least this large, matrix and Hessian, are handled one at a time, by all threads;
# smaller ones side by side.
LARGE_EXPERT = 1 << 24
BATCH_ELEMENTS = 1 << 24
ON_GPU = 16  # times as much at once there, where each of many small steps costs a launch
LINE = 16  # float32 in a cache line


def times_on(device: str) -> int:
    """How many times as much as on a CPU is worked on at once."""
    return 1 if device == "cpu" else ON_GPU


def threads_within(elements: int, threads: int) -> int:
    """How many threads one expert of this many elements gets."""
    return threads if elements >= LARGE_EXPERT else 1


def batches(
    items: range, rows: int, columns: int, threads: int, device: str = "cpu"
) -> list[range]:
    """Divide experts, each a matrix and its Hessian, among threads.

    In batches, because a quantizer takes many small steps, and large enough ones cost no overhead;
    as many for each thread, or some would wait for the last. One at a time where matrices in a
    batch would not all begin with a cache line: there MKL adds up in another order on AMD's
    processors, cuBLAS may too, and what becomes of an expert must not depend on its place.
    """
    if rows * columns % LINE or columns**2 % LINE:
        return [items[place : place + 1] for place in range(len(items))]
    elements = rows * columns + columns**2
    shared = -(-len(items) // threads)
    most = max(1, BATCH_ELEMENTS * times_on(device) // max(elements, 1))
    rounds = max(1, -(-shared // most))
    size = max(1, -(-shared // rounds))
    return [items[first : first + size] for first in range(0, len(items), size)]


def side_by_side(
    call: Callable[[Item], Result], items: Iterable[Item], elements: int, threads: int
) -> Iterator[Result]:
    """``call(item)`` for each, in order; few items and results are in memory at a time.

    Args:
        call: what to do, in another thread.
        items: experts, or some of them.
        elements: of the largest matrix, and its Hessian, that an item is about.
        threads: how many to use in all; torch gets ``threads_within`` for each item. Threads of
            torch's own wait for each other at every step, for long on a busy machine.
    """
    within = threads_within(elements, threads)
    workers = max(1, threads // within)
    with torch_threads(within), ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                del item
                if len(waiting) > (workers if workers > 1 else 0):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Limit torch to this many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
