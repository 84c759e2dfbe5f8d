"""The steps of ``rd`` for a GPU, run on a CPU: kernels in the simulator, tensors as torch has them.

Rounding differs from the kernels of a CPU in its last bits, so that a level may differ where two
cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from benchmarks import quantize_gpu
from qmoe_format import gpu
from qmoe_format.gpu.launch import Launch
from qmoe_format.quantize import cpu_steps, descent, gpu_steps, rd, solution
from qmoe_format.quantize.grids import FORBIDDEN, Prices
from qmoe_format.quantize.hessian import inverse_factor
from qmoe_format.quantize.padding import BLOCK, GROUP
from qmoe_format.quantize.rate import Rate, weighted_energies
from qmoe_format.quantize.rd import Search, quantize_rd
from tests.gpu import shim
from tests.quantize.problems import Array, array, calibrated, correlated, levels_of, random

pytestmark = shim.needs_compiler

ORDERS = (shim.FORWARD, shim.BACKWARD, 2)
on_gpu = pytest.mark.skipif(
    not (gpu.available() and torch.cuda.is_available()), reason="there is no GPU"
)


@dataclass(frozen=True, slots=True)
class State:
    """A quantization on its way, and what steps need to know of it."""

    weights: Tensor
    hessian: Tensor
    levels: Tensor
    gradient: Tensor
    target: Tensor
    ratio: Tensor
    scale: Tensor
    column_scale: Tensor
    first: Tensor
    further: Tensor
    ternary: Tensor
    order: Tensor
    members: Tensor

    @classmethod
    def of(cls, experts: int = 3, rows: int = 96, columns: int = 192, seed: int = 0) -> State:
        """The second expert is ternary, but levels go up to 2 in all of them."""
        inputs = [correlated(2 * columns, columns, seed + e) for e in range(experts)]
        sums = torch.stack([x.T @ x / x.square().mean(1).sum() for x in inputs])
        hessian = sums + 0.05 * torch.eye(columns)
        weights = random(experts, rows, columns, seed=seed + 50)
        column_scale = random(experts, columns, seed=seed + 51).mul(0.3).exp()
        scale = 0.8 * random(experts, rows, seed=seed + 52).mul(0.2).exp()
        value = scale[:, :, None] * column_scale[:, None]
        levels = (weights / value).round().clamp(-2, 2)
        ternary = torch.arange(experts) == 1
        first = 0.02 * random(experts, rows, seed=seed + 53).exp()
        generator = torch.Generator().manual_seed(seed)
        blocks = columns // BLOCK
        return cls(
            weights=weights,
            hessian=hessian,
            levels=levels.to(torch.int8),
            gradient=(weights - levels * value) @ hessian,
            target=weights @ hessian,
            ratio=torch.ones_like(scale),
            scale=scale,
            column_scale=column_scale,
            first=first,
            further=torch.where(ternary[:, None], FORBIDDEN, 0.7 * first),
            ternary=ternary,
            order=torch.randperm(blocks, generator=generator) * BLOCK,
            members=torch.rand(blocks, BLOCK, generator=generator).argsort(1),
        )

    @property
    def prices(self) -> Prices:
        return Prices(self.first, self.further)

    def clone(self) -> State:
        return State(*(getattr(self, field.name).clone() for field in fields(self)))

    def to(self, device: str) -> State:
        """``order`` and ``members`` stay on the CPU."""
        moved = State(*(getattr(self, field.name).to(device) for field in fields(self)))
        return replace(moved, order=self.order, members=self.members)

    def descend(self, by: Any, scaled: bool = True, summing: bool = True) -> Tensor:
        """``scaled``: by ``ratio``."""
        groups = (self.order[:, None] + self.members).view(-1, GROUP).to(self.hessian.device)
        factors = inverse_factor(self.hessian[:, groups[:, :, None], groups[:, None]])
        sums: Tensor = by.descend(
            self.levels, self.gradient, self.target, self.ratio if scaled else None, self.hessian,
            factors, self.scale, self.column_scale, self.prices, self.ternary, self.order,
            self.members, summing,
        )  # fmt: skip
        return sums if summing else sums[:, :, 2:]

    def round_blocks(self, by: Any) -> tuple[Tensor, Tensor]:
        """Levels and errors of all blocks, each for itself."""
        levels, errors = torch.empty_like(self.levels), torch.empty_like(self.weights)
        factor = inverse_factor(self.hessian)
        for block in range(0, self.weights.shape[2], BLOCK):
            by.round_block(
                self.weights, factor, levels, errors, block, self.scale, self.column_scale,
                self.prices, self.ternary,
            )  # fmt: skip
        return levels, errors

    def quantized(self) -> Array:
        value = array(self.scale)[:, :, None] * array(self.column_scale)[:, None]
        return array(self.levels) * value

    def costs(self) -> Array:
        """Error and price of each row, in float64; levels that are forbidden cost nothing."""
        off = array(self.weights) - self.quantized()
        sizes = np.abs(array(self.levels))
        more = np.where(array(self.further) < FORBIDDEN, array(self.further), 0)
        result: Array = (
            (off * (off @ array(self.hessian))).sum(2)
            + array(self.first) * np.minimum(sizes, 1).sum(2)
            + more * np.maximum(sizes - 1, 0).sum(2)
        )
        return result


def plain(launch: Launch) -> Launch:
    """With arrays of numpy that share the tensors' memory."""
    arguments = (each.numpy() if isinstance(each, Tensor) else each for each in launch.arguments)
    return replace(launch, arguments=tuple(arguments))


