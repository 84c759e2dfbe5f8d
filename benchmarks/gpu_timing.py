"""The GPU under test: timings by CUDA events, in a graph and as plain launches; its bandwidth."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from qmoe_format import gpu
from qmoe_format.errors import QMoEError
from qmoe_format.gpu.arrays import Library
from qmoe_format.gpu.launch import Launch, execute

GRAPH_CALLS = 24  # in a graph at least, so that its own launch does not count
PLAIN_CALLS = 256  # one by one at most: there the host sets the pace
BANDWIDTH_BYTES = 1 << 31


@dataclass(frozen=True)
class Work:
    """One way to do one call; ``run(i)`` does it on copy ``i`` of ``copies``.

    The other fields are described in ``benchmarks.gpu_figures``.
    """

    call: str
    family: str
    way: str
    zeros: float | None
    bytes: int
    weights: int
    copies: int
    run: Callable[[int], object]

    def record(self, **times: Any) -> dict[str, Any]:
        """All fields but the function, and ``times``."""
        names = (field.name for field in fields(self) if field.name != "run")
        return {**{name: getattr(self, name) for name in names}, **times}

    def calls(self, count: int) -> Callable[[], None]:
        """``count`` calls, each on the next copy."""

        def launch() -> None:
            for i in range(count):
                self.run(i % self.copies)

        return launch


class Cuda:
    """A GPU, used through torch and ``qmoe_format.gpu``. Tests have a CPU in its place."""

    name = "cuda"
    gpu: Any = gpu

    def __init__(self) -> None:
        self.gpu.require()
        if not torch.cuda.is_available():
            raise QMoEError(
                "dependency",
                f"torch {torch.__version__} finds no CUDA device",
                "install a torch that is built for CUDA",
            )

    def bf16(self, *shape: int) -> torch.Tensor:
        """Normal random numbers."""
        return torch.randn(shape, device=self.name).bfloat16()

    def empty(self, *shape: int) -> torch.Tensor:
        """bf16, to be written."""
        return torch.empty(shape, dtype=torch.bfloat16, device=self.name)

    def copies(self, size: int) -> int:
        """How many copies of ``size`` bytes exceed four times the L2 cache."""
        cache = torch.cuda.get_device_properties(self.name).L2_cache_size
        return 4 * cache // max(size, 1) + 1

    def run_bytes(self, stack: gpu.DeviceStack) -> int:
        """What products read of a stack if it has runs, otherwise 0."""
        return stack.packed.runs.bytes if stack.packed.runs else 0

    def execute(self, launch: Launch) -> None:
        """Launch a kernel on torch's current stream."""
        library = Library(torch.cuda.current_device(), torch)
        execute([launch], library.device, library.stream())

    def times(self, works: Sequence[Work], rounds: int) -> list[dict[str, Any]]:
        """Seconds per call of each work, in a graph and by plain launches, with its record.

        The works take turns, so that a slowdown of the device affects all of them alike. One that
        cannot be captured is left out, with a note.
        """
        torch.cuda.synchronize()  # what the works use was made on another stream
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for work in works:  # compile, allocate, choose algorithms
                work.run(0)
            stream.synchronize()
            found = [(work, max(work.copies, GRAPH_CALLS)) for work in works]
            recorded = [(work, count, captured(work, count)) for work, count in found]
            works = [work for work, _, graph in recorded if graph]
            in_graph = [count for _, count, graph in recorded if graph]
            graphs = [graph for _, _, graph in recorded if graph]
            one_by_one = [min(count, PLAIN_CALLS) for count in in_graph]
            plain = [work.calls(count) for work, count in zip(works, one_by_one, strict=True)]
            replays = take_turns([graph.replay for graph in graphs], in_graph, rounds)
            plains = take_turns(plain, one_by_one, max(rounds // 3, 3))
        return [
            work.record(graph=graph, plain=plain)
            for work, graph, plain in zip(works, replays, plains, strict=True)
        ]

    def bandwidth(self, rounds: int) -> dict[str, float]:
        """Bytes/s of torch's memory accesses; ``read`` is the better of a sum and a copy."""
        source = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32, device=self.name)
        target = torch.empty_like(source)
        pieces: list[Callable[[], object]] = [
            lambda: target.copy_(source),
            source.sum,
            lambda: target.fill_(1.0),
        ]
        copy, total, fill = (
            BANDWIDTH_BYTES / taken["median"] for taken in take_turns(pieces, [1, 1, 1], rounds)
        )
        return {"copy": 2 * copy, "sum": total, "read": max(2 * copy, total), "write": fill}

    def description(self) -> dict[str, Any]:
        """What the timings depend on besides the program."""
        import cupy

        properties = torch.cuda.get_device_properties(self.name)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "torch_cuda": torch.version.cuda,
            "cupy": cupy.__version__,
            "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        }

    def release(self) -> None:
        """Free unused memory."""
        import cupy

        gc.collect()
        torch.cuda.empty_cache()
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def captured(work: Work, count: int) -> torch.cuda.CUDAGraph | None:
    """A graph of ``count`` calls; None if the stream cannot record them."""
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin()
        try:
            work.calls(count)()
        finally:
            graph.capture_end()
    except RuntimeError as error:
        print(f"left out: {work.call}, {work.way}: {error}", file=sys.stderr)
        return None
    return graph


def take_turns(
    pieces: Sequence[Callable[[], object]], calls: Sequence[int], rounds: int
) -> list[dict[str, float]]:
    """Median, least and most seconds per call, after one round of warm-up.

    Args:
        pieces: what to time.
        calls: how many calls each of them makes.
        rounds: how often.
    """

    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    events = []
    for _ in range(rounds + 1):
        for piece in pieces:
            start, end = event(), event()
            start.record()
            piece()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize()
    found = []
    for place, count in enumerate(calls):
        pairs = events[len(pieces) + place :: len(pieces)]
        seconds = [start.elapsed_time(end) / 1e3 / count for start, end in pairs]
        found.append(
            {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
        )
    return found
