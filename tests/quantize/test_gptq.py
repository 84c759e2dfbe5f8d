"""GPTQ against one without blocks, batches or factors, in float64."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.quantize.gptq import GROUP, gptq
from qmoe_format.quantize.hessian import Statistics
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
    plain_gptq,
    random,
    real,
)


def paper(weights: torch.Tensor, inputs: torch.Tensor, scale_dtype: str = "BF16") -> Plain:
    """The paper's recipe for one matrix."""
    w = array(weights)
    x = array(inputs)
    hessian = x.T @ x
    hessian += 0.1 * hessian.diagonal().mean() * np.eye(len(hessian))
    low, high = array(min_max(weights[None], scale_dtype)[0]).T
    return plain_gptq(w, hessian, low, high)


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
    result = quantize_qmoe(weights, "BF16", calibrated(inputs, torch.float64))
    assert result.damping == pytest.approx([0.1] * experts)
    assert result.fallback == [None] * experts
    for expert in range(experts):
        check_agrees(result.weights.levels[expert], paper(weights[expert], inputs[expert]))


@pytest.mark.parametrize("which", REAL)
def test_qmoe_agrees_on_real_matrices(shared_data: Path, which: str) -> None:
    weights, inputs = real(shared_data, which, rows=24, columns=300, tokens=1200)
    result = quantize_qmoe(weights, "BF16", calibrated(inputs))
    assert torch.equal(result.weights.row_scale, round_to_nearest(weights).row_scale)
    assert not torch.equal(result.weights.levels, round_to_nearest(weights).levels)
    for expert in range(len(weights)):
        # The sums are in float32 here.
        plain = paper(weights[expert], inputs[expert])
        check_agrees(result.weights.levels[expert], plain, tolerance=1e-3)


@pytest.mark.parametrize("columns", [1, 2, GROUP, GROUP + 1, 5 * GROUP + 3])
def test_with_column_scales_and_prices(columns: int) -> None:
    batch = Batch.of(2, 11, columns, seed=columns)
    low, high = -0.8 * batch.scale, 1.1 * batch.scale
    price = 0.2 * batch.scale
    before = batch.weights.clone()
    levels = gptq(batch.weights, factor_of(batch.hessian), low, high, batch.column_scale, price)
    assert torch.equal(batch.weights, before), "weights are not changed"
    for expert in range(2):
        plain = plain_gptq(
            array(batch.weights[expert]).T,
            array(batch.hessian[expert]),
            array(low[expert]),
            array(high[expert]),
            array(batch.column_scale[expert]),
            array(price[expert]),
        )
        check_agrees(levels[expert].T.to(torch.int8), plain)
        assert plain.levels.any()


def test_a_huge_price_leaves_nothing() -> None:
    batch = Batch.of(1, 5, 70, seed=3)
    price = torch.full_like(batch.scale, 1e9)
    factor = factor_of(batch.hessian)
    levels = gptq(batch.weights, factor, -batch.scale, batch.scale, None, price)
    assert not levels.any()


@pytest.mark.parametrize("group", [1, 7, 150, 1000])
def test_halves_change_nothing(group: int) -> None:
    batch = Batch.of(2, 40, 150, seed=4)
    factor = factor_of(batch.hessian).double()
    arguments = (batch.weights.double(), factor, -batch.scale.double(), batch.scale.double())
    assert torch.equal(gptq(*arguments, group=group), gptq(*arguments))


def test_low_is_minus_high_if_not_given() -> None:
    batch = Batch.of(2, 20, 50, seed=5)
    factor = factor_of(batch.hessian)
    for price in (None, 0.1 * batch.scale):
        both = [
            gptq(batch.weights, factor, low, batch.scale, batch.column_scale, price)
            for low in (None, -batch.scale)
        ]
        assert torch.equal(*both)


def one(x: float, low: float | None, high: float, price: float | None) -> int:
    """The level of a 1 x 1 matrix, with a Hessian of 1."""
    levels = gptq(
        torch.tensor([[[x]]]),
        torch.ones(1, 1, 1),
        None if low is None else torch.tensor([[low]]),
        torch.tensor([[high]]),
        None,
        None if price is None else torch.tensor([[price]]),
    )
    return int(levels)


