"""The recipes on a GPU against the same on the CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.quantize import recipe
from qmoe_format.quantize.hessian import Statistics, relative_error
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


@pytest.mark.parametrize("name", ["qmoe", "rd"])
def test_as_good_as_on_the_cpu(name: str) -> None:
    """Products round in another order, so a few levels near a threshold may differ."""
    weights = random(EXPERTS, ROWS, COLUMNS)
    rate = Rate(0.03, 300.0)
    ours = recipe(name).quantize(weights.to(DEVICE), "BF16", statistics_on(DEVICE), rate)
    wanted = recipe(name).quantize(weights, "BF16", statistics_on("cpu"), rate)
    assert ours.weights.levels.device.type == DEVICE
    assert ours.fallback == wanted.fallback == [None, None, "no tokens"]
    same = (ours.weights.levels.cpu() == wanted.weights.levels).double().mean()
    assert same > (0.999 if name == "qmoe" else 0.9)
    sums = statistics_on("cpu").sums[:-1]
    found, expected = (
        relative_error(weights[:-1], each.weights.dequantize().cpu()[:-1], sums)
        for each in (ours, wanted)
    )
    torch.testing.assert_close(found, expected, rtol=0.02 if name == "qmoe" else 0.1, atol=0)


@pytest.mark.parametrize("name", ["qmoe", "rd"])
def test_the_other_experts_do_not_matter(name: str) -> None:
    weights = random(EXPERTS, ROWS, COLUMNS).to(DEVICE)
    statistics = statistics_on(DEVICE)
    rate = Rate(0.03, 300.0)
    together = recipe(name).quantize(weights, "BF16", statistics, rate).weights.levels
    for expert in range(EXPERTS):
        one = slice(expert, expert + 1)
        alone = recipe(name).quantize(weights[one], "BF16", statistics.of(one), rate).weights
        assert torch.equal(alone.levels, together[one])