def simulate(monkeypatch: pytest.MonkeyPatch, order: int = shim.FORWARD) -> None:
    """Kernels of ``gpu_steps`` run in the simulator, their threads in some order."""
    monkeypatch.setattr(gpu_steps, "_run", lambda launch, _: shim.execute(plain(launch), order))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)


def equal(found: Tensor, expected: Tensor) -> bool:
    """But for a few levels that cost the same: steps between large ones are small."""
    return float((found != expected).double().mean()) < 1e-3


def nearly(found: Tensor, expected: Tensor) -> None:
    size = float(expected.abs().nan_to_num(posinf=0).max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * (1 + size))


def zero_scales(state: State) -> None:
    """Of rows whose levels are not zero, too."""
    state.scale[:, 3:20] = 0


def zero_prices(state: State) -> None:
    for prices in (state.first, state.further):
        prices[prices < FORBIDDEN] = 0


def zero_scales_and_prices(state: State) -> None:
    """0 x infinity. Rows begin with zeros: whatever their levels are, they cost the same."""
    zero_scales(state)
    state.levels[:, 3:20] = 0
    zero_prices(state)


def forbidden_prices(state: State) -> None:
    state.first[:, ::2] = FORBIDDEN
    state.further[:, ::3] = FORBIDDEN


def tiny_scales(state: State) -> None:
    """Levels reach the largest one."""
    state.scale.mul_(1e-3)
    state.first.mul_(1e-6)
    state.further.mul_(1e-6)


def other_ratios(state: State) -> None:
    state.ratio.copy_(torch.linspace(0.3, 2, state.ratio.numel()).view_as(state.ratio))


def no_input(state: State) -> None:
    """As rows and columns that were added."""
    for each in (state.weights, state.target, state.gradient):
        each[:, -8:] = 0
    state.levels[:, -8:] = 0


ODD: dict[str, Callable[[State], None]] = {
    "usual": lambda _: None,
    "zero scales": zero_scales,
    "zero prices": zero_prices,
    "zero scales and prices": zero_scales_and_prices,
    "forbidden prices": forbidden_prices,
    "tiny scales": tiny_scales,
    "ratios": other_ratios,
    "padding": no_input,
}
CASES = [*((odd, shim.FORWARD) for odd in ODD), *(("usual", order) for order in ORDERS[1:])]
all_odd = pytest.mark.parametrize("odd", ODD)
# Experts, rows, columns: less than a block of threads, exactly one, and a part of a second one.
SHAPES = [(1, 32, 64), (2, 64, 128), (2, 96, 320)]


@pytest.mark.parametrize(("odd", "order"), CASES)
def test_gptq_in_a_block(monkeypatch: pytest.MonkeyPatch, odd: str, order: int) -> None:
    simulate(monkeypatch, order)
    for shape in SHAPES:
        state = State.of(*shape)
        ODD[odd](state)
        levels, errors = state.round_blocks(gpu_steps)
        expected = state.round_blocks(cpu_steps)
        assert torch.equal(levels, expected[0])
        nearly(errors, expected[1])
        assert levels.any()
        assert not levels[state.ternary].abs().gt(1).any()
        assert odd != "tiny scales" or levels.abs().amax() == 127


@pytest.mark.parametrize(("odd", "order"), CASES)
def test_descent(monkeypatch: pytest.MonkeyPatch, odd: str, order: int) -> None:
    simulate(monkeypatch, order)
    for shape in SHAPES:
        state = State.of(*shape)
        ODD[odd](state)
        found, expected = state.clone(), state.clone()
        sums, expected_sums = found.descend(gpu_steps), expected.descend(cpu_steps)
        assert equal(found.levels, expected.levels)
        assert not torch.equal(found.levels, state.levels)
        same = (found.levels == expected.levels).all(2)
        nearly(found.gradient[same], expected.gradient[same])
        assert sums.dtype == torch.float64
        nearly(sums[same], expected_sums[same])
        for name in ("target", "hessian", "scale", "column_scale", "ratio"):
            assert torch.equal(getattr(found, name), getattr(state, name))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("summing", [True, False])
