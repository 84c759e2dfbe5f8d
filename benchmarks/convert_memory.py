"""Peak memory and speed of ``qmoe convert``, ``verify`` and ``unpack`` on synthetic checkpoints.

    python -m benchmarks.convert_memory [--folder FOLDER] [--threads N]

Writes benchmarks/results/convert_memory.json and removes what it made. Three checkpoints, random
normal weights in bfloat16, in the layout of Switch Transformers:

    many experts     6 GiB of experts of 8 MiB, no large tensor
    large experts    matrices of 117 MB, those of Mixtral-8x7B
    large embedding  one tensor of 2 GB that is no expert

The bound of a conversion is 1 GiB plus twice the largest tensor, whatever the size of the
checkpoint. Peak memory is the kernel's ru_maxrss of the process, which counts mapped pages too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import report
from qmoe_format.dtypes import from_float32
from qmoe_format.machine import cores
from qmoe_format.safetensors_writer import OutputTensor, write_sharded

GIB = 1 << 30
SHARD_BYTES = 1_000_000_000
POOL = from_float32(np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02, "BF16")


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint to convert; ``layers`` of them sparse, all in the encoder."""

    name: str
    layers: int
    experts: int
    rows: int
    columns: int
    vocabulary: int


CASES = (
    Case("many experts", layers=6, experts=64, rows=4096, columns=1024, vocabulary=32_128),
    Case("large experts", layers=1, experts=8, rows=14_336, columns=4096, vocabulary=8192),
    Case("large embedding", layers=1, experts=8, rows=1024, columns=1024, vocabulary=1_000_000),
)


def tensors(case: Case) -> Iterator[OutputTensor]:
    generator = np.random.default_rng(1)

    def random(name: str, *shape: int) -> OutputTensor:
        seed = int(generator.integers(1 << 62))
        return OutputTensor(name, "BF16", shape, partial(weights, shape, seed))

    yield random("shared.weight", case.vocabulary, case.columns)
    for layer in range(case.layers):
        head = f"encoder.block.{layer}.layer."
        for part in "qkvo":
            name = f"{head}0.SelfAttention.{part}.weight"
            yield random(name, case.columns, case.columns)
        yield random(f"{head}1.mlp.router.classifier.weight", case.experts, case.columns)
        for expert in range(case.experts):
            name = f"{head}1.mlp.experts.expert_{expert}."
            yield random(f"{name}wi.weight", case.rows, case.columns)
            yield random(f"{name}wo.weight", case.columns, case.rows)


def weights(shape: tuple[int, ...], seed: int) -> Iterable[npt.NDArray[Any]]:
    """A tensor's rows in pieces, each a stretch of one pool of random numbers."""
    generator = np.random.default_rng(seed)
    left = int(np.prod(shape))
    while left:
        piece = min(left, POOL.size // 2)
        start = int(generator.integers(POOL.size - piece))
        yield POOL[start : start + piece]
        left -= piece


def measure(case: Case, folder: Path, threads: int) -> dict[str, Any]:
    checkpoint, target = folder / "checkpoint", folder / "out.qmoe"
    checkpoint.mkdir()
    config = {"model_type": "switch_transformers", "num_experts": case.experts}
    (checkpoint / "config.json").write_text(json.dumps(config))
    parts = list(tensors(case))
    write_sharded(checkpoint, parts, SHARD_BYTES)
    count = sum(int(np.prod(part.shape)) for part in parts)
    largest = max(part.nbytes for part in parts)

    bound = GIB + 2 * largest
    result: dict[str, Any] = {
        "checkpoint": case.name,
        "weights": count,
        "checkpoint_bytes": sum(part.nbytes for part in parts),
        "largest_tensor_bytes": largest,
        "bound_bytes": bound,
        "threads": threads,
    }
    for command in (
        ["convert", str(checkpoint), str(target), "--threads", str(threads)],
        ["verify", str(target)],
        ["unpack", str(target), str(folder / "unpacked")],
    ):
        seconds, processor_seconds, peak = run(command)
        result[command[0]] = {
            "seconds": round(seconds, 1),
            "processor_seconds": round(processor_seconds, 1),
            "weights_per_second": round(count / seconds),
            "peak_resident_bytes": peak,
        }
    result["qmoe_bytes"] = target.stat().st_size
    result["within_bound"] = result["convert"]["peak_resident_bytes"] <= bound
    return result


def run(arguments: list[str]) -> tuple[float, float, int]:
    """Seconds, seconds of all processors, and peak resident bytes of a ``qmoe`` command."""
    command = [sys.executable, "-m", "qmoe_format.cli", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {process.returncode}")
    seconds = time.perf_counter() - started
    # The kernel counts from this process's own size on, which therefore has to be small.
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where to put 14 GB for a few minutes")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    results = []
    for case in CASES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results.append(measure(case, Path(folder), options.threads))
        print(json.dumps(results[-1], indent=2), flush=True)
    report.save("convert_memory", {"results": results})
    if not all(result["within_bound"] for result in results):
        raise SystemExit("more memory than the bound")


if __name__ == "__main__":
    main()
