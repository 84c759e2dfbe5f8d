"""Models whose experts do not fit into memory: speed, and bytes read beside the least possible.

    python -m benchmarks.expert_cache [--case NAME ...] [--folder FOLDER]

Writes benchmarks/results/expert_cache.json, keeping its other cases:

    mixtral-mini, switch-mini   the two small trained models and the text beside them; an expert has
                                16 to 90 kB
    mixtral-like                8 layers of 8 experts of 3 × 3584 × 1024, random weights and tokens;
                                an expert has 1.2 MB

All are converted by ``rtn``. Each budget, a share of the experts' bytes, has a process of its own,
which starts with an empty cache, reads prompts of 32 tokens and continues each by 32. Reads bypass
the page cache, or the file is dropped from it before (``posix_fadvise``); ``mapped`` is the model
without a cache of experts, its file in the page cache.

The least possible is what Belady's rule reads, which knows the future: of the experts that the same
calls have used, give up the one that is used last. (Among experts of different sizes it may be
beaten, by little.) ``lru`` is what giving up the least recently used one reads. Both count the
bytes of experts, ``read`` also the rest of the blocks that they share with others.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
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
def recording() -> Iterator[tuple[Trace, list[int]]]:
    """What caches are asked for, and the bytes in the file of each matrix that they read."""
    from qmoe_format.runtime.expert_cache import ExpertCache

    trace: Trace = []
    missed: list[int] = []
    using, read = ExpertCache.using, QMoEFile.read_encoded

    def recorded(self: ExpertCache, keys: Sequence[Key]) -> Any:
        trace.append(list(keys))
        return using(self, keys)

    def noted(self: QMoEFile, name: str, expert: int | None = None) -> Any:
        missed.append(self.stored_bytes(name, expert))
        return read(self, name, expert)

    with (
        patch.object(ExpertCache, "using", recorded),
        patch.object(QMoEFile, "read_encoded", noted),
    ):
        yield trace, missed


def work(path: Path, budget: int | None, prompts: list[list[int]]) -> dict[str, Any]:
    """Continue the prompts with experts in ``budget`` bytes, or mapped."""
    import torch
    from transformers.utils import logging

    from qmoe_format.runtime import load_model
    from qmoe_format.runtime.expert_memory import expert_cache

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load_model(path).generate(  # compiles
        torch.tensor(prompts[:1]), max_new_tokens=2, min_new_tokens=2, do_sample=False
    )
    if budget:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    model: Any = load_model(path, dtype=torch.float32, expert_memory=budget)
    started = time.perf_counter()
    with recording() as (trace, missed):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
    seconds = time.perf_counter() - started
    tokens = NEW_TOKENS * len(prompts)
    result: dict[str, Any] = {"tokens_per_second": tokens / seconds}
    cache = expert_cache(model)
    if cache is None or budget is None:
        return result
    sizes = {key: cache.size(key) for call in trace for key in call}
    least = replay(trace, sizes, budget, farthest(trace))
    read = cache.counters.bytes_read
    return result | {
        "budget_bytes": budget,
        "counters": asdict(cache.counters),
        "bytes_per_token": {
            "read": read / tokens,
            "least": least / tokens,
            "lru": replay(trace, sizes, budget, oldest(trace)) / tokens,
            "used": sum(sizes[key] for call in trace for key in call) / tokens,
        },
        "bytes_missed_per_token": sum(missed) / tokens,
    }


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
        return np.random.default_rng(0).integers(3, 250, (PROMPTS, PROMPT_TOKENS)).tolist()
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
    budgets = [
        {"share": share, **report.in_new_process(work, file, int(share * total), prompts)}
        for share in SHARES
    ]
    mapped = report.in_new_process(work, file, None, prompts)
    return {"case": case, "expert_bytes": total, "budgets": budgets, "mapped": mapped}


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
