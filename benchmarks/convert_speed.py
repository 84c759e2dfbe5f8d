"""Whole conversions and single experts, beside an older checkout of this repository.

    git worktree add OLDER v0.1.0
    python -m benchmarks.convert_speed OLDER [--threads N] [--only NAME...]

Writes benchmarks/results/convert_speed.json: seconds of `python -m qmoe_format convert` for
switch-mini and mixtral-mini from beside the repository at 0.8 bits, with all of the calibration
text, and of the recipe ``rd`` on experts of full size (``quantize_scale``), one after the other
with the code of both checkouts. CPU seconds tell more than seconds where a machine is shared.
Kernels are compiled before; reading the text and writing the file are included.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import quantize_scale, report
from benchmarks.evaluation import CALIBRATION_TEXT
from benchmarks.report import DATA
from qmoe_format.machine import cores

BITS = "0.8"
MODELS = ("mixtral-mini", "switch-mini")
HERE = Path(__file__).parents[1]
# A case of quantize_scale with the package that the path leads to.
EXPERT = """
import json, sys, time
from benchmarks import quantize_scale as scale
import torch
case, threads = scale.CASES[int(sys.argv[1])], int(sys.argv[2])
torch.set_num_threads(threads)
small = scale.Settings(None, 0, 64, "cpu", threads)
scale.quantize_group(case.shrunk(64), "rd", range(1), small, scale.Done())
done, began, used = scale.Done(), time.perf_counter(), time.process_time()
scale.quantize_group(case, "rd", range(1), scale.Settings(1, 0, 8192, "cpu", threads), done)
seconds, cpu = time.perf_counter() - began, time.process_time() - used
bits = 8 * done.stored_bytes / case.weights
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "bits_per_weight": bits}))
"""


def run(checkout: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run Python with a checkout's packages: seconds and memory, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu}, done.stdout


def conversion(checkout: Path, name: str, threads: int, samples: int | None = None) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        few = [] if samples is None else ["--samples", str(samples)]
        measured, _ = run(
            checkout, "-m", "qmoe_format", "convert", str(DATA / name), f"{folder}/out.qmoe",
            "--calibration", str(CALIBRATION_TEXT), "--bits-per-weight", BITS,
            "--threads", str(threads), *few,
        )  # fmt: skip
        quality = json.loads(Path(folder, "out.quality.json").read_text())
        measured["bits_per_weight"] = quality["totals"]["total_bits_per_weight"]
        return measured


def expert(checkout: Path, number: int, threads: int) -> Any:
    _, printed = run(checkout, "-c", EXPERT, str(number), str(threads))
    return json.loads(printed)


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("older", type=Path)
    cases = [case.name for case in quantize_scale.CASES]
    names = [*cases, *MODELS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    checkouts = {"older": options.older.resolve(), "this": HERE}
    found = report.load("convert_speed").get("results", {})
    for name in options.only:
        result = {}
        for label, checkout in checkouts.items():
            if name in cases:
                result[label] = expert(checkout, cases.index(name), options.threads)
            else:
                conversion(checkout, name, options.threads, samples=8)  # compiles kernels
                result[label] = conversion(checkout, name, options.threads)
        for unit in ("seconds", "cpu_seconds"):
            result[f"{unit}, older / this"] = result["older"][unit] / result["this"][unit]
        if name in cases:
            weights = quantize_scale.CASES[cases.index(name)].weights
            for each in checkouts:
                rate = weights / result[each]["seconds"] * 3600 / 1e9
                result[each]["gparam_per_hour"] = rate
        found[name] = result
        print(name, json.dumps(result, indent=1), flush=True)
        report.save("convert_speed", {"threads": options.threads, "results": found})


if __name__ == "__main__":
    main()
