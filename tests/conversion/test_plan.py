"""Rate control, with stacks whose sizes are given by a formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from qmoe_format.errors import QMoEError

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.checkpoints import ExpertStack
from qmoe_format.conversion.block_experts import Layer, Weights
from qmoe_format.conversion.options import Target
from qmoe_format.conversion.rate_control import DEFAULT_LAMBDA, PRICES, RateControl, StackPlan
from qmoe_format.quantize.rd import ABSOLUTE, TRUST, weighted_energies
from tests.conversion.conftest import Convert

EXPERTS, ROWS, COLUMNS = 8, 100, 1000
STACKS = [ExpertStack(f"s{i}", "s", str(i), "", EXPERTS, ROWS, COLUMNS, "F32") for i in range(4)]
SPREAD = [-8.0, -2.0, 0.0, 1.0]
PLANS = {
    stack.name: StackPlan(
        energies=[0.0, *(100.0 ** (number - each) for each in range(EXPERTS - 1))],
        spread=SPREAD,
        bytes=[20_000 - 2000.0 * step for step in range(len(PRICES))],
        places=[8.0 * step for step in range(len(PRICES))],
        dictionary=1.0,
    )
    for number, stack in enumerate(STACKS)
}
RANGE = r"ask for 0\.491 to 1\.506"  # as the plans have it


def true_bytes(control: RateControl, name: str, value: float, off: float) -> int:
    """As planned but for a factor; a row's size goes with its own price."""

    def step(price: float) -> float:
        return math.log(price / PRICES[0]) / math.log(PRICES[1] / PRICES[0])

    def share(energy: float) -> float:
        return min(max(math.pow(energy, -ABSOLUTE), 1 / TRUST), TRUST)

    total = 0.0
    for energy in PLANS[name]["energies"]:
        own = energy / control.reference or 1.0
        steps = [step(value * share(own * math.exp(row)) / share(math.exp(row))) for row in SPREAD]
        mean = sum(steps) / len(steps)
        total += 20_000 - 2000 * min(max(mean, 0), len(PRICES) - 1)
    return round(off * total)


def convert(control: RateControl, offs: list[float]) -> tuple[list[float], int]:
    """Lambdas of the blocks, one stack each, and the most attempts at one."""
    values, most = [], 1
    for stack, off in zip(STACKS, offs, strict=True):
        value = control.choose()
        stored = {stack.name: true_bytes(control, stack.name, value, off)}
        attempts = 1
        while better := control.again(value, stored, {"3": 1}):
            value = better
            stored = {stack.name: true_bytes(control, stack.name, value, off)}
            attempts += 1
        control.finish(value, stored, {"3": 1})
        values.append(value)
        most = max(most, attempts)
    return values, most


def test_when_no_attempt_is_close_the_best_is_taken() -> None:
    control = RateControl(Target(bits=1.2), STACKS, PLANS)
    for stack in STACKS[:-1]:
        value = control.choose()
        control.finish(value, {stack.name: true_bytes(control, stack.name, value, 1.0)}, {})
    name = STACKS[-1].name
    wanted = 1.2 * control._weights / 8 - control._total()
    tried, value = [], control.choose()
    for factor in (1.5, 1.1, 0.6, 1.4, 1.1):
        tried.append(value)
        better = control.again(value, {name: round(factor * wanted)}, {})
        if better is None:
            break
        value = better
    assert better is None
    assert len(tried) == 5
    assert value == pytest.approx(tried[1])


@pytest.mark.parametrize("asked", [1.05, 1.2, 1.4])
@pytest.mark.parametrize(
    "offs", [[1.0, 1.0, 1.0, 1.0], [1.1, 1.1, 1.1, 1.1], [0.9, 1.0, 1.05, 0.95]]
)
def test_the_size_is_what_was_asked_for(asked: float, offs: list[float]) -> None:
    control = RateControl(Target(bits=asked), STACKS, PLANS)
    values, attempts = convert(control, offs)
    control.check()
    assert control.bits == pytest.approx(asked, rel=0.01)
    assert attempts <= 4
    if len(set(offs)) == 1:
        assert max(values[1:]) < 1.1 * min(values[1:]), "one lambda once the error is known"


@pytest.mark.parametrize(("asked", "off"), [(1.4, 0.92), (0.9, 1.15)])
def test_the_first_block_is_done_again_if_it_is_far_off(asked: float, off: float) -> None:
    values, attempts = convert(RateControl(Target(bits=asked), STACKS, PLANS), [off] * 4)
    assert 2 <= attempts <= 4
    assert max(values) < 1.3 * min(values)


def test_a_later_block_is_done_again_too() -> None:
    values, attempts = convert(RateControl(Target(bits=1.3), STACKS, PLANS), [1.0, 1.45, 1.0, 1.0])
    assert 2 <= attempts <= 4
    assert max(values) < 50 * min(values)


@pytest.mark.parametrize(("size", "bits"), [(200_000, "2.0000"), (100_000, "1.0000")])
def test_a_size_that_is_missed(size: int, bits: str) -> None:
    control = RateControl(Target(bits=1.2), STACKS, PLANS)
    for stack in STACKS:
        control.finish(control.choose(), {stack.name: size}, {})
    with pytest.raises(QMoEError, match=rf"{bits} bits per weight, 1\.2 .* {RANGE}") as e:
        control.check()
    assert e.value.code == "value"


@pytest.mark.parametrize("asked", [0.1, 3.0])
def test_a_size_out_of_reach(asked: float) -> None:
    with pytest.raises(QMoEError, match=RANGE) as caught:
        RateControl(Target(bits=asked), STACKS, PLANS)
    assert caught.value.code == "argument"


@pytest.mark.parametrize("lam", [None, 0.3])
def test_a_given_lambda(lam: float | None) -> None:
    control = RateControl(Target(lam=lam), STACKS, PLANS)
    values, attempts = convert(control, [1.0, 2.0, 3.0, 4.0])
    assert set(values) == {lam or DEFAULT_LAMBDA}
    assert attempts == 1
    control.check()


def test_the_reference_is_the_geometric_mean() -> None:
    control = RateControl(Target(), STACKS, PLANS)
    assert control.reference == pytest.approx(1e-3)


def test_energies_are_those_of_the_hessians(
    model: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    energies, seen = Layer.energies, []

    def compared(self: Layer, weights: Weights, experts: Sequence[int]) -> dict[str, Tensor]:
        found = energies(self, weights, experts)
        for matrix, statistics in self.statistics(weights, experts).items():
            expected = weighted_energies(weights[matrix], statistics)
            torch.testing.assert_close(found[matrix], expected, rtol=1e-4, atol=0)
            seen.append(matrix)
        return found

    monkeypatch.setattr(Layer, "energies", compared)
    converted(model, bits_per_weight=1.5)
    assert set(seen) in ({"wi", "wo"}, {"w1", "w2", "w3"})
