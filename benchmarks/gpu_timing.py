"""Times on a CUDA device, through torch: rotated copies, graphs, plain launches, bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

DEVICE = "cuda"
GRAPH_CALLS = 24  # at least so many in a graph, so that its own launch does not count
PLAIN_CALLS = 256  # at most so many one by one: there the host sets the pace
_BANDWIDTH_BYTES = 1 << 31


@dataclass(frozen=True)
class Work:
    """One way to do one call; ``run(i)`` does it on copy ``i`` of ``copies``.

    The other fields are those of ``benchmarks.gpu_figures``. All copies together are several times
    the L2 cache, so that each call reads its matrix from memory.
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
        """All but the function, with ``times``."""
        names = (field.name for field in fields(self) if field.name != "run")
        return {**{name: getattr(self, name) for name in names}, **times}


def copies(bytes_of_one: int) -> int:
    """How many copies come to more than four times the L2 cache."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return 4 * cache // max(bytes_of_one, 1) + 1


def times(works: Sequence[Work], rounds: int, stream: torch.cuda.Stream) -> list[dict[str, Any]]:
    """A record of each work, its seconds a call in a graph and by plain launches.

    The works take turns, so that a device that slows down slows all of them down.
    """

    def plain(work: Work, count: int) -> Callable[[], None]:
        def launch() -> None:
            for i in range(count):
                work.run(i % work.copies)

        return launch

    torch.cuda.synchronize()  # what the works use was made on another stream
    with torch.cuda.stream(stream):
        for work in works:  # compile, allocate, choose algorithms
            work.run(0)
        stream.synchronize()
        in_graph = [max(work.copies, GRAPH_CALLS) for work in works]
        graphs = [captured(plain(work, count)) for work, count in zip(works, in_graph, strict=True)]
        one_by_one = [min(count, PLAIN_CALLS) for count in in_graph]
        launches = [plain(work, count) for work, count in zip(works, one_by_one, strict=True)]
        replays = take_turns([graph.replay for graph in graphs], in_graph, rounds)
        plains = take_turns(launches, one_by_one, max(rounds // 3, 3))
    return [
        work.record(graph=graph, plain=plain)
        for work, graph, plain in zip(works, replays, plains, strict=True)
    ]


def captured(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The launches of ``launch`` on the current stream, as a graph."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        launch()
    finally:
        graph.capture_end()
    return graph


def take_turns(
    pieces: Sequence[Callable[[], object]], calls: Sequence[int], rounds: int
) -> list[dict[str, float]]:
    """Seconds a call of each piece, which makes so many ``calls``: median, least and most.

    One round before the first is not counted.
    """
    events = []
    for _ in range(rounds + 1):
        for piece in pieces:
            start, end = (_event() for _ in range(2))
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


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def bandwidth(rounds: int) -> dict[str, float]:
    """Bytes/s that the memory moves for torch; ``read`` is the better of a sum and a copy."""
    source = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    pieces: list[Callable[[], object]] = [
        lambda: target.copy_(source),
        source.sum,
        lambda: target.fill_(1.0),
    ]
    copy, total, fill = (
        _BANDWIDTH_BYTES / taken["median"] for taken in take_turns(pieces, [1, 1, 1], rounds)
    )
    return {"copy": 2 * copy, "sum": total, "read": max(2 * copy, total), "write": fill}


def device() -> dict[str, Any]:
    """What the times depend on besides the program."""
    import cupy

    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch_cuda": torch.version.cuda,
        "cupy": cupy.__version__,
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
    }
