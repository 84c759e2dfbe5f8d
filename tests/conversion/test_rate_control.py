"""Rate control, with stacks whose sizes are given by a formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from qmoe_format.errors import QMoEError

pytest.importorskip("torch", reason="needs the extra 'convert'")

from qmoe_format.checkpoints import ExpertStack
from qmoe_format.conversion.quantize_block import BlockRecord
from qmoe_format.conversion.rate_control import FixedRate, TargetRate
from qmoe_format.conversion.survey import LAMBDAS, StackSurvey, reference_energy
from qmoe_format.quantize.rate import ABSOLUTE, TRUST, Rate

EXPERTS, ROWS, COLUMNS = 8, 100, 1000
STACKS = [ExpertStack(f"s{i}", "", EXPERTS, ROWS, COLUMNS, "F32") for i in range(4)]
WEIGHTS = 4 * EXPERTS * ROWS * COLUMNS
SPREAD = [-8.0, -2.0, 0.0, 1.0]
SURVEYS = {
    stack.name: StackSurvey(
        tokens=1000,
        energies=[0.0, *(100.0 ** (number - each) for each in range(EXPERTS - 1))],
        spread=SPREAD,
        sizes=[20_000 - 2000.0 * step for step in range(len(LAMBDAS))],
        dictionaries=[[f"{step}"] for step in range(len(LAMBDAS))],
        dictionary_bytes=1.0,
    )
    for number, stack in enumerate(STACKS)
}
RANGE = r"ask for 0\.404 to 1\.623"  # as the surveys have it


def record(name: str, size: int, lam: float = 0.1, dictionary: int = 1) -> BlockRecord:
    return BlockRecord(
        parts={},
        lam=lam,
        quality={},
        stack_bytes={name: size},
        dictionary_bytes={"3": dictionary},
    )


def true_bytes(name: str, rate: Rate, factor: float) -> int:
    """As surveyed but for a factor; a row's size goes with its own price."""

    def step(price: float) -> float:
        return math.log(price / LAMBDAS[0]) / math.log(LAMBDAS[1] / LAMBDAS[0])

    def share(energy: float) -> float:
        return min(max(math.pow(energy, -ABSOLUTE), 1 / TRUST), TRUST)

    lam, total = float(rate.lam), 0.0
    for energy in SURVEYS[name].energies:
        own = (energy or 0.0) / rate.reference or 1.0
        steps = [step(lam * share(own * math.exp(row)) / share(math.exp(row))) for row in SPREAD]
        mean = sum(steps) / len(steps)
        total += 20_000 - 2000 * min(mean, len(LAMBDAS) - 1)
    return round(factor * total)


def convert(control: TargetRate, factors: Sequence[float]) -> tuple[list[float], int, float]:
    """Lambdas of the blocks, one stack each, the most attempts at one, and bits per weight."""
    lams, most, total = [], 0, 1
    for stack, factor in zip(STACKS, factors, strict=True):
        tried = []

        def attempt(rate: Rate | None) -> BlockRecord:
            assert rate
            lam = float(rate.lam)
            tried.append(lam)  # noqa: B023
            return record(stack.name, true_bytes(stack.name, rate, factor), lam)  # noqa: B023

        final = control.quantize(attempt)
        assert final["lam"] == tried[-1]
        lams.append(tried[-1])
        most = max(most, len(tried))
        total += final["stack_bytes"][stack.name]
    return lams, most, 8 * total / WEIGHTS


def test_when_no_attempt_is_close_the_best_is_taken() -> None:
    control = TargetRate(1.2, STACKS, SURVEYS)
    for stack in STACKS[:-1]:
        control.finish(record(stack.name, 110_000, dictionary=0))
    tried: list[float] = []

    def attempt(rate: Rate | None) -> BlockRecord:
        assert rate
        factor = (1.5, 1.1, 0.6, 1.4, 1.1)[len(tried)]
        tried.append(float(rate.lam))
        size = round(factor * (1.2 * WEIGHTS / 8 - 3 * 110_000))
        return record(STACKS[-1].name, size, tried[-1], dictionary=0)

    control.quantize(attempt)
    assert len(tried) == 5
    assert tried[4] == pytest.approx(tried[1])


