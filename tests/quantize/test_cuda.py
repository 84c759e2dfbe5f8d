"""The recipes on a GPU against the same on the CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize import RECIPES, recipe
from qmoe_format.quantize.hessian import Statistics, relative_error
from qmoe_format.quantize.level_weights import LevelWeights, Quantized
from qmoe_format.quantize.rate import Rate
from tests.quantize.problems import correlated, random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
EXPERTS, ROWS, COLUMNS = 3, 48, 96


def statistics_on(device: str) -> Statistics:
    statistics = Statistics.zeros(EXPERTS, COLUMNS, device=device)
    for expert in range(EXPERTS - 1):  # the last has no tokens
        statistics.add(expert, correlated(400, COLUMNS, seed=9 * expert).to(device))
        statistics.weigh(expert, torch.ones(400, 1, device=device))
    return statistics


def decisions(result: Quantized) -> Tensor:
    """Levels or codes."""
    weights = result.weights
    return weights.levels if isinstance(weights, LevelWeights) else weights.codes


@pytest.mark.parametrize("name", RECIPES)
def test_as_good_as_on_the_cpu(name: str) -> None:
    """Products round in another order, so a few levels near a threshold may differ."""
    weights = random(EXPERTS, ROWS, COLUMNS)
    rate, rated = Rate(0.03, 300.0), recipe(name).rated
    ours = recipe(name).quantize(weights.to(DEVICE), statistics_on(DEVICE), rate)
    wanted = recipe(name).quantize(weights, statistics_on("cpu"), rate)
    assert decisions(ours).device.type == DEVICE
    fallback = "no tokens" if recipe(name).calibrated else None
    assert ours.fallback == wanted.fallback == [None, None, fallback]
    same = (decisions(ours).cpu() == decisions(wanted)).double().mean()
    assert same > (0.9 if rated else 0.999)
    sums = statistics_on("cpu").sums[:-1]
    found, expected = (
        relative_error(weights[:-1], each.weights.dequantize().cpu()[:-1], sums)
        for each in (ours, wanted)
    )
    torch.testing.assert_close(found, expected, rtol=0.1 if rated else 0.02, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_other_experts_do_not_matter(name: str) -> None:
    weights = random(EXPERTS, ROWS, COLUMNS).to(DEVICE)
    statistics = statistics_on(DEVICE)
    rate = Rate(0.03, 300.0)
    together = recipe(name).quantize(weights, statistics, rate).weights.dequantize()
    for expert in range(EXPERTS):
        one = slice(expert, expert + 1)
        alone = recipe(name).quantize(weights[one], statistics.of(one), rate).weights
        assert torch.equal(alone.dequantize(), together[one])
