"""What the benchmarks share: interleaved timing, and results with machine and versions."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"  # small trained models and text, unpublished


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser described by the first line of a script's docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])


def machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that identifies the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    versions: dict[str, str | None] = {}
    for package in ("qmoe-format", "numpy", "numba", "zstandard", "torch", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def in_new_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a process of its own, whose peak memory can be measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def medians(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """The ``spread`` of seconds of each piece of work over ``rounds``, after a warm-up round.

    The pieces take turns, so that a slowdown of the machine affects all of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, piece in work.items():
            start = time.perf_counter()
            piece()
            taken[name].append(time.perf_counter() - start)
    return {name: spread(seconds[1:]) for name, seconds in taken.items()}


def load(name: str) -> dict[str, Any]:
    """The contents of ``NAME.json``; empty if it does not exist."""
    path = RESULTS / f"{name}.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return figures


def save(name: str, figures: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``NAME.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"machine": machine(), **figures}, indent=1)
    path.write_text(text + "\n")
    return path