def test_without_ratios_or_sums(simulated: None, scaled: bool, summing: bool) -> None:
    state = State.of()
    other_ratios(state)
    found, expected = state.clone(), state.clone()
    nearly(found.descend(gpu_steps, scaled, summing), expected.descend(cpu_steps, scaled, summing))
    assert torch.equal(found.levels, expected.levels)
    nearly(found.gradient, expected.gradient)


@pytest.mark.parametrize("seed", range(6))
def test_the_sum_of_error_and_price_never_rises(simulated: None, seed: int) -> None:
    state = State.of(2, 64, 128, seed)
    state.levels[1].clamp_(-1, 1)
    off = state.weights - torch.from_numpy(state.quantized()).float()
    state.gradient.copy_(off @ state.hessian)
    before = state.costs()
    for _ in range(4):
        state.descend(gpu_steps)
        after = state.costs()
        assert (after <= before + 1e-5 * (1 + np.abs(before))).all()
        before = after
    rest = (array(state.weights) - state.quantized()) @ array(state.hessian)
    np.testing.assert_allclose(array(state.gradient), rest, atol=1e-5 * np.abs(rest).max() + 1e-4)


def test_scales(simulated: None) -> None:
    """The steps without kernels of their own."""
    one = State.of()
    other_ratios(one)
    other, longer = one.clone(), one.first
    results = []
    for state, by in ((one, gpu_steps), (other, cpu_steps)):
        parts = (state.levels, state.scale, state.column_scale, state.target, state.gradient)
        before = by.row_sums(*parts, state.weights, 2 * state.target, state.weights + 1)
        by.aim_at(state.weights, 0.5 * state.weights, longer, state.ratio, *parts[3:])
        middle = [state.target.clone(), state.gradient.clone()]
        by.refit_columns(*parts, state.ratio, state.hessian, 50)
        results.append([before, *middle, state.gradient, state.column_scale])
    for found, expected in zip(*results, strict=True):
        nearly(found, expected)
    assert (one.column_scale != State.of().column_scale).sum() > 100


def test_taking_columns() -> None:
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    state = State.of()
    for matrices in (state.levels, state.target):
        expected = cpu_steps.take_columns(matrices, order)
        assert torch.equal(gpu_steps.take_columns(matrices, order), expected)
    expected = cpu_steps.take_both(state.hessian, order)
    assert torch.equal(gpu_steps.take_both(state.hessian, order), expected)


SEARCH = Search(rounds=8, columns_every=3, reorder_every=4)


def outcome(weights: Tensor, inputs: list[Tensor], device: str = "cpu") -> tuple[Array, float]:
    """Of the recipe: the relative error of each expert, and the share of non-zeros."""
    statistics = calibrated(inputs)
    statistics.sums = statistics.sums.to(device)
    weights = weights.to(device)
    rate = Rate(0.05, float(weighted_energies(weights, statistics).mean()))
    made = levels_of(quantize_rd(weights, statistics, rate, search=SEARCH))
    off = array(weights.cpu()) - array(made.dequantize().cpu())
    sums = array(statistics.sums.cpu())
    lost, all_ = (((each @ sums) * each).sum((1, 2)) for each in (off, array(weights.cpu())))
    return lost / all_, float(made.levels.count_nonzero()) / made.levels.numel()


