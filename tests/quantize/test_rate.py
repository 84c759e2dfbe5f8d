"""Prices: energies and the cost of a non-zero."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.rate import nonzero_bits, weighted_energies
from tests.quantize.problems import array, calibrated, correlated, energy, random


def test_bits_of_a_nonzero() -> None:
    """The difference of the code lengths, and a sign."""
    levels = torch.zeros(2, 100, 10)
    levels[0, :20, 5], levels[0, :20, :5] = 1, -1
    levels[1] = 1
    often, always = nonzero_bits(levels)[:, 0].tolist()
    assert often == pytest.approx(math.log2(0.88 / 0.12) + 1, rel=0.01)
    assert always == 0


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
