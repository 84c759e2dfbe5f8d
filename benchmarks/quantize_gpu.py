"""The recipe rd on a GPU: measured, and estimated from what it asks a GPU to do.

    python -m benchmarks.quantize_gpu [--estimate-only]

Writes benchmarks/results/quantize_gpu.json, keeping what was measured before if there is no GPU.

Measured, in about two minutes: matrices of quantize_scale's layer of large experts, several at a
time, with products in float32 and in TF32, each in a process of its own: weights per hour, peak
memory, relative error, and the share of levels that TF32 makes different.

Estimated: the recipe runs on torch's device "meta", where tensors have no values, and every
operation is counted that would be launched. Each takes the longest of a launch, of its bytes and of
its operations, one after the other, at the figures below. This is no measurement: kernels that wait
for memory, allocations and a host that is slower than LAUNCH_S are not in it. It also shows that
nothing waits for the device, since a tensor without values cannot be read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import report
from benchmarks.quantize_scale import (
    CASES,
    LAMBDA,
    Done,
    Settings,
    random_weights,
    sums_of_inputs,
)
from qmoe_format.gpu.launch import Launch
from qmoe_format.quantize import gpu_steps, rd
from qmoe_format.quantize.hessian import Factored, Statistics, inverse_factor, relative_error
from qmoe_format.quantize.level_weights import LevelWeights
from qmoe_format.quantize.padding import BLOCK
from qmoe_format.quantize.rate import Rate, weighted_energies
from qmoe_format.quantize.rd import Search, quantize_rd
from qmoe_format.quantize.solution import Problem

SHAPES = ((2048, 7168), (7168, 2048))
BATCHES = (1, 4, 16)
TOKENS = 8192

# An H100 SXM, and what is assumed of it.
TF32_FLOPS = 400e12  # dense
FP32_FLOPS = 60e12
UTILIZATION = 0.5  # of both, in products
TRIANGULAR_FLOPS = 10e12  # Cholesky factors and triangular systems
BYTES_PER_S = 3.35e12
LAUNCH_S = 5e-6
CLOCK_HZ = 1.7e9
MULTIPROCESSORS = 132
RESIDENT = 4  # blocks of 64 threads on a multiprocessor; registers allow no more
# A thread's instructions in a block of 64 columns, counted by hand, where half of the columns have
# a move in some row of a warp; and how long each takes, since there are few warps to choose from.
INSTRUCTIONS = {"sweep": 12_500, "gptq_block": 9_500}
CYCLES = 4.0

Sizes = tuple[int, ...]
# Operations from the shapes of the last two operands.
PRODUCTS: dict[str, Callable[[Sizes, Sizes], float]] = {
    **dict.fromkeys(("mm", "bmm", "addmm_", "baddbmm_"), lambda a, b: 2.0 * math.prod(a) * b[-1]),
    "linalg_solve_triangular": lambda a, b: 1.0 * math.prod(b) * a[-1],
}
SOME = {"index", "index_select", "index_copy_"}  # do not read all of an operand
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}


@dataclass(slots=True)
class Costs:
    """What a number of launches takes.

    Attributes:
        flops: of products, and of triangular matrices.
        seconds: with TF32, and with float32.
        by_kind: seconds with TF32.
    """

    launches: int = 0
    flops: float = 0.0
    triangular: float = 0.0
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"tf32": 0.0, "fp32": 0.0})
    by_kind: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, moved: int, flops: float = 0.0, other: float = 0.0) -> None:
        """A launch; ``other``: seconds that it takes at least."""
        self.launches += 1
        self.flops += flops
        self.bytes += moved
        least = max(LAUNCH_S, moved / BYTES_PER_S, other)
        for name, rate in (("tf32", TF32_FLOPS), ("fp32", FP32_FLOPS)):
            self.seconds[name] += max(least, flops / (UTILIZATION * rate))
        taken = max(least, flops / (UTILIZATION * TF32_FLOPS))
        self.by_kind[kind] = self.by_kind.get(kind, 0.0) + taken


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch would launch, and the kernels of ``gpu_steps``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs = Costs()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        view = any(
            each.alias_info and not each.alias_info.is_write for each in func._schema.returns
        )
        if view or name in FREE or not any(each.is_meta for each in (*given, *made)):
            return result
        if name in SOME:  # as much is read as is written
            given = made = [given[-1]] if name == "index_copy_" else made
        elif func._overloadname == "out":
            made = []  # among the arguments
        moved = sum(each.numel() * each.itemsize for each in (*given, *made))
        if name == "linalg_cholesky_ex":
            flops = math.prod(given[0].shape) * given[0].shape[-1] / 3
            self._triangular(moved, flops)
        elif name == "linalg_solve_triangular":
            self._triangular(moved, PRODUCTS[name](given[-2].shape, given[-1].shape))
        elif name in PRODUCTS:
            self.costs.add("products", moved, PRODUCTS[name](given[-2].shape, given[-1].shape))
        else:
            self.costs.add("elementwise, sums, reordering", moved)
        return result

    def _triangular(self, moved: int, flops: float) -> None:
        self.costs.triangular += flops
        self.costs.add("factors", moved, other=flops / TRIANGULAR_FLOPS)

    def launch(self, launch: Launch, _: torch.device) -> None:
        name, rows = launch.kernel.name, math.prod(launch.grid) * gpu_steps.ROWS
        if name == "pass_on":
            width = int(launch.arguments[6])
            flops = 2.0 * rows * BLOCK * width
            taken = flops / (UTILIZATION * FP32_FLOPS)
            self.costs.flops += flops
            self.costs.add("kernel pass_on", 4 * rows * (2 * BLOCK + width), other=taken)
            return
        waves = math.ceil(math.prod(launch.grid) / (MULTIPROCESSORS * RESIDENT))
        cycles = waves * INSTRUCTIONS[name] * CYCLES
        self.costs.add(f"kernel {name}", 14 * rows * BLOCK, other=cycles / CLOCK_HZ)


@contextmanager
def without_values(experts: int, rows: int, columns: int) -> Iterator[None]:
    """The recipe without what depends on values on the host, before and after its rounds."""
    square = torch.empty(experts, columns, columns, device="meta")

    def factored(*_: object) -> Factored:
        factor = torch.stack([inverse_factor(each, check=False) for each in square])
        return Factored(square, factor, torch.ones(experts).double(), [0.1] * experts, [None])

    class WithLargest(Problem):
        @classmethod
        def of(cls, *arguments: Any) -> Problem:
            problem = Problem.of(*arguments)
            problem.largest = torch.ones(experts, dtype=torch.float64)
            return problem

    prices = torch.empty(experts, rows, device="meta")
    with (
        patch.object(rd, "check_weights", lambda _: None),
        patch.object(rd, "factored", factored),
        patch.object(rd, "row_prices", lambda *_: prices),
        patch.object(rd, "finished", lambda *_: None),
        patch.object(rd, "Problem", WithLargest),
    ):
        yield


def count(experts: int, rows: int, columns: int, search: Search | None = None) -> Costs:
    """The launches of a batch; rows are a multiple of 32, columns of 64.

    Raises:
        RuntimeError: the host asks for a value of the device.
    """
    weights = torch.empty(experts, rows, columns, device="meta")
    statistics = Statistics.zeros(experts, 1)
    counting = Counting()
    kernels = patch.object(gpu_steps, "_run", counting.launch)
    with without_values(experts, rows, columns), kernels, counting:
        quantize_rd(weights, statistics, Rate(LAMBDA, 1.0), search=search or Search())
    return counting.costs


def estimate(experts: int, rows: int, columns: int) -> dict[str, Any]:
    costs = count(experts, rows, columns)
    weights = experts * rows * columns
    total = sum(costs.by_kind.values())
    return {
        "experts": experts,
        "rows": rows,
        "columns": columns,
        "launches": costs.launches,
        "product_tflop": costs.flops / 1e12,
        "triangular_tflop": costs.triangular / 1e12,
        "gigabytes": costs.bytes / 1e9,
        "seconds": costs.seconds,
        "gparam_per_hour": {
            name: weights / seconds * 3600 / 1e9 for name, seconds in costs.seconds.items()
        },
        "shares_with_tf32": {
            kind: round(seconds / total, 3) for kind, seconds in sorted(costs.by_kind.items())
        },
    }


def estimates() -> dict[str, Any]:
    return {
        "what": "an ESTIMATE from counted operations; no GPU has run this",
        "assumptions": {
            "tf32_flops": TF32_FLOPS,
            "fp32_flops": FP32_FLOPS,
            "utilization": UTILIZATION,
            "triangular_flops": TRIANGULAR_FLOPS,
            "bytes_per_s": BYTES_PER_S,
            "launch_s": LAUNCH_S,
            "clock_hz": CLOCK_HZ,
            "multiprocessors": MULTIPROCESSORS,
            "resident_blocks": RESIDENT,
            "instructions": INSTRUCTIONS,
            "cycles_per_instruction": CYCLES,
            "left_out": "Hessians from tokens, coding, allocations, the host",
        },
        "results": [estimate(batch, *shape) for shape in SHAPES for batch in BATCHES],
    }


def measure(experts: int, rows: int, columns: int) -> dict[str, Any]:
    """A batch on the GPU, in float32 and in TF32, after one in small for compilation."""
    device = "cuda"
    settings = Settings(None, 0, TOKENS, device, 1)
    found: dict[str, Any] = {"experts": experts, "rows": rows, "columns": columns}
    levels = {}
    for name in ("warm-up", "fp32", "tf32"):
        shape = (64, 128) if name == "warm-up" else (rows, columns)
        weights = random_weights(range(experts), *shape, device)
        statistics = sums_of_inputs(range(experts), shape[1], settings, Done())
        rate = Rate(LAMBDA, float(weighted_energies(weights, statistics).mean()))
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.cuda.synchronize()
        begin = time.perf_counter()
        quantized = quantize_rd(weights, statistics, rate).weights
        assert isinstance(quantized, LevelWeights)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        torch.backends.cuda.matmul.allow_tf32 = False
        if name == "warm-up":
            continue
        levels[name] = quantized.levels.cpu()
        errors = relative_error(weights, quantized.dequantize().float(), statistics.sums)
        found[name] = {
            "seconds": seconds,
            "gparam_per_hour": weights.numel() / seconds * 3600 / 1e9,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "relative_error": float(errors.mean()),
            "nonzeros": float(levels[name].count_nonzero()) / weights.numel(),
        }
    differ = (levels["fp32"] != levels["tf32"]).count_nonzero()
    found["levels_that_differ"] = float(differ) / levels["fp32"].numel()
    return found


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--estimate-only", action="store_true")
    options = parser.parse_args()
    figures = report.load("quantize_gpu")
    figures.pop("machine", None)
    if torch.cuda.is_available() and not options.estimate_only:
        shape = CASES[1].shapes["w1"]
        results = []
        for batch in BATCHES:
            results.append(report.in_new_process(measure, batch, *shape))
            print(results[-1], flush=True)
        figures["measured"] = {"device": torch.cuda.get_device_name(), "results": results}
    elif not options.estimate_only:
        print("There is no GPU, or torch is a build for CPUs: nothing is measured.")
    figures["estimated"] = estimates()
    for each in figures["estimated"]["results"]:
        speed = each["gparam_per_hour"]
        print(
            f"ESTIMATE: {each['experts']} x {each['rows']} x {each['columns']}: "
            f"{speed['tf32']:.0f} Gparam/h with TF32, {speed['fp32']:.0f} without, "
            f"{each['launches']} launches, {each['product_tflop']:.0f} TFLOP, "
            f"{each['gigabytes']:.0f} GB; {each['shares_with_tf32']}"
        )
    report.save("quantize_gpu", figures)


if __name__ == "__main__":
    main()
