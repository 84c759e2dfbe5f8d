"""Up to which share of zeros a step for each weight is faster than one for each non-zero, on a CPU.

    python -m benchmarks.crossings

Writes benchmarks/results/crossings.json: for shares of zeros, how many times as fast kernels that
expand all weights (``dot_dense``, ``dot_rounded``) are as one that lists non-zeros
(``dot_sparse``), on one core, and where that falls below 1. ``DENSE_UNTIL`` of each module comes
from here. With ``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` Numba compiles for other processors;
results are kept for each set of the features that matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks import report
from benchmarks.packed import matrix_of
from qmoe_format import codec
from qmoe_format.codec.kernels import simd
from qmoe_format.codec.multiply import matvec_call
from qmoe_format.codec.rounded import rounded_calls
from qmoe_format.codec.segments import Call, run_all

ROWS, COLUMNS = 1024, 8192
ZEROS = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.84, 0.86, 0.88, 0.9, 0.92, 0.95)
TOKENS = (1, 4)
FEATURES = ("avx2", "avx512f", "avx512bw", "avx512vnni")
ROUNDS = 9


def ways(matrix: codec.EncodedMatrix) -> dict[str, Callable[[bool], list[Call]]]:
    """Products: dense or not -> calls."""
    x = np.random.default_rng(1).standard_normal((max(TOKENS), COLUMNS)).astype(np.float32)
    y = np.empty((max(TOKENS), ROWS), np.float32)
    found: dict[str, Callable[[bool], list[Call]]] = {
        f"int8, {tokens}": partial(rounded_calls, matrix, x[:tokens], y[:tokens])
        for tokens in TOKENS
    }
    return {"fp32": lambda dense: [matvec_call(matrix, x[0], y[0], dense)], **found}


def crossing(ratios: dict[float, float]) -> float:
    """The share of zeros at which the ratio falls to 1, between two that were measured."""
    shares = sorted(ratios)
    above = [share for share in shares if ratios[share] > 1]
    if not above or above[-1] == shares[-1]:
        return above[-1] if above else 0.0
    low, high = above[-1], shares[shares.index(above[-1]) + 1]
    part = np.log(ratios[low]) / np.log(ratios[low] / ratios[high])
    return float(low + part * (high - low))


def main() -> None:
    """Run everything."""
    ratios: dict[str, dict[float, float]] = {}
    for share in ZEROS:
        for name, calls in ways(matrix_of(ROWS, COLUMNS, share, 1)).items():
            work = {
                "sparse": partial(run_all, calls(False), 1),
                "dense": partial(run_all, calls(True), 1),
            }
            seconds = report.medians(work, ROUNDS)
            ratio = seconds["sparse"]["median"] / seconds["dense"]["median"]
            ratios.setdefault(name, {})[share] = round(ratio, 3)
            print(f"{share:5.1%} zeros, {name}: {ratio:.2f} x", flush=True)
    crossings = {name: round(crossing(each), 3) for name, each in ratios.items()}
    print(crossings)
    found = report.load("crossings").get("features", {})
    features = ", ".join(each for each in FEATURES if simd.cpu_has(each))
    found[features] = {"crossings": crossings, "ratios": ratios}
    report.save("crossings", {"features": found})


if __name__ == "__main__":
    main()