def test_the_whole_recipe(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a level differs others will; what counts does not."""
    weights, inputs = random(2, 70, 150), [correlated(400, 150, seed) for seed in (1, 2)]
    expected, expected_share = outcome(weights, inputs)
    for module in (rd, solution, descent):
        monkeypatch.setattr(module, "steps_on", lambda _: gpu_steps)
    found, share = outcome(weights, inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert share == pytest.approx(expected_share, rel=1e-3)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values cannot be read; and a round is one product with the Hessian."""
    search = Search(rounds=6, columns_every=3, reorder_every=4)
    costs = quantize_gpu.count(2, 64, 512, search)
    less = quantize_gpu.count(2, 64, 512, replace(search, rounds=5))
    kinds = {kind for kind, seconds in costs.by_kind.items() if seconds}
    assert {"products", "kernel sweep", "kernel gptq_block"} <= kinds
    within = 8 * BLOCK**2  # what the blocks do not pass on
    assert costs.flops - less.flops == 2 * 2 * 64 * (512**2 - within)


RACE = "race: |never written|outside all arrays"
# A kernel, a text in it, its replacement, and the error that is expected.
FAULTS = {
    "gptq, no barrier before": (
        "gptq_block", "__syncthreads();\n    if (mine", "if (mine", RACE
    ),
    "gptq, no barrier after": (
        "gptq_block", "__syncthreads();\n    store_tile", "store_tile", RACE
    ),
    "sweep, no barrier before": (
        "sweep", "__syncthreads();\n    if (mine", "if (mine", RACE
    ),
    "sweep, no barrier after": (
        "sweep", "__syncthreads();\n    store_tile", "store_tile", RACE
    ),
    "rows that are not there": ("sweep", "min(ROWS, rows - from)", "ROWS", RACE),
    "rows of the next expert": ("gptq_block", "min(ROWS, rows - from)", "ROWS", RACE),
    "a group's own factor": ("sweep", "u + group * GROUP", "u", "wrong"),
    "the group's columns": ("sweep", "h[(group + i) * BLOCK + k]", "h[i * BLOCK + k]", "wrong"),
    "later columns": ("gptq_block", "k = group + GROUP", "k = group + GROUP + 1", "wrong"),
    "moves passed on, no barrier": (
        "pass_on", "__syncthreads();\n#pragma", "\n#pragma", RACE
    ),
    "the next moves, no barrier": (
        "pass_on", "__syncthreads();  // the next", "// the next", RACE
    ),
    "rows passed on": ("pass_on", "mine + i >= count", "false", RACE),
    "columns passed on": ("pass_on", "others + blockIdx.z * BLOCK", "others", f"{RACE}|wrong"),
    "levels beyond 1 stay": ("sweep", "|| (row.ternary && beyond)", "", "wrong"),
    "the price of further levels": ("sweep", "(high - low - nonzero)", "(high - low)", "wrong"),
    "no limit": ("sweep", "level < MOST ? level : MOST", "level", "wrong"),
    "not a number": ("sweep", "size * 2.0f > threshold", "!(size * 2.0f <= threshold)", "wrong"),
}  # fmt: skip


def compare() -> None:
    for odd in ("usual", "zero scales and prices", "tiny scales"):
        state = State.of()
        ODD[odd](state)
        found, expected = state.clone(), state.clone()
        found.descend(gpu_steps)
        expected.descend(cpu_steps)
        agree = equal if odd == "tiny scales" else torch.equal
        assert agree(found.levels, expected.levels), "wrong"
        assert agree(state.round_blocks(gpu_steps)[0], state.round_blocks(cpu_steps)[0]), "wrong"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_kernels_are_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    name, old, new, expected = FAULTS[fault]
    kernels = {each: gpu_steps.kernel(each) for each in gpu_steps.THREADS}
    assert kernels[name].source.count(old) == 1
    kernels[name] = replace(kernels[name], source=kernels[name].source.replace(old, new))
    monkeypatch.setattr(gpu_steps, "kernel", kernels.__getitem__)
    simulate(monkeypatch)
    with pytest.raises(AssertionError, match=expected):
        compare()


@pytest.mark.gpu
@on_gpu
class TestDevice:
    """The same on a GPU: ``pytest -m gpu``."""

    @all_odd
    @pytest.mark.parametrize("shape", [*SHAPES, (2, 1040, 1024)])
    def test_kernels(self, odd: str, shape: tuple[int, int, int]) -> None:
        state = State.of(*shape)
        ODD[odd](state)
        there = state.to("cuda")
        levels, errors = there.round_blocks(gpu_steps)
        expected, expected_errors = state.round_blocks(cpu_steps)
        assert equal(levels.cpu(), expected)
        same = (levels.cpu() == expected).all(2)  # where one differs, later ones follow
        nearly(errors.cpu()[same], expected_errors[same])
        sums, expected_sums = there.descend(gpu_steps), state.descend(cpu_steps)
        assert equal(there.levels.cpu(), state.levels)
        same = (there.levels.cpu() == state.levels).all(2)
        nearly(there.gradient.cpu()[same], state.gradient[same])
        nearly(sums.cpu()[same], expected_sums[same])

    def test_the_whole_recipe(self) -> None:
        weights = random(3, 300, 520)
        inputs = [correlated(900, 520, seed) for seed in (1, 2, 3)]
        expected, expected_share = outcome(weights, inputs)
        found, share = outcome(weights, inputs, "cuda")
        np.testing.assert_allclose(found, expected, rtol=0.02)
        assert share == pytest.approx(expected_share, rel=0.02)

    def test_no_round_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the end of GPTQ to the end of descent."""
        start, finished = rd._start, solution.finished

        def started(*arguments: Any) -> Any:
            made = start(*arguments)
            torch.cuda.set_sync_debug_mode("error")
            return made

        def ended(*arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            return finished(*arguments)

        monkeypatch.setattr(rd, "_start", started)
        monkeypatch.setattr(rd, "finished", ended)
        try:
            outcome(random(2, 70, 150), [correlated(400, 150, seed) for seed in (1, 2)], "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
