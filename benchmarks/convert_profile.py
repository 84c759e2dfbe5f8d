"""Where the time of a conversion goes, by stage.

    python -m benchmarks.convert_profile [--only NAME...] [--threads N]

Writes benchmarks/results/convert_profile.json: switch-mini and mixtral-mini from beside the
repository, converted at 0.8 bits with all of the calibration text, and one expert of each case of
``quantize_scale``. A thread looks at the stacks of all others a hundred times a second. A sample
belongs to the innermost function that stands for a stage, and to the plan if the main thread is
surveying the original model. Shares are of the time that threads spend working.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import quantize_scale, report
from benchmarks.evaluation import CALIBRATION_TEXT
from benchmarks.report import DATA
from qmoe_format.conversion import convert
from qmoe_format.conversion.options import Calibration
from qmoe_format.machine import cores

BITS = 0.8
MODELS = ("mixtral-mini", "switch-mini")
PERIOD = 0.01  # seconds
# By the file and the name of a function.
STAGES = {
    ("sequences.py", "read_batches"): "text",
    ("checkpoint.py", "read_expert"): "reading",
    ("model_part.py", "loaded"): "reading",
    ("model_part.py", "run_block"): "forward",
    ("activations.py", "append"): "hidden states to disk",
    ("block_experts.py", "_multiplied"): "tokens times experts",
    ("block_experts.py", "_hidden"): "tokens times experts",
    ("block_experts.py", "add_outputs"): "tokens times experts",
    ("block_experts.py", "result"): "tokens times experts",
    ("block_experts.py", "_weigh"): "importance of rows",
    ("hessian.py", "add"): "Hessians",
    ("hessian.py", "factored"): "factorization",
    ("hessian.py", "relative_error"): "errors for the report",
    ("solution.py", "of"): "products with Hessians",
    ("rd.py", "_gptq"): "GPTQ",
    ("solution.py", "__init__"): "products with Hessians",
    ("descent.py", "descend"): "descent",
    ("solution.py", "refit_columns"): "refits",
    ("solution.py", "fit"): "refits",
    ("solution.py", "reorder"): "other orders",
    ("encoding.py", "encode"): "encoding",
    ("quantize_scale.py", "random_inputs"): "random numbers",
    ("quantize_scale.py", "random_weights"): "random numbers",
    ("rate.py", "weighted_energies"): "energies",
}
IDLE = {"wait", "_worker", "select", "acquire", "_wait_for_tstate_lock"}


class Sampler:
    """Counts samples by stage while it is entered."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def shares(self) -> dict[str, float]:
        """The largest first."""
        total = sum(self._counts.values())
        return {name: count / total for name, count in self._counts.most_common()}

    def _run(self) -> None:
        while not self._stopped.wait(PERIOD):
            frames = sys._current_frames()
            main = frames.get(self._main)
            plan = "plan: " if ("passes.py", "survey") in _functions(main) else ""
            for ident, frame in frames.items():
                functions = _functions(frame)
                if ident == threading.get_ident() or functions[0][1] in IDLE:
                    continue
                stages = (STAGES[each] for each in functions if each in STAGES)
                self._counts[plan + next(stages, "other")] += 1


def _functions(frame: FrameType | None) -> list[tuple[str, str]]:
    """File and name of the functions of a stack, the innermost first."""
    found = []
    while frame:
        found.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
        frame = frame.f_back
    return found


def conversion(name: str, threads: int) -> dict[str, Any]:
    """Profile the conversion of a small model."""
    with tempfile.TemporaryDirectory() as folder, Sampler() as sampler:
        started, used = time.perf_counter(), time.process_time()
        convert(
            DATA / name,
            Path(folder) / "out.qmoe",
            calibration=Calibration(CALIBRATION_TEXT),
            bits_per_weight=BITS,
            threads=threads,
        )
        return _result(sampler, started, used)


def expert(case: quantize_scale.Case, threads: int) -> dict[str, Any]:
    """Profile the quantization of one expert of full size."""
    torch.set_num_threads(threads)
    small = quantize_scale.Settings(None, 0, 64, "cpu", threads)
    quantize_scale.quantize_group(case.shrunk(64), "rd", range(1), small, quantize_scale.Done())
    settings = quantize_scale.Settings(1, 0, 8192, "cpu", threads)
    with Sampler() as sampler:
        started, used = time.perf_counter(), time.process_time()
        quantize_scale.quantize_group(case, "rd", range(1), settings, quantize_scale.Done())
        return _result(sampler, started, used)


def _result(sampler: Sampler, started: float, used: float) -> dict[str, Any]:
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    shares = {name: round(share, 4) for name, share in sampler.shares().items()}
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "shares": shares}


def main() -> None:
    parser = report.arguments(__doc__)
    cases = {case.name: case for case in quantize_scale.CASES}
    names = [*MODELS, *cases]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    profiles = report.load("convert_profile").get("profiles", {})
    for name in options.only:
        if name in cases:
            profiles[name] = report.in_new_process(expert, cases[name], options.threads)
        else:
            profiles[name] = report.in_new_process(conversion, name, options.threads)
        print(name, profiles[name], flush=True)
    report.save("convert_profile", {"threads": options.threads, "profiles": profiles})


if __name__ == "__main__":
    main()
