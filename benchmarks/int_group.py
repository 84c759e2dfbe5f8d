"""Products with integers in groups, beside torch's with bfloat16 weights, on one core.

    python -m benchmarks.int_group

Writes benchmarks/results/int_group.json: for matrices beyond the cache, one or several in turn,
nanoseconds per weight of ours and of torch (for one token the faster of ``mv`` and ``linear``), in
turns within one run, and how many times as fast ours is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks import report
from qmoe_format import codec

SHAPES = ((1, 4096, 14336), (4, 7168, 2048), (4, 2048, 7168))  # matrices, rows, columns
KINDS = (  # grid, columns of a group, zero points
    ("linear", 0, False),
    ("linear", 128, True),
    ("linear", 64, False),
    ("linear", 32, True),
    ("log", 0, False),
)
TOKENS = (1, 2, 4, 16)
ROUNDS = 9


def random_matrix(
    rows: int, columns: int, bits: int, grid: str, group_size: int, zero_points: bool, seed: int
) -> codec.GroupedMatrix:
    """Uniform codes, whose values do not matter for speed; but no subnormal weights."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // group_size) if group_size else 1
    codes = rng.integers(0, 2**bits, (rows, columns), np.uint8)
    if grid == "log":
        codes &= 0b10001111 if bits == 8 else 0xFF
    return codec.pack_groups(
        codes,
        rng.integers(0x3C00, 0x3D00, (rows, groups), np.uint16),
        bits,
        grid=grid,
        group_size=group_size,
        zero_points=rng.integers(0, 2**bits, (rows, groups), np.uint8) if zero_points else None,
    )


def medians(work: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median seconds of each piece of work, in turns, after a warm-up round.

    They are of this thread's time: a wait for the processor, which others use too, does not count.
    """
    taken: dict[Any, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS + 1):
        for name, piece in work.items():
            start = time.thread_time()
            piece()
            taken[name].append(time.thread_time() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def in_turn(product: Callable[..., Any], matrices: list[Any], *rest: Any) -> None:
    """Multiply with one after the other."""
    for matrix in matrices:
        product(matrix, *rest)


def main() -> None:
    """Run everything."""
    torch.set_num_threads(1)
    results = []
    for count, rows, columns in SHAPES:
        weights = count * rows * columns
        seeds = range(count)
        dense = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in seeds]
        kinds = {
            (bits, *kind): [random_matrix(rows, columns, bits, *kind, seed) for seed in seeds]
            for bits in (2, 3, 4, 8)
            for kind in KINDS
        }
        for tokens in TOKENS:
            x = torch.randn(tokens, columns)
            work: dict[Any, Callable[[], Any]] = {
                "linear": partial(in_turn, lambda w, x: linear(x, w), dense, x.bfloat16())
            }
            if tokens == 1:
                work["mv"] = partial(in_turn, torch.mv, dense, x[0].bfloat16())
            for kind, matrices in kinds.items():
                product, token = (codec.matvec, x[0]) if tokens == 1 else (codec.matmul, x)
                work[kind] = partial(in_turn, product, matrices, token.numpy())
            took = {name: 1e9 * seconds / weights for name, seconds in medians(work).items()}
            other = min(took[name] for name in ("linear", "mv") if name in took)
            for kind in kinds:
                bits, grid, group_size, zero_points = kind
                result = {
                    "matrices": [count, rows, columns],
                    "tokens": tokens,
                    "bits": bits,
                    "grid": grid,
                    "group_size": group_size,
                    "zero_points": zero_points,
                    "ns per weight": round(took[kind], 4),
                    "torch bf16, ns per weight": round(other, 4),
                    "times as fast as torch bf16": round(other / took[kind], 2),
                }
                results.append(result)
                print(result, flush=True)
    report.save("int_group", {"results": results})


if __name__ == "__main__":
    main()
