"""What each choice in the recipe ``rd`` is worth: error at equal bits with one of them changed.

    python -m benchmarks.quantize_choices [--experts N] [--only-levels]

Writes benchmarks/results/quantize_choices.json. Each variant quantizes some experts of each stack
of mixtral-mini at three lambdas, on one thread. Both the Hessians and the errors are those of the
evaluation text, which has far more tokens than there are columns. Bits are the entropy of mask,
signs and refinement, and the logarithm of the error is interpolated linearly in them. ``bits in
classes`` is the entropy if a matrix's columns, sorted by their share of non-zeros, were coded in
four classes with dictionaries of their own, which the format does not support.

``levels`` is the error with as many levels as pay over that of three levels: on both models, at
equal bits, and at more bits than three levels can use beside the least error that they reach.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.evaluation import EVALUATION_TEXT, MODELS, Evaluation, Model, read_text
from benchmarks.report import DATA
from qmoe_format.quantize.hessian import Statistics, relative_error
from qmoe_format.quantize.level_weights import LevelWeights
from qmoe_format.quantize.rate import Rate, weighted_energies
from qmoe_format.quantize.rd import EFFORTS, Search, quantize_rd

MODEL = "mixtral-mini"
LAMBDAS = (0.015, 0.03, 0.06)
LEVEL_LAMBDAS = tuple(4e-4 * 2.5**step for step in range(6))
EQUAL_BITS, MORE_BITS = (1.0, 1.2, 1.4), 2.0
CLASSES = 4
DEFAULT = "as it is"
VARIANTS = {
    DEFAULT: Search(),
    "10 rounds instead of 40": Search(rounds=10),
    "effort low, 20 rounds": EFFORTS["low"],
    "80 rounds": Search(rounds=80),
    "effort high, 160 rounds": EFFORTS["high"],
    "two GPTQ passes": Search(passes=2),
    "all columns refitted every 5th round, not an eighth": Search(columns=1.0),
    "columns refitted once": Search(columns_every=40),
    "columns put into another order once": Search(reorder_every=40),
    "columns in another order every 5th round": Search(reorder_every=5),
    "the full price from the first round on, not three times it": Search(first_price=1.0),
    "the full price in the first pass, not 0.3 of it": Search(start_price=1.0),
    "no lengthening where inputs are rare": Search(lengthen=0.0),
}

Sample = tuple[Tensor, Statistics, float]
Point = tuple[float, float, float]


def samples(name: str, experts: int) -> list[Sample]:
    """Weights of some experts of each stack, their statistics, and the reference of their rates."""
    model = Model(DATA / name)
    evaluation = Evaluation(model, model.windows(read_text(EVALUATION_TEXT)))
    found = []
    for name, weights in evaluation.original.items():
        statistics = evaluation.sums[name].of(slice(0, experts))
        some = weights[:experts]
        reference = weighted_energies(some, statistics).mean(1).log().mean().exp()
        found.append((some, statistics, float(reference)))
    return found


def entropy(levels: Tensor) -> float:
    """Bits per weight of mask, signs and refinement."""
    size, nonzeros = levels.numel(), int(levels.count_nonzero())
    ups = int(levels.int().abs().sum()) - nonzeros
    return (_coin(nonzeros, size) + nonzeros + _coin(ups, ups + nonzeros)) / size


def _coin(ones: int, bits: int) -> float:
    """The entropy of a string of bits, of which some are ones."""
    shares = (ones / max(1, bits), 1 - ones / max(1, bits))
    return -bits * sum(share * math.log2(share) for share in shares if share)


def in_classes(levels: Tensor) -> float:
    """Bits per level in classes of columns."""
    order = levels.count_nonzero(0).argsort()
    parts = [levels[:, part] for part in order.chunk(CLASSES)]
    return sum(entropy(part) * part.shape[1] for part in parts) / levels.shape[1]


def point(some: list[Sample], lam: float, search: Search, most: int | None = None) -> Point:
    """Means over the matrices: bits, bits in classes, logarithm of the error."""
    rows = []
    for weights, statistics, reference in some:
        rate = Rate(lam, reference)
        made = quantize_rd(weights, statistics, rate, most, search=search).weights
        assert isinstance(made, LevelWeights)
        errors = relative_error(weights, made.dequantize(), statistics.sums).log().tolist()
        for levels, error in zip(made.levels, errors, strict=True):
            rows.append((entropy(levels), in_classes(levels), error))
    bits, classes, error = np.mean(rows, axis=0).tolist()
    return bits, classes, error


def levels(some: list[Sample]) -> dict[str, float]:
    """Errors with many levels over those with three."""
    curves = {}
    for most in (3, None):
        points = sorted(point(some, lam, Search(), most) for lam in LEVEL_LAMBDAS)
        bits, _, errors = np.transpose(points)
        curves[most] = bits, errors
    best = float(curves[3][1].min())
    found = {"bits of three levels, at most": float(curves[3][0].max())}
    for bits in EQUAL_BITS:
        three, many = (float(np.interp(bits, *curve)) for curve in curves.values())
        found[f"error at {bits:g} bits"] = math.exp(many - three)
    many = float(np.interp(MORE_BITS, *curves[None]))
    return found | {f"error at {MORE_BITS:g} bits / least of three levels": math.exp(many - best)}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--experts", type=int, default=2, help="of each stack (default: 2)")
    parser.add_argument("--only-levels", action="store_true", help="keep the other results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = report.load("quantize_choices") if options.only_levels else {}
    results.pop("machine", None)
    results["experts"] = options.experts
    results["levels"] = {}
    for name in MODELS:
        results["levels"][name] = levels(samples(name, options.experts))
        print(name, results["levels"][name], flush=True)
    if not options.only_levels:
        results |= variants(samples(MODEL, options.experts))
    report.save("quantize_choices", results)


def variants(some: list[Sample]) -> dict[str, Any]:
    """Errors and seconds with other searches, relative to the default's."""
    point(some, LAMBDAS[0], Search())  # warm-up
    results: dict[str, Any] = {}
    wanted = base_error = base_seconds = 0.0
    for label, search in VARIANTS.items():
        started = time.perf_counter()
        points = sorted(point(some, lam, search) for lam in LAMBDAS)
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
    return {"model": MODEL, "bits": wanted, "variants": results}


if __name__ == "__main__":
    main()