@pytest.mark.parametrize("asked", [1.05, 1.2, 1.4])
@pytest.mark.parametrize("factors", [[1.0] * 4, [1.1] * 4, [0.9, 1.0, 1.05, 0.95]])
def test_the_size_is_what_was_asked_for(asked: float, factors: list[float]) -> None:
    control = TargetRate(asked, STACKS, SURVEYS)
    lams, attempts, bits = convert(control, factors)
    control.check()
    assert bits == pytest.approx(asked, rel=0.01)
    assert attempts <= 4
    if len(set(factors)) == 1:
        assert max(lams[1:]) < 1.1 * min(lams[1:]), "one lambda once the error is known"


@pytest.mark.parametrize(("asked", "factor"), [(1.4, 0.92), (0.9, 1.15)])
def test_the_first_block_is_done_again_if_it_is_far_off(asked: float, factor: float) -> None:
    lams, attempts, _ = convert(TargetRate(asked, STACKS, SURVEYS), [factor] * 4)
    assert 2 <= attempts <= 4
    assert max(lams) < 1.3 * min(lams)


def test_a_later_block_is_done_again_too() -> None:
    lams, attempts, _ = convert(TargetRate(1.3, STACKS, SURVEYS), [1.0, 1.45, 1.0, 1.0])
    assert 2 <= attempts <= 4
    assert max(lams) < 100 * min(lams)


@pytest.mark.parametrize(("size", "bits"), [(200_000, "2.0000"), (100_000, "1.0000")])
def test_a_size_that_is_missed(size: int, bits: str) -> None:
    control = TargetRate(1.2, STACKS, SURVEYS)
    for stack in STACKS:
        control.finish(record(stack.name, size, dictionary=0))
    with pytest.raises(QMoEError, match=rf"{bits} bits per weight instead of 1\.2; {RANGE}") as e:
        control.check()
    assert e.value.code == "value"


@pytest.mark.parametrize("asked", [0.1, 3.0])
def test_a_size_out_of_reach(asked: float) -> None:
    with pytest.raises(QMoEError, match=RANGE) as caught:
        TargetRate(asked, STACKS, SURVEYS)
    assert caught.value.code == "argument"


@pytest.mark.parametrize("rate", [None, Rate(0.3, 1.0)])
def test_a_fixed_rate(rate: Rate | None) -> None:
    control, seen = FixedRate(rate), []

    def attempt(given: Rate | None) -> BlockRecord:
        seen.append(given)
        return record("s0", 1)

    for _ in range(2):
        control.quantize(attempt)
    assert seen == [rate, rate]
    control.check()


def test_the_reference_is_the_geometric_mean() -> None:
    assert reference_energy(SURVEYS) == pytest.approx(1e-3)


def test_a_matrix_of_zeros_takes_least_at_any_rate() -> None:
    survey = SURVEYS["s0"]
    with_zero = replace(survey, energies=[None, *survey.energies])
    for lam in (1e-5, 0.1):
        rate = Rate(lam, 1.0)
        more = with_zero.expected(rate)[0] - survey.expected(rate)[0]
        assert more == pytest.approx(survey.sizes[-1])
    assert reference_energy({"s0": with_zero}) == reference_energy({"s0": survey})


def test_below_the_least_lambda_measured_sizes_go_on_to_grow() -> None:
    """Many levels at 3 bits get there; three levels, which grow no further, do not shrink."""
    sizes = [900.0 - 100 * step for step in range(len(LAMBDAS))]
    survey = replace(SURVEYS["s0"], energies=[1.0], sizes=sizes)
    expected = [survey.expected(Rate(LAMBDAS[0] / 5**steps, 1.0))[0] for steps in (0, 1, 2)]
    assert np.diff(expected) == pytest.approx([100.0, 100.0])
    full = replace(survey, sizes=[sizes[1], *sizes[1:]])
    assert full.expected(Rate(LAMBDAS[0] / 5, 1.0))[0] == pytest.approx(sizes[1])
