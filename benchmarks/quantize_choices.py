"""What each choice in the recipe ``rd`` is worth: error at equal bits with one of them changed.

    python -m benchmarks.quantize_choices [--experts N]

Writes benchmarks/results/quantize_choices.json. Some experts of each stack of mixtral-mini are
quantised at three lambdas by each variant, on one thread, with the sums over the evaluation text,
on which the error is measured, too: tokens are far more than columns, so comparisons hold. Bits are
the entropy of the trits; the logarithm of the error is linear in them. ``bits in classes`` is the
entropy if a matrix's columns, sorted by their share of non-zeros, were coded in four classes with a
dictionary each, which the format cannot do.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.evaluation import Evaluation
from qmoe_format.quantize import descent, rd
from qmoe_format.quantize.hessian import Statistics, relative_error

MODEL = "mixtral-mini"
LAMBDAS = (0.015, 0.03, 0.06)
CLASSES = 4
DEFAULT = "as it is"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "10 rounds instead of 20": {"ROUNDS": 10},
    "40 rounds": {"ROUNDS": 40},
    "60 rounds": {"ROUNDS": 60},
    "columns refitted every round, not every 4th": {"COLUMNS_EVERY": 1},
    "columns refitted every 10th round": {"COLUMNS_EVERY": 10},
    "the full price from the first round on, not three times it": {"FIRST_PRICE": 1.0},
    "the full price in the first passes, not 0.3 of it": {"START_SHARE": 1.0},
    "no lengthening where inputs are rare": {"LENGTHEN": 0.0},
    "groups of 1 column instead of 16": {"GROUP": 1},
    "groups of 4 columns": {"GROUP": 4},
    "groups of 32 columns": {"GROUP": 32},
    "groups of 64 columns": {"GROUP": 64},
}

Problem = tuple[Tensor, Statistics, float]
Point = tuple[float, float, float]


def problems(experts: int) -> list[Problem]:
    """Weights of some experts of each stack, their statistics, and the reference of their rates."""
    evaluation = Evaluation(MODEL)
    found = []
    for name, weights in evaluation.original.items():
        statistics = evaluation.sums[name].of(slice(0, experts))
        some = weights[:experts]
        reference = rd.weighted_energies(some, statistics).mean(1).log().mean().exp()
        found.append((some, statistics, float(reference)))
    return found


@contextmanager
def changed(constants: dict[str, Any]) -> Iterator[None]:
    """With other constants in ``rd`` and ``descent``."""
    with ExitStack() as stack:
        for name, value in constants.items():
            module = descent if name == "GROUP" else rd
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def entropy(trits: Tensor) -> float:
    """Bits of a trit."""
    shares = [float((trits == value).double().mean()) for value in (-1, 0, 1)]
    return -sum(share * math.log2(share) for share in shares if share)


def in_classes(trits: Tensor) -> float:
    """Bits of a trit in classes of columns."""
    order = trits.count_nonzero(0).argsort()
    parts = [trits[:, part] for part in order.chunk(CLASSES)]
    return sum(entropy(part) * part.shape[1] for part in parts) / trits.shape[1]


def point(some: list[Problem], lam: float) -> Point:
    """Means over the matrices: bits, bits in classes, logarithm of the error."""
    rows = []
    for weights, statistics, reference in some:
        made = rd.quantize_rd(weights, "BF16", statistics, rd.Rate(lam, reference)).weights
        errors = relative_error(weights, made.dequantize(), statistics.sums).log().tolist()
        for trits, error in zip(made.trits, errors, strict=True):
            rows.append((entropy(trits), in_classes(trits), error))
    bits, classes, error = np.mean(rows, axis=0).tolist()
    return bits, classes, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=2, help="of each stack (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    some = problems(options.experts)
    point(some, LAMBDAS[0])  # libraries get ready
    results: dict[str, Any] = {}
    wanted = base_error = base_seconds = 0.0
    for label, constants in VARIANTS.items():
        started = time.perf_counter()
        with changed(constants):
            points = sorted(point(some, lam) for lam in LAMBDAS)
        seconds = time.perf_counter() - started
        bits, classes, errors = zip(*points, strict=True)
        if label == DEFAULT:
            wanted, base_seconds = bits[1], seconds
            base_error = errors[1]
        error = float(np.interp(wanted, bits, errors))
        results[label] = {
            "error / default's": math.exp(error - base_error),
            "seconds / default's": seconds / base_seconds,
            "bits in classes / bits": classes[1] / bits[1],
        }
        print(label, {what: round(value, 3) for what, value in results[label].items()}, flush=True)
    report.save(
        "quantize_choices",
        {"model": MODEL, "experts": options.experts, "bits": wanted, "variants": results},
    )


if __name__ == "__main__":
    main()
