"""Models whose experts do not fit into memory: speed, and bytes read beside the least possible.

    python -m benchmarks.expert_cache [--case NAME ...] [--folder FOLDER]

Writes benchmarks/results/expert_cache.json, keeping its other cases:

    mixtral-mini, switch-mini   the two small trained models and the text beside them; an expert has
                                45 kB
    mixtral-like                8 layers of 8 experts of 3 × 3584 × 1024, random weights and tokens;
                                an expert has 0.8 MB

All are converted by ``rtn``. For each budget, a share of the experts' bytes, there is a model that
starts with an empty cache; they take turns to read prompts of 32 tokens and continue each by 32.
Speeds are medians over prompts. Reads bypass the page cache; ``mapped`` is the model without a
cache of experts, its file in the page cache.

The least possible is what Belady's rule reads, which knows the future: of the experts that the same
calls have used, give up the one that is used last. (Among experts of different sizes it may be
beaten, by little.) ``lru`` is what giving up the least recently used one reads. Both count the
bytes of experts, as does ``missing``, of those that were read; ``read`` also counts the rest of the
disk's blocks that they share with others.
"""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np

import qmoe_format
from benchmarks import report
from benchmarks.report import DATA
from benchmarks.synthetic import MIXTRAL_LIKE, write_checkpoint
from qmoe_format import QMoEFile

CASES = ("mixtral-mini", "switch-mini", "mixtral-like")
SHARES = (0.1, 0.25, 0.5, 1.0)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 32, 32

Key: TypeAlias = tuple[int, int]
"""A layer and an expert."""
Trace: TypeAlias = list[list[Key]]
"""What each call of a layer used."""


@contextmanager
def recording() -> Iterator[tuple[dict[Any, Trace], dict[Any, int]]]:
    """What each cache is asked for, and the bytes of experts that are read of each open file."""
    from qmoe_format.runtime.expert_cache import ExpertCache

    traces: dict[Any, Trace] = defaultdict(list)
    missed: dict[Any, int] = Counter()
    using, read = ExpertCache.using, QMoEFile.read_encoded

    def recorded(self: ExpertCache, keys: Sequence[Key]) -> Any:
        traces[self].append(list(keys))
        return using(self, keys)

    def noted(self: QMoEFile, name: str, expert: int | None = None) -> Any:
        found = read(self, name, expert)
        with lock:
            missed[self] += self.stored_bytes(name, expert)
        return found

    lock = Lock()
    with (
        patch.object(ExpertCache, "using", recorded),
        patch.object(QMoEFile, "read_encoded", noted),
    ):
        yield traces, missed


