"""Speed and memory of compressed models beside the same models in ``transformers``.

    python -m benchmarks.runtime [--case NAME ...] [--folder FOLDER] [--device cuda] [--rounds N]

Writes benchmarks/results/runtime.json (runtime_cuda.json), keeping other cases that it has, and
removes what it made. The models:

    switch-mini, mixtral-mini   the two small trained ones, in cache on most machines
    switch-base-16              the dimensions of switch-base, 16 experts, random weights: 1.1 G
    mixtral-like                8 layers of 8 experts of 3 × 3584 × 1024, random weights: 0.7 G
    switch-base-128             random weights, 7.4 G: 15 GB in bf16, so only the compressed runs

Each is converted by ``rtn``, the trained ones as well. Every way to run it gets a process of its
own, and the ways take turns: load the model, read a prompt of 32 tokens, write 64 with a KV cache,
one at a time, always the likeliest. Peak memory is the kernel's ru_maxrss, with the mapped pages
of files; what the model itself has allocated is counted apart (RssAnon after writing).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qmoe_format
from benchmarks import report
from benchmarks.synthetic import MIXTRAL_LIKE, switch_base, write_checkpoint
from qmoe_format.container.inspection import describe

DATA = Path(__file__).parents[2] / "shared" / "data"
PROMPT_TOKENS, NEW_TOKENS = 32, 64
OURS, THEIRS = ("qmoe fp32", "qmoe bf16"), ("transformers bf16", "transformers fp32")


@dataclass(frozen=True, slots=True)
class Case:
    """A model: one of the trained ones, or random weights for a configuration."""

    name: str
    config: dict[str, Any] | None = None
    ways: tuple[str, ...] = (*OURS, *THEIRS)


CASES = (
    Case("switch-mini"),
    Case("mixtral-mini"),
    Case("switch-base-16", switch_base(16)),
    Case("mixtral-like", MIXTRAL_LIKE),
    Case("switch-base-128", switch_base(128), OURS),
)


# One way, in a process of its own


def work(way: str, path: Path, device: str) -> dict[str, Any]:
    """Load, read the prompt, write."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    library, number = way.split()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[number]
    if library == "qmoe":
        import qmoe_format.runtime  # its import is not part of loading

        started = time.perf_counter()
        model: Any = qmoe_format.runtime.load_model(path, device=device, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(path)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        started = time.perf_counter()
        model = kind.from_pretrained(path, dtype=dtype).to(device)
    loaded = time.perf_counter()

    class Clock:
        """Takes tokens as a streamer does; when each of them came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 250, (1, PROMPT_TOKENS)))

    def write() -> list[float]:
        clock = Clock()
        begun = time.perf_counter()
        model.generate(
            ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=clock,
        )
        # The first call puts the prompt, or a decoder's start.
        return [moment - begun for moment in clock.times[1:]]

    first = write()  # compiles, or reads from disk
    times = write()
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "load_seconds": loaded - started,
        "first_token_seconds": first[0],
        "prefill_seconds": times[0],
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "anonymous_bytes": int(anonymous.split()[1]) * 1024,
        "device_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
    }


def process(way: str, path: Path, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.runtime", "--way", way, "--path", str(path)]
    done = subprocess.run(
        [*command, "--device", device], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# All of them


def measure(case: Case, folder: Path, device: str, rounds: int) -> dict[str, Any]:
    checkpoint, file = DATA / case.name, folder / "model.qmoe"
    if case.config:
        checkpoint = folder / "checkpoint"
        write_checkpoint(case.config, checkpoint)
    started = time.perf_counter()
    qmoe_format.convert(checkpoint, file)
    converted = time.perf_counter() - started
    with qmoe_format.open(file) as opened:
        experts = describe(opened)["totals"]["experts"]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in case.ways}
    for _ in range(rounds):
        for way in case.ways:
            path = file if way in OURS else checkpoint
            found[way].append(process(way, path, device))
    ways = {way: _medians(results) for way, results in found.items()}
    result = {
        "case": case.name,
        "expert_weights": experts["weights"],
        "expert_bits_per_weight": experts["total_bits_per_weight"],
        "expert_bytes": experts["bytes"],
        "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")),
        "file_bytes": file.stat().st_size,
        "convert_seconds": round(converted, 1),
        "rounds": rounds,
        "ways": ways,
    }
    if THEIRS[0] in ways:
        for name, what in (
            ("speed_to_bf16", "tokens_per_second"),
            ("peak_memory_to_bf16", "peak_resident_bytes"),
        ):
            theirs = ways[THEIRS[0]][what]["median"]
            result[name] = {way: each[what]["median"] / theirs for way, each in ways.items()}
    return result


def _medians(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each figure that there is."""
    return {
        what: {
            "median": statistics.median(each[what] for each in results),
            "least": min(each[what] for each in results),
            "most": max(each[what] for each in results),
        }
        for what, value in results[0].items()
        if value is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="default: all")
    parser.add_argument("--folder", type=Path, help="where to put 17 GB for a while")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=(*OURS, *THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(work(options.way, options.path, options.device)))
        return
    name = "runtime" if options.device == "cpu" else f"runtime_{options.device}"
    path = report.RESULTS / f"{name}.json"
    saved = json.loads(path.read_text())["results"] if path.exists() else []
    results = {result["case"]: result for result in saved}
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results[case.name] = measure(case, Path(folder), options.device, options.rounds)
        print(json.dumps(results[case.name], indent=1), flush=True)
        ordered = [results[each.name] for each in CASES if each.name in results]
        report.save(name, {"results": ordered})


if __name__ == "__main__":
    main()
