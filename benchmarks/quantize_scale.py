"""Speed and memory of the recipes on experts of the size of large models.

    python -m benchmarks.quantize_scale [--experts N] [--seconds S] [--device cpu|cuda]

Writes benchmarks/results/quantize_scale.json, keeping what it has of another device; with --shrink
nothing. Two layers, experts of random normal weights with correlated random inputs, made from a
seed when they are needed and then forgotten:

    switch-c-2048   wi 6144 × 2080, wo 2080 × 6144: 2048 experts
    gated, modern   w1 and w3 2048 × 7168, w2 7168 × 2048: 256 experts

Each recipe works in a process of its own for a given time or number of experts. It is given the
inputs and makes a file's bytes: Hessians, quantisation, coding. Making random numbers is counted
too; reading a checkpoint and running a model is not, in the paper's 16 hours it is (arXiv
2310.16795: 1.6 T parameters on one A6000, so 100 Gparam/h). All threads work on one expert at
a time, on a GPU on a few, as conversions do with experts of this size. Memory is the kernel's
ru_maxrss.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
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
FACTORS = 256  # that inputs have in common; the strongest has ten times the weakest's spread
NOISE = 0.3
CHUNK = 1024  # tokens made and added at a time


@dataclass(frozen=True, slots=True)
class Case:
    """A layer; ``shapes`` are the rows and columns of an expert's matrices."""

    name: str
    experts: int
    shapes: dict[str, tuple[int, int]]

    @property
    def weights(self) -> int:
        """Those of an expert."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def shrunk(self, by: int) -> Case:
        shapes = {
            name: (rows // by, columns // by) for name, (rows, columns) in self.shapes.items()
        }
        return Case(self.name, self.experts, shapes)


CASES = (
    Case("switch-c-2048", 2048, {"wi": (6144, 2080), "wo": (2080, 6144)}),
    Case("gated, modern", 256, {"w1": (2048, 7168), "w3": (2048, 7168), "w2": (7168, 2048)}),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """``experts``: of a layer, at most; ``tokens``: of each."""

    experts: int | None
    seconds: float
    tokens: int
    device: str
    threads: int


@dataclass(slots=True)
class Done:
    """What has been done, and the seconds it took."""

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
    """Inputs ``[some, columns]`` that have factors in common, the same for all experts."""
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


def quantize_group(case: Case, name: str, experts: range, settings: Settings, done: Done) -> None:
    """All matrices of some experts, from inputs to bytes."""
    recipe, device = find_recipe(name), settings.device
    before: tuple[int, Statistics] | None = None
    for rows, columns in case.shapes.values():
        with done.phase("random numbers", device):
            weights = random_weights(experts, rows, columns, device)
        # Matrices that are multiplied with the same tokens share a Hessian.
        if before and before[0] == columns:
            statistics = before[1]
        else:
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
            before = columns, statistics
        with done.phase("quantizer", device):
            rate = None
            if recipe.rated:
                reference = weighted_energies(weights, statistics).mean(1).log().mean().exp()
                rate = Rate(LAMBDA, float(reference))
            ternary = recipe.quantize(weights, "BF16", statistics, rate).weights
        with done.phase("coding", device):
            for place in range(len(experts)):
                matrix = encode(ternary, place, "BF16", PROFILES["fast"], settings.threads)
                done.stored_bytes += stored_bytes(matrix)
    done.experts += len(experts)


def measure(case: Case, name: str, settings: Settings) -> dict[str, Any]:
    """Work on groups of experts until the time is up; to be called in a process of its own."""
    most = min(case.experts, settings.experts or case.experts)
    torch.set_num_threads(settings.threads)
    # Compilation and the libraries' own preparations are not what is measured.
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


def line(result: dict[str, Any]) -> str:
    shares = ", ".join(f"{phase} {100 * share:.0f} %" for phase, share in result["shares"].items())
    device = result.get("peak_device_bytes")
    memory = f"{result['peak_resident_bytes'] / 1e9:.2f} GB"
    return (
        f"{result['layer']:14} {result['recipe']:5} {result['experts']:5} experts in "
        f"{result['seconds']:6.1f} s  {result['bits_per_weight']:.3f} bits  "
        f"{result['gparam_per_hour']:8.2f} Gparam/h  1.6 T in {result['hours_for_1.6T']:8.1f} h  "
        f"peak {memory}{f', device {device / 1e9:.2f} GB' if device else ''}  ({shares})"
    )


def save(settings: Settings, results: list[dict[str, Any]]) -> None:
    """Beside what was measured on another device."""
    path = report.RESULTS / "quantize_scale.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, help="of each layer; by default all, time allowing")
    parser.add_argument(
        "--seconds", type=float, default=300, help="for each layer and recipe; then no more begin"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="that an expert is given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try this out")
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
            shape = case if options.shrink == 1 else case.shrunk(options.shrink)
            # A new process, so that its peak of memory is its own.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                results.append(pool.submit(measure, shape, name, settings).result())
            print(line(results[-1]), flush=True)
    print(f"paper: {PAPER['gparam_per_hour']} Gparam/h on {PAPER['hardware']}, {PAPER['hours']} h")
    if options.shrink == 1:
        save(settings, results)


if __name__ == "__main__":
    main()