def work(path: Path, budgets: list[int], prompts: list[list[int]]) -> dict[str, Any]:
    """Continue the prompts by a model for each budget, and by one without; they take turns."""
    import torch
    from transformers.utils import logging

    from qmoe_format.runtime import load_model
    from qmoe_format.runtime.expert_memory import expert_cache
    from qmoe_format.runtime.experts import compressed_modules

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # two would wait for each other where other programs run, too

    def generate(model: Any, prompt: list[int], tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return time.perf_counter() - started

    mapped = load_model(path, dtype=torch.float32)
    limited = [load_model(path, dtype=torch.float32, expert_memory=budget) for budget in budgets]
    models = [mapped, *limited]
    generate(mapped, prompts[0], 2)  # compiles
    seconds: list[list[float]] = [[] for _ in models]
    with recording() as (traces, missed):
        for prompt in prompts:
            for number, model in enumerate(models):
                seconds[number].append(generate(model, prompt, NEW_TOKENS))
    tokens = NEW_TOKENS * len(prompts)
    results = []
    for budget, model, taken in zip(budgets, limited, seconds[1:], strict=True):
        cache = expert_cache(model)
        assert cache is not None
        trace = traces[cache]
        sizes = {key: cache.size(key) for call in trace for key in call}
        file_of = next(module.compressed.output.file for _, module in compressed_modules(model))
        counted = {
            "read": cache.counters.bytes_read,
            "missing": missed[file_of],
            "least": replay(trace, sizes, budget, farthest(trace)),
            "lru": replay(trace, sizes, budget, oldest(trace)),
            "used": sum(sizes[key] for call in trace for key in call),
        }
        results.append(
            {
                "budget_bytes": budget,
                "tokens_per_second": NEW_TOKENS / median(taken),
                "milliseconds_waited_per_token": 1000 * cache.counters.seconds_waited / tokens,
                "counters": asdict(cache.counters),
                "bytes_per_token": {name: each / tokens for name, each in counted.items()},
            }
        )
    return {"mapped_tokens_per_second": NEW_TOKENS / median(seconds[0]), "budgets": results}


def replay(
    trace: Trace, sizes: dict[Key, int], budget: int, rank: Callable[[int, Key], int]
) -> int:
    """Bytes that are read if the expert of the highest rank goes, after this many calls."""
    there: set[Key] = set()
    used = read = 0
    for number, call in enumerate(trace):
        for key in call:
            if key in there:
                continue
            read += sizes[key]
            others = there.difference(call)
            while used + sizes[key] > budget and others:
                gone = max(others, key=lambda other: rank(number, other))
                others.remove(gone)
                there.remove(gone)
                used -= sizes[gone]
            there.add(key)
            used += sizes[key]
    return read


def uses_of(trace: Trace) -> dict[Key, list[int]]:
    """The numbers of the calls that used each expert."""
    uses: dict[Key, list[int]] = defaultdict(list)
    for number, call in enumerate(trace):
        for key in call:
            uses[key].append(number)
    return uses


def farthest(trace: Trace) -> Callable[[int, Key], int]:
    """Belady's rule: rank by the next use."""
    uses = uses_of(trace)

    def rank(number: int, key: Key) -> int:
        place = bisect_right(uses[key], number)
        return uses[key][place] if place < len(uses[key]) else len(trace)

    return rank


def oldest(trace: Trace) -> Callable[[int, Key], int]:
    """Rank by the time since the last use."""
    uses = uses_of(trace)
    return lambda number, key: -uses[key][bisect_right(uses[key], number) - 1]


def read_prompts(case: str, file: Path) -> list[list[int]]:
    """The beginnings of texts, or random tokens."""
    if case not in ("mixtral-mini", "switch-mini"):
        generator = np.random.default_rng(0)
        return [generator.integers(3, 250, PROMPT_TOKENS).tolist() for _ in range(PROMPTS)]
    tokenizer = qmoe_format.load_tokenizer(file)
    lines = (DATA / "text" / "eval.jsonl").read_text("utf-8").splitlines()[:PROMPTS]
    texts = [json.loads(line)["text"][:1000] for line in lines]
    return [tokenizer(text).input_ids[:PROMPT_TOKENS] for text in texts]


def measure(case: str, folder: Path) -> dict[str, Any]:
    """All budgets of a case."""
    checkpoint, file = DATA / case, folder / "model.qmoe"
    if case == "mixtral-like":
        checkpoint = folder / "checkpoint"
        write_checkpoint(MIXTRAL_LIKE, checkpoint)
    qmoe_format.convert(checkpoint, file)
    prompts = read_prompts(case, file)
    with qmoe_format.open(file) as opened:
        stacks = [entry for entry in opened.tensors.values() if entry.stack]
        total = sum(entry.stored_bytes for entry in stacks)
    budgets = [int(share * total) for share in SHARES]
    found = report.in_new_process(work, file, budgets, prompts)
    for share, each in zip(SHARES, found["budgets"], strict=True):
        each["share"] = share
    return {"case": case, "expert_bytes": total, **found}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--folder", type=Path, help="for 2 GB of temporary files")
    options = parser.parse_args()
    results = {each["case"]: each for each in report.load("expert_cache").get("results", [])}
    for case in options.case or CASES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results[case] = measure(case, Path(folder))
        print(json.dumps(results[case], indent=1), flush=True)
        ordered = [results[each] for each in CASES if each in results]
        report.save("expert_cache", {"results": ordered})


if __name__ == "__main__":
    main()
