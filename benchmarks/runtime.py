"""Speed and memory of compressed models beside the same models in ``transformers``.

    python -m benchmarks.runtime [--case NAME ...] [--folder FOLDER] [--device cuda] [--rounds N]

Writes benchmarks/results/runtime.json (runtime_cuda.json), keeping its other cases, and deletes the
models it generated:

    switch-mini, mixtral-mini   the two small trained ones, in cache on most machines
    switch-base-16              the dimensions of switch-base, 16 experts, random weights: 1.1 G
    mixtral-like                8 layers of 8 experts of 3 × 3584 × 1024, random weights: 0.7 G
    switch-base-128             random weights, 7.4 G: 15 GB in bf16, so only the compressed runs

With the extra ``gguf`` llama.cpp runs a model of the size of mixtral-like, see
``llama_cpp_model.py``. All are converted by ``rtn``. The ways to run a model take turns, each in a
process of its own: load the model, read a prompt of 32 tokens, and generate 64 greedily with a KV
cache. Peak memory is VmHWM, which includes mapped pages of files; allocated memory alone is RssAnon
at the end.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qmoe_format
from benchmarks import ggml, llama_cpp_model, report
from benchmarks.report import DATA
from benchmarks.synthetic import MIXTRAL_LIKE, switch_base, write_checkpoint
from qmoe_format.container.inspection import describe

PROMPT_TOKENS, NEW_TOKENS = 32, 64
OURS, THEIRS = ("qmoe fp32", "qmoe bf16"), ("transformers bf16", "transformers fp32")
LLAMA_TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_S", "Q2_K")
LLAMA_CPP = tuple(f"llama.cpp {each}" for each in LLAMA_TYPES) if ggml.available() else ()


@dataclass(frozen=True, slots=True)
class Case:
    """A trained model, or random weights for a configuration."""

    name: str
    config: dict[str, Any] | None = None
    ways: tuple[str, ...] = (*OURS, *THEIRS)


CASES = (
    Case("switch-mini"),
    Case("mixtral-mini"),
    Case("switch-base-16", switch_base(16)),
    Case("mixtral-like", MIXTRAL_LIKE, (*OURS, *THEIRS, *LLAMA_CPP)),
    Case("switch-base-128", switch_base(128), OURS),
)


def work(way: str, path: Path, device: str) -> dict[str, Any]:
    """Load, read the prompt, generate."""
    library, number = way.split()
    prompt = np.random.default_rng(0).integers(3, 250, (1, PROMPT_TOKENS))
    if library == "llama.cpp":
        return llama_cpp_model.work(path, prompt[0], NEW_TOKENS) | memory()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[number]
    if library == "qmoe":
        import qmoe_format.runtime  # the import is not part of loading

        started = time.perf_counter()
        model: Any = qmoe_format.runtime.load_model(path, device=device, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(path)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        started = time.perf_counter()
        model = kind.from_pretrained(path, dtype=dtype).to(device)
    loaded = time.perf_counter()

    class Clock:
        """A streamer that notes when each token comes."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.from_numpy(prompt)

    def generate() -> list[float]:
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
        # The first call is for the prompt, or a decoder's start token.
        return [moment - begun for moment in clock.times[1:]]

    first = generate()  # compiles, or reads from disk
    times = generate()
    return memory() | {
        "load_seconds": loaded - started,
        "first_token_seconds": first[0],
        "prefill_seconds": times[0],
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "device_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
    }


def memory() -> dict[str, int]:
    """Of this process. Its ru_maxrss would be no less than that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    kilobytes = {name: value.split()[0] for name, _, value in (
        line.partition(":") for line in status.splitlines() if line.endswith("kB")
    )}  # fmt: skip
    return {
        "peak_resident_bytes": int(kilobytes["VmHWM"]) * 1024,
        "anonymous_bytes": int(kilobytes["RssAnon"]) * 1024,
    }


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
    files = dict.fromkeys(OURS, file) | dict.fromkeys(THEIRS, checkpoint)
    for way in set(LLAMA_CPP).intersection(case.ways):
        assert case.config
        files[way] = folder / f"{way}.gguf"
        llama_cpp_model.write(case.config, way.split()[1], files[way])
    for _ in range(rounds):
        for way in case.ways:
            found[way].append(report.in_new_process(work, way, files[way], device))
    ways = {
        way: {
            what: report.spread([each[what] for each in results])
            for what, value in results[0].items()
            if value is not None
        }
        for way, results in found.items()
    }
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


def main() -> None:
    parser = report.arguments(__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="default: all")
    parser.add_argument("--folder", type=Path, help="for 17 GB of temporary files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    name = "runtime" if options.device == "cpu" else f"runtime_{options.device}"
    results = {result["case"]: result for result in report.load(name).get("results", [])}
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
