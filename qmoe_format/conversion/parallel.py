"""Threads and memory: experts in parallel, or one at a time if they are large."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_LINE = 16  # float32 in a cache line
_GPU_FACTOR = 16  # groups and batches on a GPU are larger: every small step is a launch there
_GPU_SHARE = 0.5  # of a GPU's memory, at most, for a batch
_GPU_BYTES = 56  # that the recipe rd takes for each element of an expert


@dataclass(frozen=True, slots=True)
class Resources:
    """What a conversion computes with, and how much it takes on at once.

    Elements of an expert are those of a matrix and its Hessian.

    Attributes:
        threads: for everything on the CPU.
        device: where torch computes.
        group_bytes: weights and Hessians in memory together, as long as every worker has an expert;
            a quantizer needs a few times as much again.
        chunk_elements: of the widest activation at once: 4 MB, which an allocator keeps for reuse.
        chunk_tokens: at least this many at once, or access to the Hessian would dominate.
        large_expert: elements from which an expert gets all workers; smaller ones get one each.
        batch_elements: in a batch; large ones hide the overhead of a quantizer's many small steps.
    """

    threads: int
    device: str = "cpu"
    group_bytes: int = 1 << 28
    chunk_elements: int = 1 << 20
    chunk_tokens: int = 1 << 10
    large_expert: int = 1 << 24
    batch_elements: int = 1 << 24

    @property
    def workers(self) -> int:
        """Threads that call torch; a GPU has one queue."""
        return self.threads if self.device == "cpu" else 1

    @property
    def factor(self) -> int:
        """How many times larger groups and batches are than on a CPU."""
        return 1 if self.device == "cpu" else _GPU_FACTOR

    def threads_per_expert(self, elements: int) -> int:
        """Threads that work on one expert of this many elements."""
        return self.workers if elements >= self.large_expert else 1

    def concurrent_experts(self, elements: int) -> int:
        """How many experts of this many elements are worked on at the same time."""
        return self.workers // self.threads_per_expert(elements)

    def batches(self, experts: int, rows: int, columns: int) -> list[range]:
        """Divide experts, each a matrix and its Hessian, into batches.

        Workers get equally many. A batch has one expert where not all matrices would begin at a
        cache line: MKL then sums in another order on AMD processors (cuBLAS may, too), and an
        expert's result must not depend on its place.
        """
        elements = rows * columns + columns**2
        share = -(-experts // self.workers)
        limit = max(1, self._largest_batch() // max(elements, 1))
        size = max(1, -(-share // max(1, -(-share // limit))))
        if rows * columns % _LINE or columns**2 % _LINE:
            size = 1
        return [range(first, min(first + size, experts)) for first in range(0, experts, size)]

    def _largest_batch(self) -> int:
        """In elements. Of a GPU's whole memory: what is free depends on what torch keeps of it."""
        most = self.batch_elements * self.factor
        if self.device == "cpu":
            return most
        import torch

        if not torch.cuda.is_available():
            return most
        _, total = torch.cuda.mem_get_info(self.device)
        return min(most, int(total * _GPU_SHARE) // _GPU_BYTES)

    def map(
        self, call: Callable[[Item], Result], items: Iterable[Item], elements: int
    ) -> Iterator[Result]:
        """Yield ``call(item)`` for each item in order; few are in memory at a time.

        Torch gets one thread per call, or all for experts of so many ``elements`` that they are
        large: its threads wait for each other at every step, for long on a busy machine.
        """
        workers = self.concurrent_experts(elements)
        threads = self.threads_per_expert(elements)
        with torch_threads(threads), ThreadPoolExecutor(workers) as pool:
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
