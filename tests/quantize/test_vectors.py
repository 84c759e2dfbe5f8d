"""Vectors of kernels against NumPy, with what is not a number, infinite, or a zero with a sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from numba import njit

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.codec.kernels.unaligned import pointer
from qmoe_format.quantize.grids import FORBIDDEN, MOST, Multiples, Prices
from qmoe_format.quantize.kernels import vectors as v
from qmoe_format.quantize.kernels.rounding import rounded
from qmoe_format.quantize.padding import BLOCK, GROUP, LANES

Floats = npt.NDArray[np.float32]
W = v.WIDTH


@njit
def of_all(one, other, third, values, bits, sums, levels):  # type: ignore[no-untyped-def]
    """Every function of vectors: a row of ``values`` each."""
    a, b = v.load_vector(pointer(one), 0), v.load_vector(pointer(other), 0)
    c = v.load_vector(pointer(third), 0)
    out = pointer(values)
    v.store_vector(out, 0 * W, a + b)
    v.store_vector(out, 1 * W, a - b)
    v.store_vector(out, 2 * W, a * b)
    v.store_vector(out, 3 * W, a / b)
    v.store_vector(out, 4 * W, a + other[0])
    v.store_vector(out, 5 * W, a - other[0])
    v.store_vector(out, 6 * W, a * other[0])
    v.store_vector(out, 7 * W, a / other[0])
    v.store_vector(out, 8 * W, one[0] + b)
    v.store_vector(out, 9 * W, one[0] - b)
    v.store_vector(out, 10 * W, one[0] * b)
    v.store_vector(out, 11 * W, one[0] / b)
    v.store_vector(out, 12 * W, v.broadcast(one[3]))
    v.store_vector(out, 13 * W, v.least(a, b))
    v.store_vector(out, 14 * W, v.greater(a, b))
    v.store_vector(out, 15 * W, v.floor(a))
    v.store_vector(out, 16 * W, v.magnitude(a))
    v.store_vector(out, 17 * W, v.with_sign(a, b))
    v.store_vector(out, 18 * W, v.where_greater(a, b, c))
    v.store_vector(out, 19 * W, v.chosen(bits[2], a, b))
    v.store_vector(out, 20 * W, v.zero_vector())
    v.store_vector(out, 21 * W, v.load_levels(pointer(levels), 1))
    bits[0], bits[1] = v.lanes_greater(a, b), v.lanes_different(a, b)
    sums[0] = v.vector_sum(a)


@njit
def of_some(levels, values, tile):  # type: ignore[no-untyped-def]
    """What reads and writes at places of its own."""
    v.store_levels(pointer(levels), 3, v.load_vector(pointer(values), 5))
    v.transpose(pointer(tile), 7)


@njit
def of_rounding(x, value, squared, first, further, ternary, levels):  # type: ignore[no-untyped-def]
    for i in range(0, len(x), W):
        a, b = v.load_vector(pointer(x), i), v.load_vector(pointer(value), i)
        spread, one = v.load_vector(pointer(squared), i), v.load_vector(pointer(first), i)
        inverse = v.broadcast(np.float32(1)) / b
        more = v.load_vector(pointer(further), i)
        found = rounded(a, b, inverse, spread, one, more, ternary)
        v.store_levels(pointer(levels), i, found)


ODD = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, -2.5, np.inf, -np.inf, np.nan, 1e-45, 3e38, -3e38]


def numbers(seed: int) -> Floats:
    """Small ones, large ones, odd ones."""
    rng = np.random.default_rng(seed)
    usual = rng.standard_normal(W) * 10.0 ** rng.integers(-3, 4, W)
    return np.where(rng.random(W) < 0.3, rng.choice(ODD, W), usual).astype(np.float32)


def same(found: Floats, expected: Floats) -> None:
    """Also the signs of zeros."""
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[numbers], np.signbit(expected)[numbers])


@pytest.mark.parametrize("seed", range(30))
def test_every_function(seed: int) -> None:
    a, b, c = (numbers(3 * seed + k) for k in range(3))
    if seed % 3 == 0:
        a, b[::2] = np.where(np.isfinite(a), a, np.float32(2)), a[::2]
    mask = int(np.random.default_rng(seed).integers(2**W))
    values, sums = np.full((22, W), 7, np.float32), np.zeros(1, np.float32)
    bits = np.array([7, 7, mask], np.uint64)
    levels = np.random.default_rng(seed).integers(-128, 128, W + 1, np.int8)
    of_all(a, b, c, values, bits, sums, levels)
    with np.errstate(all="ignore"):
        # A zero of a sum or product may have either sign.
        pairs: list[tuple[Any, Any]] = [(a, b), (a, b[0]), (a[0], b)]
        for place, (x, y) in enumerate(pairs):
            for k, each in enumerate((np.add, np.subtract, np.multiply, np.divide)):
                np.testing.assert_array_equal(values[4 * place + k], each(x, y), each.__name__)
        same(values[12], np.full(W, a[3]))
        same(values[13], np.where(a < b, a, b))
        same(values[14], np.where(a > b, a, b))
        same(values[15], np.floor(a))
        same(values[16], np.abs(a))
        same(values[17], np.copysign(a, b))
        same(values[18], np.where(a > b, c, np.float32(0)))
        chosen = np.array([(mask >> lane) & 1 for lane in range(W)], bool)
        same(values[19], np.where(chosen, a, b))
        same(values[20], np.zeros(W, np.float32))
        same(values[21], levels[1:].astype(np.float32))
        ones = 1 << np.arange(W, dtype=np.uint64)
        assert bits[0] == ones[a > b].sum()
        assert bits[1] == ones[a != b].sum()
        exact = float(a.astype(np.float64).sum())
        most = float(np.abs(a[np.isfinite(a)].astype(np.float64)).sum())
        if most < 1e37:  # beyond, the order of a sum matters
            np.testing.assert_allclose(sums[0], exact, rtol=0, atol=1e-5 * most)


@pytest.mark.parametrize("seed", range(3))
def test_levels_and_tiles_are_written_where_they_belong(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, W + 9).astype(np.float32)
    levels, tile = np.full(W + 7, 55, np.int8), rng.standard_normal(W * W + 19).astype(np.float32)
    tile[[8, 9, 50]] = np.nan, np.inf, -0.0
    before = tile.copy()
    of_some(levels, values, tile)
    np.testing.assert_array_equal(levels[3 : W + 3], values[5 : W + 5].astype(np.int8))
    assert (levels[:3] == 55).all()
    assert (levels[W + 3 :] == 55).all()
    inside = slice(7, 7 + W * W)
    same(tile[inside].reshape(W, W), before[inside].reshape(W, W).T)
    same(tile[:7], before[:7])
    same(tile[7 + W * W :], before[7 + W * W :])


def test_tiles_are_whole() -> None:
    assert LANES == W
    assert BLOCK % LANES == BLOCK % GROUP == 0


def grid_levels(
    x: Floats, value: Floats, squared: Floats, first: Floats, further: Floats
) -> npt.NDArray[np.int8]:
    """What ``Multiples`` makes of x: a row for each."""
    prices = Prices(torch.from_numpy(first)[None], torch.from_numpy(further)[None])
    levels = []
    for i in range(len(x)):
        one = slice(i, i + 1)
        own = Prices(prices.first[:, one], prices.further[:, one])
        grid = Multiples(torch.from_numpy(value[one])[None], torch.ones(1, 1), own)
        spread = torch.tensor([[[float(squared[i]) ** 0.5]]])
        level = torch.empty(1, 1)
        grid.rounding(slice(0, 1), spread)(0, torch.from_numpy(x[one])[None], level)
        levels.append(int(level))
    return np.array(levels, np.int8)


def kernel_levels(
    x: Floats, value: Floats, squared: Floats, first: Floats, further: Floats
) -> npt.NDArray[np.int8]:
    levels = np.full(len(x), 99, np.int8)
    ternary = bool((further == np.float32(FORBIDDEN)).all())
    of_rounding(x, value, squared, first, further, ternary, levels)
    return levels


def float32(make: Callable[[int], npt.NDArray[np.float64]]) -> Floats:
    return make(2 * W).astype(np.float32)


@given(
    size=st.sampled_from([0.3, 1.0, 4.0, 30.0, 300.0]),
    bit=st.sampled_from([0.0, 1e-3, 0.05, 0.3]),
    first=st.floats(0, 6),
    further=st.floats(0, 6) | st.just(None),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=80)
def test_rounding_is_the_cheapest(
    size: float, bit: float, first: float, further: float | None, seed: int
) -> None:
    """By trying all, as for ``Multiples``, and the same as that but for near-ties."""
    rng = np.random.default_rng(seed)
    x = float32(lambda n: size * rng.standard_normal(n))
    value = float32(lambda n: np.exp(0.4 * rng.standard_normal(n)))
    squared = float32(lambda n: np.exp(0.8 * rng.standard_normal(n)))
    price = bit * value * value
    one = np.float32(first) * price
    more = np.full_like(price, FORBIDDEN) if further is None else np.float32(further) * price
    levels = kernel_levels(x, value, squared, one, more)
    assert ((levels == 0) | (np.sign(levels) == np.sign(x))).all()
    most = 1 if further is None else MOST
    every = np.arange(most + 1)[:, None]
    wide = [each.astype(np.float64) for each in (x, value, squared, one)]
    beyond = np.maximum(every - 1, 0) * (0 if further is None else more.astype(np.float64))
    costs = (np.abs(wide[0]) - every * wide[1]) ** 2 / wide[2] + (every > 0) * wide[3] + beyond
    chosen = np.take_along_axis(costs, np.abs(levels.astype(int))[None], 0)[0]
    np.testing.assert_allclose(chosen, costs.min(0), rtol=1e-5, atol=1e-5 * costs[0].max())
    differ = levels != grid_levels(x, value, squared, one, more)
    two = np.partition(costs, 1, 0)
    assert (two[1] - two[0] <= 1e-4 * (1 + costs[0]))[differ].all()
    assert differ.sum() <= 2


def test_rounding_ends_at_127() -> None:
    x = np.zeros(W, np.float32)
    x[:6] = 126.4, -127.6, 1e30, -1e30, 0.4, np.nan
    ones, free = np.ones(W, np.float32), np.zeros(W, np.float32)
    levels = kernel_levels(x, ones, ones, free, free)
    assert levels.tolist() == [126, -127, 127, -127] + [0] * (W - 4)
    levels = kernel_levels(x, ones, ones, free, free + np.float32(FORBIDDEN))
    assert levels.tolist() == [1, -1, 1, -1] + [0] * (W - 4)


def test_ties_of_rounding_go_to_the_lower_level() -> None:
    x = np.resize(np.array([1, -1, 1.001, -1.001, 1.5, -1.5, 1.501, -1.501], np.float32), W)
    two, ones = np.full(W, 2, np.float32), np.ones(W, np.float32)
    for first, expected in ((0 * two, [0, 0, 1, -1, 1, -1, 1, -1]), (two, [0] * 6 + [1, -1])):
        levels = kernel_levels(x, two, ones, first, two)
        assert levels[:8].tolist() == expected
