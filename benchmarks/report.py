"""What all benchmarks share: interleaved timing, and results with machine and versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that names the machine."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (line.split(": ")[1] for line in lines if line.startswith("model name")), model
        )
    versions: dict[str, str | None] = {}
    for package in ("qmoe-format", "numpy", "numba", "zstandard", "torch", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def medians(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each piece of work: median, least and most over ``rounds``.

    The pieces take turns, so that a machine that slows down slows all of them down; one round
    before the first is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, piece in work.items():
            start = time.perf_counter()
            piece()
            taken[name].append(time.perf_counter() - start)
    return {
        name: {
            "median": statistics.median(seconds[1:]),
            "least": min(seconds[1:]),
            "most": max(seconds[1:]),
        }
        for name, seconds in taken.items()
    }


def save(name: str, figures: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``NAME.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"machine": machine(), **figures}, indent=1)
    path.write_text(text + "\n")
    return path
