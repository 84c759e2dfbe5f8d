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
from tests.quantize.problems import Array, Batch, array


def sweep(batch: Batch, price: Tensor) -> tuple[Tensor, Tensor]:
    levels, gradient = batch.levels.clone(), batch.gradient
    descend(levels, gradient, batch.hessian, batch.scale, batch.column_scale, price)
    return levels, gradient


def cost(batch: Batch, levels: Tensor, price: Tensor) -> Array:
    """Of each row, in float64."""
    errors = batch.errors(levels, batch.scale, batch.column_scale)
    result: Array = errors + array(price) * np.abs(array(levels)).sum(1)
    return result


def check(batch: Batch, levels: Tensor, gradient: Tensor, price: Tensor) -> None:
    assert torch.isin(levels, torch.tensor([-1.0, 0.0, 1.0])).all()
    before, after = cost(batch, batch.levels, price), cost(batch, levels, price)
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
    start=st.sampled_from(["rounded", "zero", "wild"]),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=40)
def test_the_sum_never_rises(
    experts: int, rows: int, columns: int, price: float, start: str, seed: int
) -> None:
    batch = Batch.of(experts, rows, columns, seed)
    if start == "zero":
        batch.levels.zero_()
    elif start == "wild":
        generator = torch.Generator().manual_seed(seed)
        batch.levels.copy_(torch.randint(-1, 2, batch.levels.shape, generator=generator))
    prices = price * batch.scale
    levels, gradient = sweep(batch, prices)
    check(batch, levels, gradient, prices)


@pytest.mark.parametrize("columns", [GROUP - 1, GROUP, GROUP + 1, 4 * GROUP, 9 * GROUP + 1])
def test_it_lowers_the_error_by_much(columns: int) -> None:
    batch = Batch.of(2, 30, columns, seed=columns)
    free = torch.zeros_like(batch.scale)
    levels, gradient = sweep(batch, free)
    check(batch, levels, gradient, free)
    assert cost(batch, levels, free).sum() < 0.8 * cost(batch, batch.levels, free).sum()


def test_many_sweeps_settle() -> None:
    batch = Batch.of(2, 12, 80, seed=1)
    price = 0.05 * batch.scale
    levels, gradient = batch.levels.clone(), batch.gradient
    costs = [cost(batch, levels, price)]
    for _ in range(20):
        descend(levels, gradient, batch.hessian, batch.scale, batch.column_scale, price)
        costs.append(cost(batch, levels, price))
        assert (costs[-1] <= costs[-2] + 1e-4).all()
    check(batch, levels, gradient, price)
    settled = levels.clone()
    descend(levels, gradient, batch.hessian, batch.scale, batch.column_scale, price)
    assert torch.equal(levels, settled)


def test_a_huge_price_leaves_nothing() -> None:
    batch = Batch.of(2, 9, 90, seed=2)
    price = torch.full_like(batch.scale, 1e9)
    levels, gradient = sweep(batch, price)
    assert not levels.any()
    torch.testing.assert_close(gradient, batch.target, rtol=1e-4, atol=1e-3)


def test_a_huge_price_of_one_row_is_its_own() -> None:
    batch = Batch.of(1, 9, 90, seed=3)
    price = 0.01 * batch.scale
    usual, _ = sweep(batch, price)
    price[0, 4] = 1e9
    levels, _ = sweep(batch, price)
    assert not levels[0, :, 4].any()
    others = torch.arange(9) != 4
    assert torch.equal(levels[:, :, others], usual[:, :, others])


def test_without_correlation_every_number_is_the_best() -> None:
    batch = Batch.of(1, 15, 75, seed=4)
    batch.hessian.copy_(torch.diag_embed(torch.linspace(0.2, 3, 75)[None]))
    price = 0.3 * batch.scale
    levels, _ = sweep(batch, price)
    w, value = (
        array(batch.weights),
        array(batch.scale[:, None] * batch.column_scale[..., None]),
    )
    h = np.linspace(0.2, 3, 75)[:, None]
    costs = np.stack([h * (w - t * value) ** 2 + abs(t) * array(price) for t in (-1, 0, 1)])
    np.testing.assert_array_equal(array(levels), costs.argmin(0) - 1)


def test_from_the_best_of_all_it_does_not_move() -> None:
    for seed in range(5):
        batch = Batch.of(1, 1, 5, seed)
        price = 0.1 * batch.scale
        tuples = itertools.product([-1.0, 0.0, 1.0], repeat=5)
        choices = [torch.tensor(each)[None, :, None] for each in tuples]
        best = min(choices, key=lambda levels: float(cost(batch, levels, price).sum()))
        batch.levels.copy_(best)
        levels, _ = sweep(batch, price)
        assert torch.equal(levels, best)


def test_experts_do_not_matter_to_each_other() -> None:
    # Each expert's matrices fill whole cache lines, see ``conversion.parallel.batches``.
    batch = Batch.of(3, 12, 84, seed=5)
    price = 0.1 * batch.scale
    levels, gradient = sweep(batch, price)
    for expert in range(3):
        one = slice(expert, expert + 1)
        alone, own = batch.levels[one].clone(), batch.gradient[one].clone()
        descend(
            alone,
            own,
            batch.hessian[one].clone(),
            batch.scale[one].clone(),
            batch.column_scale[one].clone(),
            price[one].clone(),
        )
        assert torch.equal(alone, levels[one])
        assert torch.equal(own, gradient[one])
