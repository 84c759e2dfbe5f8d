"""Peak memory and speed of ``qmoe convert``, ``verify`` and ``unpack`` on synthetic checkpoints.

    python -m benchmarks.convert_memory [--folder FOLDER] [--threads N]

Writes benchmarks/results/convert_memory.json and deletes the checkpoints. Weights are random normal
bfloat16. Without calibration text:

    many experts     7 GiB of experts' matrices of 8 MiB, no large tensor
    large experts    matrices of 117 MB, like those of Mixtral-8x7B
    large embedding  one tensor of 2 GB outside the experts
    FP8              6.4 G weights in FP8 blocks of 128 × 128, experts of 3 × 2048 × 1024

With the demo's calibration text:

    RECIPE, N × 64 experts   N layers, experts of 3 × 1024 × 1024, in bfloat16 or FP8

Without text, memory is bounded by 1 GiB plus twice the largest tensor, whatever the size of the
checkpoint. Peak memory is the process's ru_maxrss, which includes mapped pages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import qmoe_format
from benchmarks import report
from benchmarks.synthetic import MIXTRAL_LIKE, Config, write_checkpoint
from qmoe_format.machine import cores

GIB = 1 << 30
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
DEMO = Path(qmoe_format.__file__).parent / "demo"


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint to convert, and options of calibration, if any."""

    name: str
    config: Config
    calibration: tuple[str, ...] = ()


def switch(layers: int, experts: int, hidden: int, inner: int, vocabulary: int = 8192) -> Config:
    """An encoder of sparse layers, and a decoder of one sparse layer."""
    return {
        "model_type": "switch_transformers",
        "num_experts": experts,
        "d_model": hidden,
        "d_ff": inner,
        "d_kv": 64,
        "num_heads": hidden // 64,
        "num_layers": layers,
        "num_sparse_encoder_layers": layers,
        "num_decoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "vocab_size": vocabulary,
    }


def mixtral(layers: int, inner: int = 1024) -> Config:
    """With 64 experts per layer, of 3 × 1024 × ``inner`` weights."""
    return MIXTRAL_LIKE | {
        "num_hidden_layers": layers,
        "num_local_experts": 64,
        "intermediate_size": inner,
    }


def calibrated(recipe: str, layers: int, config: Config | None = None) -> Case:
    """With 201 M expert weights per layer."""
    text = "--calibration", str(DEMO / "calibration.jsonl"), "--text-column", "target"
    options = "--recipe", recipe, *text
    name = f"{recipe}, {layers} × 64 experts"
    if config:
        return Case(f"{name}, FP8", config, options)
    return Case(name, mixtral(layers), options)


CASES = (
    Case("many experts", switch(6, 64, 1024, 4096)),
    Case("large experts", switch(1, 8, 4096, 14_336)),
    Case("large embedding", switch(1, 8, 1024, 1024, vocabulary=1_000_000)),
    Case("FP8", mixtral(16, inner=2048) | FP8),
    calibrated("qmoe", layers=2),
    calibrated("qmoe", layers=2, config=mixtral(2) | FP8),
    calibrated("qmoe", layers=8),
    calibrated("rd", layers=1),
)


def measure(case: Case, folder: Path, threads: int) -> dict[str, Any]:
    checkpoint, target = folder / "checkpoint", folder / "out.qmoe"
    # A child's ru_maxrss starts from this process's: keep torch out of it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        parts = pool.submit(write_checkpoint, case.config, checkpoint).result()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, checkpoint)
    count = sum(math.prod(part.shape) for part in parts)
    largest = max(part.nbytes for part in parts)
    result: dict[str, Any] = {
        "checkpoint": case.name,
        "weights": count,
        "checkpoint_bytes": sum(part.nbytes for part in parts),
        "largest_tensor_bytes": largest,
        "threads": threads,
    }
    commands: list[list[Any]] = [
        ["convert", checkpoint, target, "--threads", threads, *case.calibration]
    ]
    if not case.calibration:
        commands += [["verify", target], ["unpack", target, folder / "unpacked"]]
    for command in commands:
        seconds, processor_seconds, peak = run(list(map(str, command)))
        result[command[0]] = {
            "seconds": round(seconds, 1),
            "processor_seconds": round(processor_seconds, 1),
            "weights_per_second": round(count / seconds),
            "peak_resident_bytes": peak,
        }
    result["qmoe_bytes"] = target.stat().st_size
    if not case.calibration:
        result["bound_bytes"] = GIB + 2 * largest
        result["within_bound"] = result["convert"]["peak_resident_bytes"] <= result["bound_bytes"]
    return result


def run(arguments: list[str]) -> tuple[float, float, int]:
    """Wall-clock seconds, processor seconds, and peak resident bytes of a ``qmoe`` command."""
    command = [sys.executable, "-m", "qmoe_format.cli", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {process.returncode}")
    seconds = time.perf_counter() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="has room for 14 GB")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their name")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    results = []
    for case in (case for case in CASES if options.only in case.name):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results.append(measure(case, Path(folder), options.threads))
        print(json.dumps(results[-1], indent=2), flush=True)
    if not options.only:
        report.save("convert_memory", {"results": results})
    if not all(result.get("within_bound", True) for result in results):
        raise SystemExit("memory exceeds the bound")


if __name__ == "__main__":
    main()
