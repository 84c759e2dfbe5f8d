"""Descent: the sum of error and price never rises, and the gradient stays what it is."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize.descent import descend
from qmoe_format.quantize.gptq import GROUP
from qmoe_format.quantize.grids import FORBIDDEN, MOST, Prices
from tests.quantize.problems import Array, Batch, array


def ternary(price: Tensor) -> Prices:
    return Prices(price, torch.full_like(price, FORBIDDEN))


def sweep(batch: Batch, prices: Prices) -> tuple[Tensor, Tensor]:
    levels, gradient = batch.levels.clone(), batch.gradient
    descend(levels, gradient, batch.hessian, batch.scale, batch.column_scale, prices)
    return levels, gradient


def cost(batch: Batch, levels: Tensor, prices: Prices) -> Array:
    """Of each row, in float64."""
    sizes = np.abs(array(levels))
    first, beyond = np.minimum(sizes, 1).sum(1), np.maximum(sizes - 1, 0).sum(1)
    errors = batch.errors(levels, batch.scale, batch.column_scale)
    result: Array = errors + array(prices.first) * first + array(prices.further) * beyond
    return result


def check(batch: Batch, levels: Tensor, gradient: Tensor, prices: Prices) -> None:
    assert torch.equal(levels, levels.round())
    before, after = cost(batch, batch.levels, prices), cost(batch, levels, prices)
    assert (after <= before + 1e-5 * (1 + np.abs(before))).all()
    value = array(batch.scale)[:, None] * array(batch.column_scale)[:, :, None]
    off = array(batch.weights) - array(levels) * value
    expected = array(batch.hessian) @ off
    np.testing.assert_allclose(
        array(gradient), expected, atol=2e-5 * (1 + np.abs(array(batch.target)).max())
    )


@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 20),
    columns=st.integers(1, 8 * GROUP + 5),
    price=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]),
    further=st.sampled_from([0.0, 0.3, 1.0, 4.0, None]),
    start=st.sampled_from(["rounded", "zero", "wild"]),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=40)
def test_the_sum_never_rises(
    experts: int,
    rows: int,
    columns: int,
    price: float,
    further: float | None,
    start: str,
    seed: int,
) -> None:
    """``further``: the price of a further level, in that of the first; None: there is none."""
    most = 1 if further is None else 3
    batch = Batch.of(experts, rows, columns, seed, most)
    if start == "zero":
        batch.levels.zero_()
    elif start == "wild":
        generator = torch.Generator().manual_seed(seed)
        batch.levels.copy_(torch.randint(-most, most + 1, batch.levels.shape, generator=generator))
    first = price * batch.scale
    prices = ternary(first) if further is None else Prices(first, further * first)
    levels, gradient = sweep(batch, prices)
    check(batch, levels, gradient, prices)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("columns", [GROUP - 1, GROUP, GROUP + 1, 4 * GROUP, 9 * GROUP + 1])
def test_it_lowers_the_error_by_much(columns: int, most: int) -> None:
    batch = Batch.of(2, 30, columns, seed=columns, most=most)
    nothing = torch.zeros_like(batch.scale)
    free = Prices(nothing, nothing) if most > 1 else ternary(nothing)
    levels, gradient = sweep(batch, free)
    check(batch, levels, gradient, free)
    assert cost(batch, levels, free).sum() < 0.8 * cost(batch, batch.levels, free).sum()


@pytest.mark.parametrize("most", [1, 4])
def test_many_sweeps_settle(most: int) -> None:
    batch = Batch.of(2, 12, 80, seed=1, most=most)
    price = 0.05 * batch.scale / most
    prices = Prices(price, price) if most > 1 else ternary(price)
    levels, gradient = batch.levels.clone(), batch.gradient
    costs = [cost(batch, levels, prices)]
    for _ in range(20):
        descend(levels, gradient, batch.hessian, batch.scale, batch.column_scale, prices)
        costs.append(cost(batch, levels, prices))
        assert (costs[-1] <= costs[-2] + 1e-4).all()
    check(batch, levels, gradient, prices)
    settled = levels.clone()
    descend(levels, gradient, batch.hessian, batch.scale, batch.column_scale, prices)
    assert torch.equal(levels, settled)


def test_huge_prices() -> None:
    """Of any level: nothing is left. Of further ones: only three levels are."""
    batch = Batch.of(2, 9, 90, seed=2, most=4)
    price = torch.full_like(batch.scale, 1e9)
    levels, gradient = sweep(batch, Prices(price, 0 * price))
    assert not levels.any()
    torch.testing.assert_close(gradient, batch.target, rtol=1e-4, atol=1e-3)
    levels, gradient = sweep(batch, Prices(0 * price, price))
    assert levels.abs().amax() == 1
    check(batch, levels, gradient, Prices(0 * price, price))


def test_a_huge_price_of_one_row_is_its_own() -> None:
    batch = Batch.of(1, 9, 90, seed=3)
    price = 0.01 * batch.scale
    usual, _ = sweep(batch, ternary(price))
    price[0, 4] = 1e9
    levels, _ = sweep(batch, ternary(price))
    assert not levels[0, :, 4].any()
    others = torch.arange(9) != 4
    assert torch.equal(levels[:, :, others], usual[:, :, others])


@pytest.mark.parametrize("most", [1, 5])
def test_without_correlation_every_number_is_the_best(most: int) -> None:
    batch = Batch.of(1, 15, 75, seed=4, most=most)
    batch.hessian.copy_(torch.diag_embed(torch.linspace(0.2, 3, 75)[None]))
    price = 0.3 * batch.scale / most
    levels, _ = sweep(batch, Prices(price, price) if most > 1 else ternary(price))
    w, value = (
        array(batch.weights),
        array(batch.scale[:, None] * batch.column_scale[..., None]),
    )
    h = np.linspace(0.2, 3, 75)[:, None]
    every = range(-MOST, MOST + 1) if most > 1 else range(-1, 2)
    costs = np.stack([h * (w - t * value) ** 2 + abs(t) * array(price) for t in every])
    np.testing.assert_array_equal(array(levels), costs.argmin(0) - every.stop + 1)
    assert np.abs(array(levels)).max() >= most


def test_from_the_best_of_all_it_does_not_move() -> None:
    for seed, most in itertools.product(range(5), (1, 2)):
        batch = Batch.of(1, 1, 5, seed, most)
        price = 0.1 * batch.scale
        prices = Prices(price, price / 2) if most > 1 else ternary(price)
        most = 6 if most > 1 else 1
        choices = torch.cartesian_prod(*[torch.arange(-most, most + 1.0)] * 5)
        costs = cost(batch, choices.T[None], prices)[0]
        best = choices[costs.argmin()][None, :, None]
        batch.levels.copy_(best)
        levels, _ = sweep(batch, prices)
        assert torch.equal(levels, best)


def test_experts_do_not_matter_to_each_other() -> None:
    # Each expert's matrices fill whole cache lines, see ``conversion.parallel.batches``.
    batch = Batch.of(3, 12, 84, seed=5, most=3)
    price = 0.1 * batch.scale / 3
    levels, gradient = sweep(batch, Prices(price, price))
    for expert in range(3):
        one = slice(expert, expert + 1)
        alone, own = batch.levels[one].clone(), batch.gradient[one].clone()
        descend(
            alone,
            own,
            batch.hessian[one].clone(),
            batch.scale[one].clone(),
            batch.column_scale[one].clone(),
            Prices(price[one].clone(), price[one].clone()),
        )
        assert torch.equal(alone, levels[one])
        assert torch.equal(own, gradient[one])
