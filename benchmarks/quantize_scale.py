"""Speed and memory of the recipes on experts of the size of large models.

    python -m benchmarks.quantize_scale [--experts N] [--seconds S] [--device cpu|cuda]

Writes benchmarks/results/quantize_scale.json, keeping the results of other devices; with --shrink
nothing. The experts of two layers have random normal weights and correlated random inputs, which
are generated from a seed when needed:

    switch-c-2048   wi 6144 × 2080, wo 2080 × 6144: 2048 experts
    gated, modern   w1 and w3 2048 × 7168, w2 7168 × 2048: 256 experts

Each recipe runs in a process of its own for a given time or number of experts. It turns inputs into
a file's bytes: Hessians, quantization, coding. Generating random numbers is included; reading a
checkpoint and running a model is not, unlike in the paper's 16 hours (arXiv 2310.16795: 1.6 T
parameters on one A6000, so 100 Gparam/h). As in conversions with experts of this size, all threads
work on one expert at a time, and a GPU on a few. Peak memory is ru_maxrss.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from qmoe_format.codec import PROFILES
from qmoe_format.conversion.encoding import encode, stored_bytes
from qmoe_format.conversion.parallel import Resources
from qmoe_format.machine import cores
from qmoe_format.quantize import recipe as find_recipe
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.rate import Rate, weighted_energies

PARAMETERS = 1.6e12
PAPER = {"hardware": "one A6000", "gparam_per_hour": 100.0, "hours": 16.0}
RECIPES = ("qmoe", "rd")
LAMBDA = 0.05
FACTORS = 256  # shared by all inputs; the strongest has ten times the spread of the weakest
NOISE = 0.3
CHUNK = 1024  # tokens generated and added at a time


@dataclass(frozen=True, slots=True)
class Case:
    """A layer; ``shapes`` are the rows and columns of an expert's matrices."""

    name: str
    experts: int
    shapes: dict[str, tuple[int, int]]

    @property
    def weights(self) -> int:
        """Of one expert."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def shrunk(self, by: int) -> Case:
        shapes = {name: (r // by, c // by) for name, (r, c) in self.shapes.items()}
        return Case(self.name, self.experts, shapes)


CASES = (
    Case("switch-c-2048", 2048, {"wi": (6144, 2080), "wo": (2080, 6144)}),
    Case("gated, modern", 256, {"w1": (2048, 7168), "w3": (2048, 7168), "w2": (7168, 2048)}),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """``experts``: at most, of each layer; ``tokens``: of each expert."""

    experts: int | None
    seconds: float
    tokens: int
    device: str
    threads: int


@dataclass(slots=True)
class Done:
    """What has been done, in how many seconds."""

    experts: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, device: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if device != "cpu":
            torch.cuda.synchronize(device)
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started


def random_weights(experts: range, rows: int, columns: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(experts.start)
    shape = (len(experts), rows, columns)
    return torch.randn(shape, generator=generator, device=device) * 0.02


def random_inputs(expert: int, columns: int, tokens: int, device: str) -> Iterator[Tensor]:
    """Inputs ``[some, columns]``, mixed from factors that all experts share."""
    generator = torch.Generator(device).manual_seed(columns)
    factors = min(FACTORS, columns)
    mixing = torch.randn(factors, columns, generator=generator, device=device)
    mixing *= torch.logspace(0, -1, factors, device=device)[:, None]
    generator.manual_seed(1_000_000 + expert)
    for first in range(0, tokens, CHUNK):
        some = min(CHUNK, tokens - first)
        strengths = torch.randn(some, factors, generator=generator, device=device)
        noise = torch.randn(some, columns, generator=generator, device=device)
        yield strengths @ mixing + NOISE * noise


def sums_of_inputs(experts: range, columns: int, settings: Settings, done: Done) -> Statistics:
    device = settings.device
    statistics = Statistics.zeros(len(experts), columns, device=device)
    for place, expert in enumerate(experts):
        inputs = random_inputs(expert, columns, settings.tokens, device)
        while True:
            with done.phase("random numbers", device):
                some = next(inputs, None)
            if some is None:
                break
            with done.phase("Hessians", device):
                statistics.add(place, some)
    return statistics


def quantize_group(case: Case, name: str, experts: range, settings: Settings, done: Done) -> None:
    """Quantize all matrices of some experts, from inputs to bytes."""
    recipe, device = find_recipe(name), settings.device
    known: dict[int, Statistics] = {}
    for rows, columns in case.shapes.values():
        with done.phase("random numbers", device):
            weights = random_weights(experts, rows, columns, device)
        if columns not in known:  # matrices that multiply the same tokens share a Hessian
            known = {columns: sums_of_inputs(experts, columns, settings, done)}
            if sum(columns == each for _, each in case.shapes.values()) > 1:
                known[columns].known = {}
        statistics = known[columns]
        with done.phase("quantizer", device):
            rate = None
            if recipe.rated:
                reference = weighted_energies(weights, statistics).mean(1).log().mean().exp()
                rate = Rate(LAMBDA, float(reference))
            quantized = recipe.quantize(weights, statistics, rate).weights
        with done.phase("coding", device):
            for place in range(len(experts)):
                matrix = encode(quantized, place, PROFILES["fast"], settings.threads)
                done.stored_bytes += stored_bytes(matrix)
    done.experts += len(experts)


def measure(case: Case, name: str, settings: Settings) -> dict[str, Any]:
    """Quantize groups of experts until the time is up, in a process of its own."""
    most = min(case.experts, settings.experts or case.experts)
    torch.set_num_threads(settings.threads)
    # Compilation and initialization are not measured.
    warm_up = Settings(None, 0, 64, settings.device, settings.threads)
    quantize_group(case.shrunk(64), name, range(1), warm_up, Done())
    largest = max(case.shapes.values(), key=lambda shape: shape[0] * shape[1] + shape[1] ** 2)
    done = Done()
    started = time.perf_counter()
    for group in Resources(1, settings.device).batches(most, *largest):
        quantize_group(case, name, group, settings, done)
        done.seconds = time.perf_counter() - started
        if done.seconds > settings.seconds:
            break
    rate = done.experts * case.weights / done.seconds
    shares = {phase: round(spent / done.seconds, 3) for phase, spent in done.phases.items()}
    result: dict[str, Any] = {
        "layer": case.name,
        "recipe": name,
        "experts": done.experts,
        "experts_of_the_layer": case.experts,
        "weights": done.experts * case.weights,
        "seconds": round(done.seconds, 1),
        "shares": shares,
        "bits_per_weight": 8 * done.stored_bytes / (done.experts * case.weights),
        "gparam_per_hour": rate * 3600 / 1e9,
        "hours_for_1.6T": PARAMETERS / rate / 3600,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if settings.device != "cpu":
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated(settings.device)
    return result


def save(settings: Settings, results: list[dict[str, Any]]) -> None:
    """Beside the results of other devices."""
    runs = report.load("quantize_scale").get("runs", {})
    machine = report.machine()
    if settings.device != "cpu":
        machine["device"] = torch.cuda.get_device_name(settings.device)
    runs[settings.device] = {
        "machine": machine,
        "threads": settings.threads,
        "tokens_per_expert": settings.tokens,
        "lambda": LAMBDA,
        "results": results,
    }
    report.save("quantize_scale", {"paper": PAPER, "parameters": PARAMETERS, "runs": runs})


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--experts", type=int, help="at most, of each layer")
    parser.add_argument(
        "--seconds", type=float, default=300, help="after which no more experts begin (per recipe)"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="per expert")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, for a trial run")
    options = parser.parse_args()
    settings = Settings(
        experts=options.experts,
        seconds=options.seconds,
        tokens=options.tokens // options.shrink,
        device=options.device,
        threads=options.threads,
    )
    results = []
    for case in CASES:
        for name in RECIPES:
            shrunk = case.shrunk(options.shrink)
            results.append(report.in_new_process(measure, shrunk, name, settings))
            print(json.dumps(results[-1], indent=1), flush=True)
    if options.shrink == 1:
        save(settings, results)


if __name__ == "__main__":
    main()