@given(
    x=st.floats(-4, 4, width=32),
    low=st.none() | st.floats(0, 4, width=32),
    high=st.floats(0, 4, width=32),
    price=st.none() | st.floats(0, 4, width=32),
)
@settings(deadline=None, max_examples=200)
def test_the_choice_is_the_cheapest(
    x: float, low: float | None, high: float, price: float | None
) -> None:
    values = [-high if low is None else -low, 0, high]
    costs = [(x - value) ** 2 for value in values]
    costs[0] += price or 0
    costs[2] += price or 0
    level = one(x, None if low is None else -low, high, price)
    assert costs[level + 1] <= min(costs) + 1e-5
    assert level == 0 or values[level + 1] != 0, "the value 0 is level 0"


def test_ties_of_the_choice_go_to_zero() -> None:
    for low in (-2.0, None):
        for x in (1.0, -1.0):
            assert one(x, low, 2.0, None) == one(x, low, 2.0, 0.0) == 0
            assert one(1.001 * x, low, 2.0, None) == x
            assert one(1.5 * x, low, 2.0, 2.0) == 0
            assert one(1.501 * x, low, 2.0, 2.0) == x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_tokens_it_is_rounding(dtype: torch.dtype) -> None:
    weights = random(3, 20, 70, seed=8, dtype=dtype)
    statistics = Statistics.zeros(3, 70)
    statistics.add(1, correlated(100, 70))
    result = quantize_qmoe(weights, "BF16", statistics)
    rounded = round_to_nearest(weights)
    assert result.fallback == ["no tokens", None, "no tokens"]
    assert result.damping[0] is None
    assert result.damping[2] is None
    assert torch.equal(result.weights.levels[::2], rounded.levels[::2])
    assert not torch.equal(result.weights.levels[1], rounded.levels[1])
    assert torch.equal(result.weights.row_scale, rounded.row_scale)


def test_it_is_better_than_rounding() -> None:
    weights, inputs = random(1, 32, 96, seed=9), correlated(500, 96)
    result = quantize_qmoe(weights, "BF16", calibrated([inputs])).weights.dequantize()
    rounded = round_to_nearest(weights).dequantize()
    off = ((weights - result)[0] @ inputs.T).square().sum()
    assert off < 0.6 * ((weights - rounded)[0] @ inputs.T).square().sum()


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_units_change_no_level(factor: float) -> None:
    weights, inputs = random(2, 9, 30, seed=10), [correlated(90, 30), correlated(5, 30, 7)]
    usual = quantize_qmoe(weights, "BF16", calibrated(inputs, torch.float64))
    scaled = quantize_qmoe(weights * factor, "BF16", calibrated(inputs, torch.float64))
    assert torch.equal(scaled.weights.levels, usual.weights.levels)
    assert torch.equal(scaled.weights.row_scale, usual.weights.row_scale * factor)
    large = calibrated([each.double() * factor for each in inputs], torch.float64)
    assert torch.equal(quantize_qmoe(weights, "BF16", large).weights.levels, usual.weights.levels)


def test_zero_matrices_rows_and_columns() -> None:
    weights = random(2, 6, 20, seed=11)
    weights[0] = 0
    weights[1, 2] = 0
    weights[1, :, 3] = 0
    levels = quantize_qmoe(weights, "BF16", calibrated([correlated(50, 20)] * 2)).weights.levels
    assert not levels[0].any()
    assert not levels[1, 2].any()
    assert levels[1].any()


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_the_other_experts_do_not_matter(rows: int) -> None:
    weights = random(5, rows, 67, seed=12)
    inputs = [correlated(1 + 40 * e, 67, e) for e in range(5)]
    together = quantize_qmoe(weights, "BF16", calibrated(inputs)).weights
    for some in ([0], [3], [4, 2], [1, 0, 4]):
        statistics = calibrated([inputs[e] for e in some])
        part = quantize_qmoe(weights[some], "BF16", statistics).weights
        assert torch.equal(part.levels, together.levels[some])
        assert torch.equal(part.row_scale, together.row_scale[some])
