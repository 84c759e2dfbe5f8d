"""Which kernel multiplies how many tokens of an expert the fastest on a CPU.

    python -m benchmarks.products

Writes benchmarks/results/products.json: microseconds on one core of the three kernels that
``choose_kernel`` chooses from, and the time of its choice relative to the best of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import report
from qmoe_format import codec
from qmoe_format.runtime.grouped_linear import choose_kernel
from qmoe_format.runtime.tuning import Tuning

SHAPES = ((3072, 768), (768, 3072), (3584, 1024))
ZEROS = (0.6, 0.885, 0.95)
TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
ROUNDS = 15


def kernels(matrix: codec.EncodedMatrix, tokens: int) -> dict[str, Callable[[], Any]]:
    """Y = X W^T of as many tokens, by each kernel."""
    x = np.random.default_rng(1).standard_normal((tokens, matrix.columns)).astype(np.float32)
    y = np.empty((tokens, matrix.rows), np.float32)
    tile = max(1, Tuning().scratch_bytes // (4 * matrix.columns))
    scratch = np.empty((min(tile, matrix.rows), matrix.columns), np.float32)

    def dense() -> None:
        for first in range(0, matrix.rows, tile):
            part = scratch[: min(tile, matrix.rows - first)]
            codec.dequantize_rows(matrix, first, part, 1)
            columns = torch.from_numpy(y)[:, first : first + len(part)]
            torch.mm(torch.from_numpy(x), torch.from_numpy(part).T, out=columns)

    single = [(matrix, x[i], y[i]) for i in range(tokens)]
    return {
        "matvec": partial(codec.matvecs, single, 1),
        "matmul": partial(codec.matmul, matrix, x, y, 1),
        "dense": dense,
    }


def main() -> None:
    """Run everything."""
    torch.set_num_threads(1)
    results = []
    for rows, columns in SHAPES:
        for share in ZEROS:
            p = [share, (1 - share) / 2, (1 - share) / 2]
            levels = np.random.default_rng(0).choice([0, 1, -1], (rows, columns), p=p)
            scales = np.full((rows, 2), 0x3C00, np.uint16)
            matrix = codec.encode_matrix(levels.astype(np.int8), scales)
            for tokens in TOKENS:
                seconds = report.medians(kernels(matrix, tokens), ROUNDS)
                took = {name: 1e6 * each["median"] for name, each in seconds.items()}
                choice = choose_kernel(tokens, matrix, Tuning())
                result = {
                    "shape": [rows, columns],
                    "zeros": share,
                    "tokens": tokens,
                    "microseconds": {name: round(each, 1) for name, each in took.items()},
                    "chosen": choice,
                    "chosen / best": round(took[choice] / min(took.values()), 2),
                }
                results.append(result)
                print(
                    f"{rows} x {columns}, {share:5.1%} zeros, {tokens:3} tokens: "
                    + "  ".join(f"{name} {each:8.0f} us" for name, each in took.items())
                    + f"  {choice}: {result['chosen / best']:.2f} x the best",
                    flush=True,
                )
    report.save("products", {"results": results})


if __name__ == "__main__":
    main()
