"""Which value a weight gets: the cheapest of all, by trying them."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize.grids import FORBIDDEN, MOST, Grid, LowHigh, Multiples, Prices
from tests.quantize.problems import Array, array, random

ONES = torch.ones(1, 1, 1)


def rounded(grid: Grid, x: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and values of ``x`` ``[experts, columns, rows]``; ``spread [experts, columns]``."""
    levels = torch.empty_like(x)
    call = grid.rounding(slice(0, x.shape[1]), spread[:, :, None])
    values = [call(i, x[:, i], level) for i, level in enumerate(levels.unbind(1))]
    return levels, torch.stack(values, 1)


def costs(grid: Multiples, x: Tensor, spread: Tensor, most: int) -> Array:
    """Of levels 0 to ``most`` for |x|, float64 ``[levels, experts, columns, rows]``."""
    value = array(grid.scale)[:, None] * array(grid.column_scale)[:, :, None]
    first, further = array(grid.prices.first)[:, None], array(grid.prices.further)[:, None]
    found = []
    for q in range(most + 1):
        price = first + (q - 1) * further if q else 0.0
        off = np.abs(array(x)) - q * value
        found.append(off**2 / array(spread)[:, :, None] ** 2 + price)
    return np.stack(found)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    size=st.sampled_from([0.3, 1.0, 4.0, 30.0, 300.0]),
    bit=st.sampled_from([0.0, 1e-3, 0.05, 0.3]),
    first=st.floats(0, 6),
    further=st.floats(0, 6) | st.just(None),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=150)
def test_multiples_are_the_cheapest(
    rows: int,
    columns: int,
    size: float,
    bit: float,
    first: float,
    further: float | None,
    seed: int,
) -> None:
    """``bit``: its price in units of (value / U_ii)^2, about 1/16 where many levels pay."""
    x = size * random(2, columns, rows, seed=seed)
    spread = random(2, columns, seed=seed + 1).mul(0.4).exp()
    scale = random(2, rows, seed=seed + 2).mul(0.4).exp()
    column_scale = random(2, columns, seed=seed + 3).mul(0.4).exp()
    price = bit * scale * scale
    beyond = torch.full_like(price, FORBIDDEN) if further is None else further * price
    grid = Multiples(scale, column_scale, Prices(first * price, beyond))
    levels, values = rounded(grid, x, spread)
    assert torch.equal(values, levels * (scale[:, None] * column_scale[:, :, None]))
    assert ((levels == 0) | (levels.sign() == x.sign())).all()
    every = costs(grid, x, spread, MOST)
    chosen = np.take_along_axis(every, np.abs(array(levels))[None].astype(int), 0)[0]
    least = every.min(0)
    np.testing.assert_allclose(chosen, least, rtol=1e-5, atol=1e-5 * every[0].max())


def test_levels_end_at_127() -> None:
    grid = Multiples(
        torch.ones(1, 1), torch.ones(1, 3), Prices(torch.zeros(1, 1), torch.zeros(1, 1))
    )
    x = torch.tensor([[[126.4], [-127.6], [1e30]]])
    assert rounded(grid, x, torch.ones(1, 3))[0].flatten().tolist() == [126, -127, 127]


def test_where_three_levels_are_allowed_there_are_no_more() -> None:
    x = 100 * random(1, 5, 40)
    free = torch.zeros(1, 40)
    for further, most in ((free, MOST), (free + FORBIDDEN, 1)):
        grid = Multiples(free + 0.5, torch.ones(1, 5), Prices(free, further))
        assert rounded(grid, x, torch.ones(1, 5))[0].abs().amax() == most


@pytest.mark.parametrize("price", [0.0, 1.0])
def test_a_value_of_zero_is_level_zero(price: float) -> None:
    prices = Prices(torch.full((1, 2), price), torch.full((1, 2), price))
    grid = Multiples(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), prices)
    levels, values = rounded(grid, torch.full((1, 2, 2), 5.2), torch.ones(1, 2))
    assert levels.tolist() == [[[0, 5], [0, 0]]]
    assert torch.isfinite(values).all()


def test_prices_of_levels() -> None:
    prices = Prices(torch.tensor([[1.0, 10.0]]), torch.tensor([[0.5, 3.0]]))
    levels = torch.tensor([[[0.0, -4.0], [1.0, 0.0], [-3.0, 0.0]]])
    assert prices.of(levels).tolist() == [[3.0, 19.0]]
    ternary = Prices(prices.first, torch.full((1, 2), FORBIDDEN))
    assert ternary.of(levels.sign()).tolist() == [[2.0, 10.0]]
    assert (ternary.of(levels) > 1e29).all()


@given(x=st.floats(-4, 4, width=32), low=st.floats(0, 4, width=32), high=st.floats(0, 4, width=32))
@settings(deadline=None, max_examples=200)
def test_low_and_high_are_the_nearest(x: float, low: float, high: float) -> None:
    grid = LowHigh(torch.tensor([[-low]]), torch.tensor([[high]]))
    level = int(rounded(grid, torch.tensor([[[x]]]), torch.ones(1, 1))[0])
    values = [-low, 0, high]
    off = [abs(x - value) for value in values]
    assert off[level + 1] <= min(off) + 1e-5
    assert level == 0 or values[level + 1] != 0, "the value 0 is level 0"


def test_ties_go_to_the_lower_level() -> None:
    x = torch.tensor([[[1.0, -1.0, 1.001, -1.001, 1.5, -1.5, 1.501, -1.501]]])
    two = torch.full((1, 8), 2.0)
    for grid, expected in (
        (LowHigh(-two, two), [0, 0, 1, -1, 1, -1, 1, -1]),
        (Multiples(two, ONES[0], Prices(0 * two, two)), [0, 0, 1, -1, 1, -1, 1, -1]),
        (Multiples(two, ONES[0], Prices(two, two)), [0, 0, 0, 0, 0, 0, 1, -1]),
    ):
        assert rounded(grid, x, ONES[0])[0].flatten().tolist() == expected
