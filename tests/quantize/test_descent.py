"""Descent: the sum of error and price never rises, and the gradient stays what it is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize import cpu_steps
from qmoe_format.quantize.descent import descend
from qmoe_format.quantize.grids import FORBIDDEN, MOST, Prices
from qmoe_format.quantize.hessian import inverse_factor
from qmoe_format.quantize.padding import (
    BLOCK,
    GROUP,
    padded,
    padded_columns,
    padded_rows,
    padded_square,
)
from tests.quantize.problems import Array, Batch, array, factor_of, many_threads, random


def ternary(price: Tensor) -> Prices:
    return Prices(price, torch.full_like(price, FORBIDDEN))


def ends_at_one(prices: Prices) -> Tensor:
    return (prices.further == FORBIDDEN).all(1)


@dataclass(frozen=True, slots=True)
class Turns:
    """The order of blocks, and of the columns in each."""

    order: Tensor
    members: Tensor

    @classmethod
    def random(cls, columns: int, seed: int) -> Turns:
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-columns // BLOCK)
        order = torch.randperm(blocks, generator=generator) * BLOCK
        return cls(order, torch.rand(blocks, BLOCK, generator=generator).argsort(1))

    @property
    def groups(self) -> Tensor:
        """The columns that are decided together, in their order: ``[groups, GROUP]``."""
        return (self.order[:, None] + self.members).view(-1, GROUP)


@dataclass(frozen=True, slots=True)
class Swept:
    """Levels, gradient and sums after a sweep, without padding."""

    levels: Tensor
    gradient: Tensor
    sums: Tensor


def sweep(
    batch: Batch,
    prices: Prices,
    seed: int = 0,
    ratio: Tensor | None = None,
    summing: bool = True,
) -> Swept:
    """``ratio``: by which target - gradient is yet to be multiplied."""
    _, rows, columns = batch.weights.shape
    turns, hessian = Turns.random(columns, seed), padded_square(batch.hessian)
    groups = turns.groups
    factors = torch.stack([factor_of(h[groups[:, :, None], groups[:, None]]) for h in hessian])
    levels = padded(batch.levels.clone())
    target, gradient = padded(batch.target), padded(batch.gradient)
    if ratio is not None:
        product = (batch.target - batch.gradient) / ratio[:, :, None]
        gradient = padded(batch.target - product)
    sums = cpu_steps.descend(
        levels, gradient, target, None if ratio is None else padded_rows(ratio), hessian, factors,
        padded_rows(batch.scale), padded_columns(batch.column_scale),
        Prices(padded_rows(prices.first), padded_rows(prices.further)), ends_at_one(prices),
        turns.order, turns.members, summing,
    )  # fmt: skip
    for each in (levels, gradient):
        assert not each[:, rows:].any(), "padding stays 0"
        assert not each[:, :, columns:].any(), "padding stays 0"
    assert not sums[:, rows:].any()
    return Swept(levels[:, :rows, :columns], gradient[:, :rows, :columns], sums[:, :rows])


def cost(batch: Batch, levels: Tensor, prices: Prices) -> Array:
    """Of each row, in float64."""
    sizes = np.abs(array(levels))
    first, beyond = np.minimum(sizes, 1).sum(2), np.maximum(sizes - 1, 0).sum(2)
    errors = batch.errors(levels, batch.scale, batch.column_scale)
    result: Array = errors + array(prices.first) * first + array(prices.further) * beyond
    return result


def check(batch: Batch, after: Swept, prices: Prices) -> None:
    was, now = cost(batch, batch.levels, prices), cost(batch, after.levels, prices)
    assert (now <= was + 1e-5 * (1 + np.abs(was))).all()
    check_sums(batch, after)


def check_sums(batch: Batch, after: Swept) -> None:
    value = array(batch.scale)[:, :, None] * array(batch.column_scale)[:, None]
    quantized, target = array(after.levels) * value, array(batch.weights) @ array(batch.hessian)
    expected = target - quantized @ array(batch.hessian)
    largest = max(np.abs(target).max(), np.abs(array(batch.gradient)).max())
    tolerance = 2e-5 * (1 + largest)
    np.testing.assert_allclose(array(after.gradient), expected, atol=tolerance)
    aim, own, nonzeros, total = (array(each) for each in after.sums.unbind(2))
    assert after.sums.dtype == torch.float64
    size = np.abs(quantized).sum(2)
    for found, other in ((aim, target), (own, expected)):
        apart = np.abs(found - (quantized * other).sum(2))
        assert (apart <= tolerance * (1 + size)).all()
    was, now = np.abs(array(batch.levels)), np.abs(array(after.levels))
    np.testing.assert_array_equal(nonzeros, (now > 0).sum(2) - (was > 0).sum(2))
    np.testing.assert_array_equal(total, now.sum(2) - was.sum(2))


@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 20),
    columns=st.integers(1, 2 * BLOCK + 5),
    price=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]),
    further=st.sampled_from([0.0, 0.3, 1.0, 4.0, None]),
    start=st.sampled_from(["rounded", "zero", "wild"]),
    late=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_the_sum_never_rises(
    experts: int,
    rows: int,
    columns: int,
    price: float,
    further: float | None,
    start: str,
    late: bool,
    seed: int,
) -> None:
    """``further``: the price of a further level, in that of the first; None: there is none.

    ``late``: whether the gradient lacks the last change of row scales.
    """
    most = 1 if further is None else 3
    batch = Batch.of(experts, rows, columns, seed, most)
    if start == "zero":
        batch.levels.zero_()
    elif start == "wild":
        generator = torch.Generator().manual_seed(seed)
        batch.levels.copy_(torch.randint(-most, most + 1, batch.levels.shape, generator=generator))
    first = price * batch.scale
    prices = ternary(first) if further is None else Prices(first, further * first)
    ratio = random(experts, rows, seed=seed).mul(0.3).exp() if late else None
    check(batch, sweep(batch, prices, seed, ratio), prices)


@pytest.mark.parametrize("start", [2, 3, 7, MOST])
def test_levels_that_are_no_longer_allowed_go(start: int) -> None:
    """GPTQ may have had them; the sum of a row without them never rises, either."""
    batch = Batch.of(3, 35, 150, seed=start)
    generator = torch.Generator().manual_seed(start)
    wild = torch.randint(-start, start + 1, batch.levels.shape, generator=generator)
    # Rows with none, few, and many of them; an expert that is not ternary.
    wild[:, :5].clamp_(-1, 1)
    wild[:, 5:15, 1:].clamp_(-1, 1)
    batch.levels.copy_(wild)
    prices = ternary(0.1 * batch.scale)
    prices.further[1] = prices.first[1]
    after = sweep(batch, prices, seed=start)
    assert after.levels[::2].abs().amax() == 1
    assert after.levels[1].abs().amax() > 1
    check_sums(batch, after)
    was, now = cost(batch, batch.levels, prices), cost(batch, after.levels, prices)
    assert (now <= was + 1e-5 * (1 + np.abs(was))).all()


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("columns", [GROUP - 1, GROUP, GROUP + 1, BLOCK, 2 * BLOCK + 1])
def test_it_lowers_the_error_by_much(columns: int, most: int) -> None:
    batch = Batch.of(2, 30, columns, seed=columns, most=most)
    nothing = torch.zeros_like(batch.scale)
    free = Prices(nothing, nothing) if most > 1 else ternary(nothing)
    after = sweep(batch, free)
    check(batch, after, free)
    assert cost(batch, after.levels, free).sum() < 0.8 * cost(batch, batch.levels, free).sum()


@pytest.mark.parametrize("most", [1, 4])
def test_many_sweeps_settle(most: int) -> None:
    batch = Batch.of(2, 12, 80, seed=1, most=most)
    price = 0.05 * batch.scale / most
    prices = Prices(price, price) if most > 1 else ternary(price)
    costs = [cost(batch, batch.levels, prices)]
    for _ in range(20):
        after = sweep(batch, prices)
        check(batch, after, prices)
        batch.levels.copy_(after.levels)
        costs.append(cost(batch, batch.levels, prices))
        assert (costs[-1] <= costs[-2] + 1e-4).all()
    assert torch.equal(sweep(batch, prices).levels, batch.levels)


def test_huge_prices() -> None:
    """Of any level: nothing is left. Of further ones: only three levels are."""
    batch = Batch.of(2, 9, 90, seed=2, most=4)
    price = torch.full_like(batch.scale, 1e9)
    after = sweep(batch, Prices(price, 0 * price))
    assert not after.levels.any()
    torch.testing.assert_close(after.gradient, batch.target, rtol=1e-4, atol=1e-3)
    after = sweep(batch, Prices(0 * price, price))
    assert after.levels.abs().amax() == 1
    check(batch, after, Prices(0 * price, price))


def test_a_huge_price_of_one_row_is_its_own() -> None:
    batch = Batch.of(1, 9, 90, seed=3)
    price = 0.01 * batch.scale
    usual = sweep(batch, ternary(price)).levels
    price[0, 4] = 1e9
    levels = sweep(batch, ternary(price)).levels
    assert not levels[0, 4].any()
    others = torch.arange(9) != 4
    assert torch.equal(levels[:, others], usual[:, others])


@pytest.mark.parametrize("most", [1, 5])
def test_without_correlation_every_number_is_the_best(most: int) -> None:
    batch = Batch.of(1, 15, 75, seed=4, most=most)
    h = torch.linspace(0.2, 3, 75)
    batch.hessian.copy_(torch.diag(h)[None])
    price = 0.3 * batch.scale / most
    levels = sweep(batch, Prices(price, price) if most > 1 else ternary(price)).levels
    w, value = array(batch.weights), array(batch.scale[..., None] * batch.column_scale[:, None])
    every = range(-MOST, MOST + 1) if most > 1 else range(-1, 2)
    costs = np.stack(
        [array(h) * (w - t * value) ** 2 + abs(t) * array(price)[..., None] for t in every]
    )
    np.testing.assert_array_equal(array(levels), costs.argmin(0) - every.stop + 1)
    assert np.abs(array(levels)).max() >= most


def test_from_the_best_of_all_it_does_not_move() -> None:
    for seed, most in itertools.product(range(5), (1, 2)):
        batch = Batch.of(1, 1, 5, seed, most)
        price = 0.1 * batch.scale
        prices = Prices(price, price / 2) if most > 1 else ternary(price)
        most = 6 if most > 1 else 1
        choices = torch.cartesian_prod(*[torch.arange(-most, most + 1)] * 5)
        one = Batch(
            batch.weights.expand(1, len(choices), 5), batch.hessian, choices[None],
            batch.scale.expand(1, len(choices)), batch.column_scale,
        )  # fmt: skip
        best = choices[cost(one, choices[None], prices)[0].argmin()]
        batch.levels.copy_(best)
        assert torch.equal(sweep(batch, prices).levels[0, 0], best.to(torch.int8))


def rows_of(batch: Batch, expert: slice, rows: slice) -> Batch:
    return Batch(
        batch.weights[expert, rows].clone(),
        batch.hessian[expert].clone(),
        batch.levels[expert, rows].clone(),
        batch.scale[expert, rows].clone(),
        batch.column_scale[expert].clone(),
    )


def example() -> tuple[Batch, Prices, Tensor]:
    """Levels that move much, their prices, and how gradients are to be stretched."""
    batch = Batch.of(3, 71, 150, seed=5, most=3)
    price = 0.1 * batch.scale / 3
    prices = Prices(price, price.clone())
    prices.further[2] = FORBIDDEN
    return batch, prices, random(3, 71, seed=5).mul(0.2).exp()


def test_experts_and_rows_do_not_matter_to_each_other() -> None:
    batch, prices, ratio = example()
    every = sweep(batch, prices, 0, ratio)
    for expert, some in itertools.product(range(3), (slice(0, 71), slice(40, 57), slice(7, 8))):
        one = slice(expert, expert + 1)
        own = Prices(prices.first[one, some], prices.further[one, some])
        alone = sweep(rows_of(batch, one, some), own, 0, ratio[one, some])
        assert torch.equal(alone.levels, every.levels[one, some])
        # Products that the gradients begin with may differ in the last digit.
        torch.testing.assert_close(alone.gradient, every.gradient[one, some])


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_nothing(threads: int) -> None:
    batch, prices, ratio = example()
    with many_threads(1):
        usual = sweep(batch, prices, 0, ratio)
    with many_threads(threads):
        again = sweep(batch, prices, 0, ratio)
    assert torch.equal(again.levels, usual.levels)
    assert torch.equal(again.gradient, usual.gradient)
    assert torch.equal(again.sums, usual.sums)


def test_sums_that_nobody_asks_for_change_nothing() -> None:
    batch, prices, ratio = example()
    for late in (None, ratio):
        usual = sweep(batch, prices, 0, late)
        without = sweep(batch, prices, 0, late, summing=False)
        assert torch.equal(without.levels, usual.levels)
        assert torch.equal(without.gradient, usual.gradient)
        assert torch.equal(without.sums[:, :, 2:], usual.sums[:, :, 2:])


def test_a_ratio_of_one_is_none() -> None:
    batch, prices, ratio = example()
    usual, ones = sweep(batch, prices), sweep(batch, prices, 0, torch.ones_like(ratio))
    assert torch.equal(ones.levels, usual.levels)
    torch.testing.assert_close(ones.gradient, usual.gradient)


@dataclass(frozen=True, slots=True)
class Plain:
    """Of one matrix: levels, and of each the distance of its decision from a tie."""

    levels: Array
    margin: Array


def plain_sweep(batch: Batch, expert: int, prices: Prices, turns: Turns) -> Plain:
    """Group by group in float64, from the definition: inverses, and each column by trying all."""
    w, h = array(batch.weights[expert]), array(batch.hessian[expert])
    value = array(batch.scale[expert])[:, None] * array(batch.column_scale[expert])
    first, further = array(prices.first[expert]), array(prices.further[expert])
    levels = array(batch.levels[expert])
    margin = np.full(levels.shape, np.inf)
    most = 1 if ends_at_one(prices)[expert] else MOST
    sizes = np.arange(-most, most + 1)
    price = first[:, None] * (sizes != 0) + further[:, None] * np.maximum(np.abs(sizes) - 1, 0)
    for columns in turns.groups.numpy():
        # Columns of padding have no part in anything.
        own = columns[columns < w.shape[1]]
        if not len(own):
            continue
        gradient = (w - levels * value) @ h
        inverse = np.linalg.inv(h[np.ix_(own, own)])
        now = levels[:, own] * value[:, own]
        rest, new = now + gradient[:, own] @ inverse, np.zeros_like(now)
        close = np.full(now.shape, np.inf)
        for i, column in enumerate(own):
            apart = rest[:, i, None] - sizes * value[:, column, None]
            costs = apart**2 / inverse[0, 0] + price
            new[:, i] = sizes[costs.argmin(1)]
            two = np.partition(costs, 1, 1)
            close[:, i] = (two[:, 1] - two[:, 0]) * inverse[0, 0] / value[:, column] ** 2
            wrong = rest[:, i] - new[:, i] * value[:, column]
            rest[:, i + 1 :] -= wrong[:, None] * (inverse[0, 1:] / inverse[0, 0])
            inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:] / inverse[0, 0])
        move = new * value[:, own] - now
        error = (move * (move @ h[np.ix_(own, own)] - 2 * gradient[:, own])).sum(1)
        paid, before = (
            first * (t != 0).sum(1) + further * np.maximum(np.abs(t) - 1, 0).sum(1)
            for t in (new, levels[:, own])
        )
        change = error + paid - before
        better = change < 0
        differ = (new != levels[:, own]).any(1)
        scale = np.square(value[:, own]).min(1) * h[own, own].min()
        close = np.minimum(close, np.where(differ, np.abs(change) / scale, np.inf)[:, None])
        margin[:, own] = np.minimum.accumulate(close, axis=1)
        levels[:, own] = np.where(better[:, None], new, levels[:, own])
    return Plain(levels, margin)


@pytest.mark.parametrize("start", ["rounded", "zero", "wild"])
@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (40, 64), (33, 150)])
def test_it_agrees_with_a_plain_one(rows: int, columns: int, most: int, start: str) -> None:
    batch = Batch.of(2, rows, columns, seed=rows + columns, most=most)
    if start == "zero":
        batch.levels.zero_()
    elif start == "wild":
        generator = torch.Generator().manual_seed(most)
        batch.levels.copy_(torch.randint(-most, most + 1, batch.levels.shape, generator=generator))
    price = 0.1 * batch.scale / most**2
    prices = Prices(price, 0.8 * price) if most > 1 else ternary(price)
    found = sweep(batch, prices, seed=rows, ratio=random(2, rows).mul(0.2).exp())
    turns = Turns.random(columns, rows)
    for expert in range(2):
        plain = plain_sweep(batch, expert, prices, turns)
        assert (plain.levels != array(batch.levels[expert])).mean() > 0.05, "many move"
        # A row that differs does so from a near-tie on.
        differ = array(found.levels[expert]) != plain.levels
        apart = differ.any(1)
        groups = [g[g < columns] for g in turns.groups.numpy()]
        for row in np.flatnonzero(apart):
            group = next(g for g in groups if differ[row, g].any())
            assert plain.margin[row, group].min() < 1e-3
        assert apart.mean() <= 0.1 or apart.sum() <= 1


@pytest.mark.parametrize("refitting", [True, False])
@pytest.mark.parametrize("most", [1, 3])
def test_a_round(most: int, refitting: bool) -> None:
    """The cost of levels and scales falls; what belongs together stays together."""
    batch = Batch.of(2, 37, 150, seed=6, most=most)
    problem, solution = batch.solution()
    price = 0.05 * solution.scale / most
    allowed = torch.tensor([most == 1] * 2)
    further = torch.where(allowed[:, None], FORBIDDEN, price)
    prices = Prices(price, further)
    h, w = array(problem.hessian), array(problem.weights)
    generator = torch.Generator().manual_seed(0)

    def quantized() -> Array:
        value = array(solution.scale)[:, :, None] * array(solution.column_scale)[:, None]
        result: Array = array(solution.levels) * value
        return result

    def cost() -> Array:
        off, sizes = w - quantized(), np.abs(array(solution.levels))
        beyond = np.maximum(sizes - 1, 0).sum(2) * array(further)
        result: Array = (off @ h * off).sum(2) + array(price) * (sizes > 0).sum(2) + beyond
        return result

    def counts() -> Tensor:
        levels = solution.levels
        return torch.stack([levels.count_nonzero((1, 2)), levels.abs().sum((1, 2))]).double()

    costs, moved = [cost()], []
    for step in range(6):
        levels, before, scale = solution.levels.clone(), counts(), solution.scale
        ending = refitting or step == 5
        changes = descend(problem, solution, prices, allowed, generator, ending)
        assert torch.equal(torch.stack(changes), counts() - before)
        moved.append(int((solution.levels != levels).sum()))
        costs.append(cost())
        assert (costs[-1] <= costs[-2] + 1e-5 * (1 + costs[-2])).all()
        if ending:
            # Least squares: the rest is orthogonal to each row, but for the ridge.
            q = quantized()
            own, along = (q @ h * q).sum(2), ((w - q) @ h * q).sum(2)
            assert (np.abs(along) <= 1e-3 * (own + own.mean())).all()
        else:
            assert torch.equal(solution.scale, scale)
            assert solution.ratio is None
    assert costs[-1].sum() < 0.9 * costs[0].sum()
    assert moved[0] > 5 * moved[-1]


def test_rounds_have_other_groups() -> None:
    """And the same ones for every number of threads."""
    batch = Batch.of(2, 37, 150, seed=6)

    def after(seed: int, threads: int = 1) -> tuple[Tensor, Tensor]:
        problem, solution = batch.solution()
        prices = ternary(0.02 * solution.scale)
        ends, generator = torch.tensor([True, True]), torch.Generator().manual_seed(seed)
        with many_threads(threads):
            for _ in range(3):
                descend(problem, solution, prices, ends, generator, True)
        return solution.levels, solution.gradient

    levels, gradient = after(0)
    again = after(0, threads=3)
    assert torch.equal(again[0], levels)
    assert torch.equal(again[1], gradient)
    assert not torch.equal(after(1)[0], levels)


def test_factors_of_groups() -> None:
    """They are those of the groups' own Hessians; an indefinite one is NaN, so that none moves."""
    batch = Batch.of(2, 3, 3 * BLOCK, seed=11)
    groups = Turns.random(3 * BLOCK, seed=12).groups
    found = cpu_steps.group_factors(batch.hessian, groups)
    own = batch.hessian[:, groups[:, :, None], groups[:, None]]
    torch.testing.assert_close(found, inverse_factor(own), rtol=1e-5, atol=1e-6)
    assert not found.tril(-1).any()
    batch.hessian[0, groups[4, 2], groups[4, 2]] *= -1
    broken = cpu_steps.group_factors(batch.hessian, groups)
    assert broken[0, 4].isnan().any()
    assert torch.equal(broken[1], found[1])
