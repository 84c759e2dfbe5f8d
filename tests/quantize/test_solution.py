"""Scales, target and gradient of a solution belong together, whatever is done to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize.descent import descend
from qmoe_format.quantize.grids import Prices
from qmoe_format.quantize.hessian import Factored, Statistics, factored
from qmoe_format.quantize.level_weights import LevelWeights
from qmoe_format.quantize.padding import (
    BLOCK,
    LANES,
    padded,
    padded_columns,
    padded_rows,
    padded_square,
)
from qmoe_format.quantize.solution import MAX_LENGTHEN, MAX_STRETCH, Problem, Solution, finished
from tests.quantize.problems import Array, array, correlated, many_threads, random
from tests.refusals import refusal

SHAPES = [(20, 40), (16, 64), (37, 150)]


@dataclass(frozen=True, slots=True)
class Made:
    weights: Tensor
    statistics: Statistics
    ready: Factored
    problem: Problem
    solution: Solution


def made(rows: int, columns: int, lengthen: float = 8.0, scale: float = 1.0) -> Made:
    """Three experts, the last without tokens, with levels from rounding."""
    weights = random(3, rows, columns, seed=rows) * scale
    statistics = Statistics.zeros(3, columns)
    for expert in range(2):
        statistics.add(expert, correlated(400, columns, seed=10 * expert))
    ready = factored(statistics, torch.full((3,), 0.1))
    padding = Factored(
        padded_square(ready.hessian), padded_square(ready.factor), ready.unit, ready.damping,
        ready.fallback,
    )  # fmt: skip
    problem = Problem.of(weights, padding, padding.hessian, lengthen)
    levels = problem.weights.mul(6).round().clamp(-4, 4).to(torch.int8)
    start = padded_rows(torch.full((3, rows), 0.15))  # a little too small
    solution = Solution(problem, levels, start, padded_columns(torch.ones(3, columns)))
    return Made(weights, statistics, ready, problem, solution)


def prices_of(solution: Solution) -> Prices:
    price = torch.full_like(solution.scale, 1e-3)
    return Prices(price, price)


def quantized(solution: Solution) -> Array:
    scale, columns = array(solution.scale), array(solution.column_scale)
    return array(solution.levels) * scale[:, :, None] * columns[:, None]


def check(problem: Problem, solution: Solution, late: bool = False) -> None:
    """``late``: whether the gradient may lack the last change of row scales."""
    q, h, target = quantized(solution), array(problem.hessian), array(solution.target)
    product = target - array(solution.gradient)
    assert late or solution.ratio is None
    if solution.ratio is not None:
        product *= array(solution.ratio)[:, :, None]
    np.testing.assert_allclose(product, q @ h, rtol=1e-4, atol=1e-4)
    # The target is W H and a part of what inputs have seen, a share of each row.
    beyond = target - array(problem.exact)
    seen = array(problem.seen)
    share = (beyond * seen).sum(2) / np.maximum((seen * seen).sum(2), 1e-4)
    assert (share > -1e-5).all()
    assert (share < MAX_LENGTHEN + 1e-5).all()
    np.testing.assert_allclose(beyond, share[:, :, None] * seen, atol=1e-4)
    # Least squares: the rest is orthogonal to each row, but for the ridge.
    own = (q * (q @ h)).sum(2)
    assert (np.abs((q * (target - q @ h)).sum(2)) <= 1e-3 * (own + own.mean())).all()


def shuffled(width: int, seed: int) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengthen", [0.0, 8.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_problem(shape: tuple[int, int], lengthen: float) -> None:
    one = made(*shape, lengthen)
    problem, (rows, columns) = one.problem, shape
    assert problem.shape == shape
    assert problem.weights.shape == (3, -(-rows // LANES) * LANES, -(-columns // BLOCK) * BLOCK)
    assert problem.weights.dtype == problem.exact.dtype == problem.seen.dtype == torch.float32
    largest = one.weights.abs().amax((1, 2))
    assert torch.equal(problem.largest, largest.double())
    inside = (slice(None), slice(rows), slice(columns))
    w, h = array(one.weights / largest[:, None, None]), array(one.ready.hessian)
    np.testing.assert_allclose(array(problem.weights[inside]), w, rtol=1e-6)
    np.testing.assert_allclose(array(problem.exact[inside]), w @ h, atol=1e-4)
    d = np.array([0.1, 0.1, 1.0])[:, None, None]
    seen = w - d * (w @ np.linalg.inv(h))
    np.testing.assert_allclose(array(problem.seen[inside]), seen, atol=1e-4)
    assert problem.seen[2].abs().amax() < 1e-6, "without tokens nothing is seen"
    energy = ((w @ h) * w).sum(2) / columns
    np.testing.assert_allclose(array(problem.energy[:, :rows]), energy, rtol=1e-4)
    np.testing.assert_allclose(array(problem.square[:, :rows]), (w * w).sum(2), rtol=1e-5)
    for each in (problem.weights, problem.exact, problem.seen):
        assert not each[:, rows:].any()
        assert not each[:, :, columns:].any()
    check(problem, one.solution)
    share = float((one.solution.target - problem.exact).square().sum())
    assert (share > 0) == (lengthen > 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_belongs_together_stays_together(shape: tuple[int, int]) -> None:
    one = made(*shape)
    problem, solution = one.problem, one.solution
    width = problem.hessian.shape[1]
    prices = prices_of(solution)
    ternary, generator = torch.tensor([False] * 3), torch.Generator().manual_seed(0)
    check(problem, solution)
    most = 0.0
    for step in range(3):
        solution.refit_columns(problem, 10)
        check(problem, solution)
        order = shuffled(width, step)
        problem.reorder(order)
        solution.reorder(order)
        check(problem, solution)
        descend(problem, solution, prices, ternary, generator, True)
        check(problem, solution, late=True)
        assert solution.ratio is not None
        most = max(most, float((solution.ratio - 1).abs().amax()))
        if step == 1:
            solution.reorder(shuffled(width, 7))
            problem.reorder(shuffled(width, 7))
            check(problem, solution, late=True)
            solution.fit(problem)
            check(problem, solution)
    assert most > 1e-3, "some gradient was late"


@pytest.mark.parametrize("shape", SHAPES)
def test_reordering(shape: tuple[int, int]) -> None:
    one = made(*shape)
    problem, solution = one.problem, one.solution
    before = problem.weights, problem.exact, problem.seen, solution.levels
    more = solution.target, solution.gradient, solution.column_scale
    hessian, width = problem.hessian, problem.hessian.shape[1]
    first, second = shuffled(width, 1), shuffled(width, 2)
    for order in (first, second):
        problem.reorder(order)
        solution.reorder(order)
    order = first[second]
    assert torch.equal(problem.order, order)
    now = problem.weights, problem.exact, problem.seen, solution.levels
    for old, new in zip(before, now, strict=True):
        assert torch.equal(new, old[:, :, order])
    assert torch.equal(solution.target, more[0][:, :, order])
    assert torch.equal(solution.gradient, more[1][:, :, order])
    assert torch.equal(solution.column_scale, more[2][:, order])
    assert torch.equal(problem.hessian, hessian[:, order][:, :, order])
    back = problem.order.argsort()
    problem.reorder(back)
    assert torch.equal(problem.order, torch.arange(width))
    assert torch.equal(problem.hessian, hessian)


def values(result: LevelWeights) -> Array:
    assert result.column_scale is not None
    scale = array(result.row_scale) * array(result.column_scale)[:, None]
    product: Array = array(result.levels) * scale
    return product


@pytest.mark.parametrize("rounds", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result(shape: tuple[int, int], rounds: int) -> None:
    """Rounded scales, rows as long as before: q.Hw = w.Hw; in the order of W."""
    one = made(*shape, scale=3.0)
    problem, solution = one.problem, one.solution
    prices = prices_of(solution)
    ternary, generator = torch.tensor([False] * 3), torch.Generator().manual_seed(0)
    for step in range(rounds):
        order = shuffled(problem.hessian.shape[1], step)
        problem.reorder(order)
        solution.reorder(order)
        if step == 1:
            solution.refit_columns(problem, 10)
        descend(problem, solution, prices, ternary, generator, True)
    result = finished(problem, solution)
    assert result.levels.shape == one.weights.shape
    assert result.levels.dtype == torch.int8
    assert result.row_scale.dtype == torch.bfloat16
    assert result.row_scale.shape == (3, shape[0], 1)
    assert result.column_scale is not None
    assert result.column_scale.dtype == torch.bfloat16
    w, h, q = array(one.weights), array(one.ready.hessian), values(result)
    along = (q * (w @ h)).sum(2) / (w * (w @ h)).sum(2)
    # Half a unit in the last place of row scales, and a little for columns'.
    assert (np.abs(along - 1) < 2**-8).all()
    relative = ((w - q) @ h * (w - q)).sum((1, 2)) / (w @ h * w).sum((1, 2))
    assert (relative < 0.35).all()


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_result_of_nothing_but_rounding_is_the_solution(rounds: int) -> None:
    """Where levels are all there is to W, its scales are found, though the last ones were not."""
    one = made(37, 150)
    levels, scale = one.solution.levels[:, :37, :150], 0.5 + random(3, 37, 1).abs()
    weights = levels * scale
    ready = Factored(
        padded_square(one.ready.hessian), padded_square(one.ready.factor), one.ready.unit,
        one.ready.damping, one.ready.fallback,
    )  # fmt: skip
    problem = Problem.of(weights, ready, ready.hessian, 8.0)
    start = padded_rows(0.4 * torch.ones(3, 37)), padded_columns(torch.ones(3, 150))
    solution = Solution(problem, padded(levels), *start)
    # As if rows had been refitted in a round whose change of the gradient is still to come.
    if rounds:
        change = padded_rows(random(3, 37).mul(0.2).exp())
        solution.scale = solution.scale * change
        solution.ratio = change
    result = finished(problem, solution)
    assert torch.equal(result.levels, levels)
    np.testing.assert_allclose(array(result.row_scale), array(scale), rtol=2**-7)


def test_rows_are_stretched_by_a_limit() -> None:
    """A row whose only level hardly has to do with its outputs."""
    weights, hessian = torch.tensor([[[1.0, 0.1]]]), torch.eye(2)[None]
    ready = Factored(hessian, hessian, torch.ones(1).double(), [None], ["no tokens"])
    square = padded_square(ready.hessian)
    problem = Problem.of(
        weights, Factored(square, square, ready.unit, [None], ["no tokens"]), square, 0.0
    )
    levels = padded(torch.tensor([[[0, 1]]], dtype=torch.int8))
    columns = padded_columns(torch.ones(1, 2))
    solution = Solution(problem, levels, padded_rows(torch.full((1, 1), 0.1)), columns)
    before = float(solution.scale[0, 0])
    result = finished(problem, solution)
    assert float(result.row_scale[0, 0, 0]) == pytest.approx(MAX_STRETCH * before, rel=2**-8)


def test_rows_without_levels_and_scales_that_vanish() -> None:
    one = made(20, 40, scale=1e-40)
    one.solution.levels[:, 3] = 0
    result = finished(one.problem, one.solution)
    assert not result.row_scale[:, 3].any()
    assert not result.levels[:, 3].any()
    assert torch.equal(result.levels.any(2), result.row_scale[:, :, 0] > 0)
    one = made(20, 40)
    one.solution.column_scale[:, 5] = 1e-45
    result = finished(one.problem, one.solution)
    assert result.column_scale is not None
    assert not result.column_scale[:, 5].any()
    assert not result.levels[:, :, 5].any()


def test_scales_out_of_range() -> None:
    weights = torch.tensor([[[3e38, 3e38], [1.0, 3e38]]]).double() * 4
    square = padded_square(torch.eye(2)[None])
    ready = Factored(square, square, torch.ones(1).double(), [None], ["no tokens"])
    problem = Problem.of(weights, ready, square, 0.0)
    levels = padded(torch.ones(1, 2, 2, dtype=torch.int8))
    ones = padded_rows(torch.ones(1, 2)), padded_columns(torch.ones(1, 2))
    solution = Solution(problem, levels, *ones)
    said = refusal(lambda: finished(problem, solution), "value")
    assert said == (
        "expert 0, row 0: weights up to 1.2e+39 are beyond scales of bfloat16; rescale the model"
    )


def test_threads_change_nothing() -> None:
    results = []
    for threads in (1, 2, 3):
        with many_threads(threads):
            one = made(75, 150)
            one.solution.refit_columns(one.problem, 20)
            order = shuffled(one.problem.hessian.shape[1], 1)
            one.problem.reorder(order)
            one.solution.reorder(order)
            results.append((one.solution.target, one.solution.gradient, one.solution.scale))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
