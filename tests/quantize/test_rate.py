"""Prices: energies and the cost of levels."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.codec.segments import encode
from qmoe_format.quantize.grids import FORBIDDEN, Prices
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.rate import level_prices, weighted_energies
from tests.quantize.problems import array, calibrated, code_length, correlated, energy, random


def normal_levels(scale: float, seed: int) -> Tensor:
    """``[1, rows, columns]``."""
    return random(1, 256, 128, seed=seed).mul(scale).round()


def prices_of(levels: Tensor, price: Tensor, ternary: Tensor) -> Prices:
    nonzeros = levels.count_nonzero((1, 2)).double()
    total = levels.abs().sum((1, 2), dtype=torch.float64)
    return level_prices(nonzeros, total, levels[0].numel(), price, ternary)


@pytest.mark.parametrize("scale", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("ternary", [True, False])
def test_prices_are_what_a_file_pays(scale: float, ternary: bool) -> None:
    """Beyond what zeros cost, which is -log2 of their share."""
    levels = normal_levels(scale, seed=1)
    if ternary:
        levels.clamp_(-1, 1)
    bit = torch.linspace(0.5, 2, 256)[None]
    prices = prices_of(levels, bit, torch.tensor([ternary]))
    zeros = float((levels == 0).double().mean())
    found = float((prices.of(levels.mT) / bit).double().mean()) / 128 - math.log2(zeros)
    assert found == pytest.approx(code_length(levels[0]), rel=1e-3)
    matrix = levels[0].to(torch.int8).numpy()
    encoded = encode(matrix, rows_per_segment=256)
    assert (encoded.refinement is None) == ternary
    assert found == pytest.approx(encoded.payload_bits_per_weight, rel=0.03)


def test_what_one_more_level_costs() -> None:
    """The code grows by the price of a few levels more."""
    levels = normal_levels(0.7, seed=2)
    prices = prices_of(levels, torch.ones(1, 256), torch.tensor([False]))
    before, size = code_length(levels), levels.numel()
    for now, then, price in (
        (0, 1, prices.first[0, 0]),
        (1, 2, prices.further[0, 0]),
        (0, -3, prices.first[0, 0] + 2 * prices.further[0, 0]),
    ):
        more = levels.clone()
        some = (more == now).flatten().nonzero()[:20, 0]
        more.view(-1)[some] = then
        assert (code_length(more) - before) * size / 20 == pytest.approx(float(price), rel=0.05)


def test_prices_are_the_experts_own_and_never_negative() -> None:
    levels = torch.cat([normal_levels(0.4, 3), normal_levels(9.0, 4), normal_levels(0.4, 5)])
    price = 1 + torch.arange(3 * 256).view(3, 256) / 100
    ternary = torch.tensor([False, False, True])
    prices = prices_of(levels, price, ternary)
    for expert in range(3):
        one = slice(expert, expert + 1)
        alone = prices_of(levels[one], price[one], ternary[one])
        assert torch.equal(prices.first[one], alone.first)
        assert torch.equal(prices.further[one], alone.further)
    assert not prices.first[1].any(), "to be 0 would cost more"
    assert (prices.first[::2] > 0).all()
    assert (prices.further[:2] > 0).all()
    assert (prices.further[2] == FORBIDDEN).all()


@pytest.mark.parametrize("level", [0, 1, 127])
@pytest.mark.parametrize("ternary", [True, False])
def test_prices_where_all_levels_are_equal(level: int, ternary: bool) -> None:
    levels = torch.full((1, 30, 20), float(level))
    prices = prices_of(levels, torch.ones(1, 30), torch.tensor([ternary]))
    for each in (prices.first, prices.further):
        assert torch.isfinite(each).all()
        assert (each >= 0).all()


def test_weighted_energies() -> None:
    weights, inputs = random(2, 6, 10), [correlated(50, 10, e) for e in range(2)]
    statistics = Statistics.zeros(2, 10, 6)
    for expert, each in enumerate(inputs):
        statistics.add(expert, each)
        statistics.weigh(expert, 1 + random(50, 6, seed=expert).abs())
    sums = array(statistics.sums)
    rho = statistics.row_importance.numpy() / 50
    expected = energy(array(weights), sums) / 10 * rho
    result = weighted_energies(weights, statistics)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_weighted_energies_of_huge_and_tiny_numbers(factor: float) -> None:
    weights, inputs = random(1, 6, 10), correlated(50, 10).double()
    statistics = calibrated([inputs], torch.float64)
    usual = float(weighted_energies(weights, statistics).mean())
    scaled = float(weighted_energies(weights * factor, statistics).mean())
    assert scaled / factor**2 == pytest.approx(usual, rel=1e-4)
    huge = calibrated([inputs * factor], torch.float64)
    scaled = float(weighted_energies(weights, huge).mean())
    assert scaled / factor**2 == pytest.approx(usual, rel=1e-4)
