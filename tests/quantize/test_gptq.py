"""GPTQ against one without blocks, batches or factors, in float64."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize import cpu_steps
from qmoe_format.quantize.gptq import GROUP, gptq
from qmoe_format.quantize.grids import FORBIDDEN, MOST, LowHigh, Multiples, Prices
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.padding import (
    BLOCK,
    padded,
    padded_columns,
    padded_rows,
    padded_square,
)
from qmoe_format.quantize.qmoe import quantize_qmoe
from qmoe_format.quantize.rtn import min_max, round_to_nearest
from tests.quantize.problems import (
    REAL,
    Batch,
    Plain,
    array,
    calibrated,
    check_agrees,
    correlated,
    factor_of,
    levels_of,
    many_threads,
    plain_gptq,
    random,
    real,
)


def paper(weights: torch.Tensor, inputs: torch.Tensor) -> Plain:
    """The paper's recipe for one matrix."""
    w = array(weights)
    x = array(inputs)
    hessian = x.T @ x
    hessian += 0.1 * hessian.diagonal().mean() * np.eye(len(hessian))
    low, high = array(min_max(weights[None])[0]).T
    return plain_gptq(w, hessian, np.stack([low, 0 * low, high], 1))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 140),
    experts=st.integers(1, 3),
    tokens=st.integers(1, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
def test_qmoe_agrees_with_the_plain_one(
    rows: int, columns: int, experts: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    weights = random(experts, rows, columns, seed=seed, dtype=dtype)
    inputs = [correlated(tokens, columns, seed + e) for e in range(experts)]
    result = quantize_qmoe(weights, calibrated(inputs, torch.float64))
    assert result.damping == pytest.approx([0.1] * experts)
    assert result.fallback == [None] * experts
    for expert in range(experts):
        check_agrees(levels_of(result).levels[expert], paper(weights[expert], inputs[expert]))


@pytest.mark.parametrize("which", REAL)
def test_qmoe_agrees_on_real_matrices(shared_data: Path, which: str) -> None:
    weights, inputs = real(shared_data, which, rows=24, columns=300, tokens=1200)
    result = quantize_qmoe(weights, calibrated(inputs))
    assert torch.equal(levels_of(result).row_scale, round_to_nearest(weights).row_scale)
    assert not torch.equal(levels_of(result).levels, round_to_nearest(weights).levels)
    for expert in range(len(weights)):
        # The sums are in float32 here.
        plain = paper(weights[expert], inputs[expert])
        check_agrees(levels_of(result).levels[expert], plain, tolerance=1e-3)


def priced(batch: Batch, most: int) -> Prices:
    first = 0.2 * batch.scale / most
    return Prices(first, first / 2 if most > 1 else torch.full_like(first, FORBIDDEN))


def plain_multiples(batch: Batch, expert: int, prices: Prices) -> Plain:
    ternary = bool((prices.further[expert] == FORBIDDEN).all())
    steps = np.arange(-1, 2) if ternary else np.arange(-MOST, MOST + 1)
    nonzero, beyond = np.minimum(abs(steps), 1), np.maximum(abs(steps) - 1, 0)
    one, more = array(prices.first[expert])[:, None], array(prices.further[expert])[:, None]
    return plain_gptq(
        array(batch.weights[expert]),
        array(batch.hessian[expert]),
        array(batch.scale[expert])[:, None] * steps,
        one * nonzero + more * beyond,
        array(batch.column_scale[expert]),
    )


def by_columns(batch: Batch, prices: Prices) -> Tensor:
    """``gptq`` on ``Multiples``, int8 ``[experts, rows, columns]``."""
    grid = Multiples(batch.scale, batch.column_scale, prices)
    levels = gptq(batch.weights.mT.contiguous(), factor_of(batch.hessian), grid)
    return levels.mT.to(torch.int8)


def by_blocks(batch: Batch, prices: Prices) -> tuple[Tensor, Tensor]:
    """The kernel that rounds blocks, int8 levels, and errors over U_ii."""
    rows, columns = batch.weights.shape[1:]
    rest, factor = padded(batch.weights.clone()), padded_square(factor_of(batch.hessian))
    levels = torch.full(rest.shape, 99, dtype=torch.int8)
    errors = torch.full_like(rest, torch.nan)
    both = Prices(padded_rows(prices.first), padded_rows(prices.further))
    ternary = (prices.further == FORBIDDEN).all(1)
    for block in range(0, rest.shape[2], BLOCK):
        before = rest.clone()
        cpu_steps.round_block(
            rest, factor, levels, errors, block, padded_rows(batch.scale),
            padded_columns(batch.column_scale), both, ternary,
        )  # fmt: skip
        assert torch.equal(rest, before), "what is rounded is not changed"
        own, after = slice(block, block + BLOCK), slice(block + BLOCK, None)
        assert (levels[:, :, after] == 99).all(), "other blocks are not changed"
        rest[:, :, after] -= errors[:, :, own] @ factor[:, own, after]
    for each in (levels, errors):
        assert not each[:, rows:].any(), "padding stays 0"
        assert not each[:, :, columns:].any(), "padding stays 0"
    return levels[:, :rows, :columns], errors[:, :rows, :columns]


@pytest.mark.parametrize("most", [1, 6])
@pytest.mark.parametrize("columns", [1, 2, GROUP, GROUP + 1, 5 * GROUP + 3])
def test_multiples_of_scales_at_a_price(columns: int, most: int) -> None:
    batch = Batch.of(2, 11, columns, seed=columns, most=most)
    before, prices = batch.weights.clone(), priced(batch, most)
    levels = by_columns(batch, prices)
    assert torch.equal(batch.weights, before), "weights are not changed"
    for expert in range(2):
        plain = plain_multiples(batch, expert, prices)
        check_agrees(levels[expert], plain)
        assert most / 2 < np.abs(plain.levels).max() < MOST


@pytest.mark.parametrize("most", [1, 6])
@pytest.mark.parametrize("rows", [1, 16, 43])
@pytest.mark.parametrize("columns", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_blocks_at_a_price(rows: int, columns: int, most: int) -> None:
    batch = Batch.of(2, rows, columns, seed=columns, most=most)
    prices = priced(batch, most)
    prices.further[1] = FORBIDDEN
    levels, errors = by_blocks(batch, prices)
    other = by_columns(batch, prices)
    for expert in range(2):
        plain = plain_multiples(batch, expert, prices)
        check_agrees(levels[expert], plain)
        check_agrees(other[expert], plain)
    same = (levels == other).all(2)
    assert same.sum() >= 0.8 * same.numel() - 1
    # (W - Q) H (W - Q)^T = E E^T: what the errors are for.
    found = np.square(array(errors)).sum(2)
    expected = batch.errors(levels, batch.scale, batch.column_scale)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_blocks_in_threads() -> None:
    batch = Batch.of(2, 75, 150, seed=5, most=6)
    usual = by_blocks(batch, priced(batch, 6))
    for threads in (1, 2, 3):
        with many_threads(threads):
            again = by_blocks(batch, priced(batch, 6))
        assert torch.equal(again[0], usual[0])
        assert torch.equal(again[1], usual[1])


def test_a_huge_price_leaves_nothing() -> None:
    batch = Batch.of(1, 5, 70, seed=3)
    price = torch.full_like(batch.scale, 1e9)
    assert not by_columns(batch, Prices(price, price)).any()
    assert not by_blocks(batch, Prices(price, price))[0].any()


@pytest.mark.parametrize("group", [1, 7, 150, 1000])
def test_halves_change_nothing(group: int) -> None:
    batch = Batch.of(2, 40, 150, seed=4)
    weights, factor = batch.weights.mT.double(), factor_of(batch.hessian).double()
    grid = LowHigh(-batch.scale.double(), batch.scale.double())
    assert torch.equal(gptq(weights, factor, grid, group), gptq(weights, factor, grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_tokens_it_is_rounding(dtype: torch.dtype) -> None:
    weights = random(3, 20, 70, seed=8, dtype=dtype)
    statistics = Statistics.zeros(3, 70)
    statistics.add(1, correlated(100, 70))
    result = quantize_qmoe(weights, statistics)
    rounded = round_to_nearest(weights)
    assert result.fallback == ["no tokens", None, "no tokens"]
    assert result.damping[0] is None
    assert result.damping[2] is None
    assert torch.equal(levels_of(result).levels[::2], rounded.levels[::2])
    assert not torch.equal(levels_of(result).levels[1], rounded.levels[1])
    assert torch.equal(levels_of(result).row_scale, rounded.row_scale)


def test_it_is_better_than_rounding() -> None:
    weights, inputs = random(1, 32, 96, seed=9), correlated(500, 96)
    result = quantize_qmoe(weights, calibrated([inputs])).weights.dequantize()
    rounded = round_to_nearest(weights).dequantize()
    off = ((weights - result)[0] @ inputs.T).square().sum()
    assert off < 0.6 * ((weights - rounded)[0] @ inputs.T).square().sum()


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_units_change_no_level(factor: float) -> None:
    weights, inputs = random(2, 9, 30, seed=10), [correlated(90, 30), correlated(5, 30, 7)]
    usual = quantize_qmoe(weights, calibrated(inputs, torch.float64))
    scaled = quantize_qmoe(weights * factor, calibrated(inputs, torch.float64))
    assert torch.equal(levels_of(scaled).levels, levels_of(usual).levels)
    assert torch.equal(levels_of(scaled).row_scale, levels_of(usual).row_scale * factor)
    large = calibrated([each.double() * factor for each in inputs], torch.float64)
    assert torch.equal(levels_of(quantize_qmoe(weights, large)).levels, levels_of(usual).levels)


def test_zero_matrices_rows_and_columns() -> None:
    weights = random(2, 6, 20, seed=11)
    weights[0] = 0
    weights[1, 2] = 0
    weights[1, :, 3] = 0
    levels = levels_of(quantize_qmoe(weights, calibrated([correlated(50, 20)] * 2))).levels
    assert not levels[0].any()
    assert not levels[1, 2].any()
    assert levels[1].any()


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_the_other_experts_do_not_matter(rows: int) -> None:
    weights = random(5, rows, 67, seed=12)
    inputs = [correlated(1 + 40 * e, 67, e) for e in range(5)]
    together = levels_of(quantize_qmoe(weights, calibrated(inputs)))
    for some in ([0], [3], [4, 2], [1, 0, 4]):
        statistics = calibrated([inputs[e] for e in some])
        part = levels_of(quantize_qmoe(weights[some], statistics))
        assert torch.equal(part.levels, together.levels[some])
        assert torch.equal(part.row_scale, together.row_scale[some])
