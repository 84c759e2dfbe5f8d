"""y = W x on a CPU: from codewords, from packed matrices, in torch's bf16 and in ggml's types.

    python -m benchmarks.packed [--avx2]

Writes benchmarks/results/packed.json: 10⁹ weights a second, times tokens, of y = W x with random
levels, medians of some rounds in which all take turns. ``stored`` multiplies codewords with x in
fp32, ``rounded`` codewords with x in int8, ``packed`` codes of 2 or 4 bits with the same, ``torch``
bf16 with bf16. With the extra ``gguf`` also llama.cpp's types of about as many bits (see
``ggml.py``), which round x to int8 as well. Also bits in memory, the time to pack, and the error of
y that rounding x makes, to int8 and to bf16.

With ``--avx2``, one shape on a processor that is told to have no more than that, written to
packed_avx2.json. ``GGML_LIBRARIES`` then has to name a folder with ggml built for AVX2 (of its
sources, ``cmake -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON``).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import ggml, report
from qmoe_format import codec
from qmoe_format.dtypes import from_float32
from qmoe_format.machine import cores

LARGE = (8192, 14336)
SHAPES = ((768, 3072), (3072, 768), (3584, 1024), LARGE)
ZEROS = (0.6, 0.885, 0.95)
TOKENS = (1, 16)
GGML = ("TQ2_0", "IQ1_S", "IQ2_XXS", "Q2_K", "Q4_0")
ROUNDS = 9
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt,+f16c,+movbe,+64bit,+cmov,+cx16",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
_MOST_WEIGHTS = 1 << 24  # multiplied at a time: smaller matrices several times


def matrix_of(rows: int, columns: int, zeros: float, most: int) -> codec.EncodedMatrix:
    """Random levels up to ``most``, one in ten of those that are not 0 beyond 1."""
    rng = np.random.default_rng(0)
    levels = (rng.random((rows, columns)) >= zeros).astype(np.int8)
    if most > 1:
        further = rng.random((rows, columns)) < 0.1
        levels[further] *= rng.integers(2, most + 1, int(further.sum()), dtype=np.int8)
    levels *= rng.integers(0, 2, (rows, columns), dtype=np.int8) * 2 - 1
    scales = (from_float32(rng.random(size).astype(np.float32) + 0.5, "BF16") for size in (
        (rows, 1), columns))  # fmt: skip
    return codec.encode_matrix(levels, *scales)


def error(y: Any, exact: Any) -> float:
    return float(np.sqrt(np.square(y - exact).sum() / np.square(exact).sum()))


def measure(rows: int, columns: int, zeros: float, most: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    matrix = matrix_of(rows, columns, zeros, most)
    started = time.perf_counter()
    packed = codec.pack(matrix, threads)
    packing = time.perf_counter() - started
    dense = codec.dequantize(matrix)
    weights = torch.from_numpy(dense).bfloat16()
    repeat = max(1, _MOST_WEIGHTS // (rows * columns))
    rates: dict[str, dict[int, float]] = {}
    for tokens in TOKENS:
        x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
        y = np.empty((tokens, rows), np.float32)
        x_bf16 = torch.from_numpy(x).bfloat16()

        def repeated(call: Callable[[], Any]) -> None:
            for _ in range(repeat):
                call()

        calls: dict[str, Callable[[], Any]] = {
            "stored": partial(codec.matmul, matrix, x, y, threads),
            "rounded": partial(codec.multiply_rounded, [(matrix, x, y)], threads),
            "packed": partial(codec.multiply_packed, [(packed, x, y)], threads),
            "torch": partial(torch.nn.functional.linear, x_bf16, weights),
        }
        if tokens == 1:
            calls["stored"] = partial(codec.matvec, matrix, x[0], y[0], threads)
        with ggml.products(GGML if ggml.available() else (), rows, columns, tokens) as theirs:
            for name, product in theirs.items():
                calls[name] = partial(product.run, threads)
            work = {name: partial(repeated, call) for name, call in calls.items()}
            for name, seconds in report.medians(work, ROUNDS).items():
                rate = rows * columns * repeat * tokens / seconds["median"] / 1e9
                rates.setdefault(name, {})[tokens] = rate
        codec.multiply_packed([(packed, x, y)], threads)
        exact = x.astype(np.float64) @ dense.T.astype(np.float64)
        bf16 = x_bf16.double().numpy() @ dense.T.astype(np.float64)
    return {
        "shape": [rows, columns],
        "zeros": zeros,
        "levels": 2 * most + 1,
        "threads": threads,
        "rates": {
            name: {str(tokens): round(rate, 2) for tokens, rate in each.items()}
            for name, each in rates.items()
        },
        "packed_bits_per_weight": round(8 * packed.nbytes / (rows * columns), 2),
        "packing_ns_per_weight": round(1e9 * packing / (rows * columns), 2),
        "error_of_int8_x": error(y, exact),
        "error_of_bf16_x": error(bf16, exact),
    }


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--avx2", action="store_true")
    avx2 = parser.parse_args().avx2
    if avx2 and not AVX2.items() <= os.environ.items():  # which libraries read when they are loaded
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.packed", "--avx2"], os.environ | AVX2
        )
    cases = [(*shape, zeros, 1, 1) for shape in SHAPES for zeros in ZEROS]
    cases += [(3584, 1024, 0.885, 5, 1), (*LARGE, 0.885, 5, 1)]
    if avx2:
        cases = [(*LARGE, zeros, 1, 1) for zeros in ZEROS]
    elif cores() > 1:
        cases += [(*shape, 0.885, 1, 2) for shape in SHAPES]
    measure(64, 64, 0.885, 5, 1)  # compiles kernels
    results = []
    for case in cases:
        results.append(measure(*case))
        print(results[-1], flush=True)
    report.save("packed_avx2" if avx2 else "packed", {"results": results, "ggml": ggml.version()})


if __name__ == "__main__":
    main()
