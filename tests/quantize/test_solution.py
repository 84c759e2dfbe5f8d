"""Scales, target and gradient of a solution belong together."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.quantize.hessian import factored
from qmoe_format.quantize.solution import Problem, Solution
from tests.quantize.problems import calibrated, correlated, random


def check(problem: Problem, solution: Solution) -> None:
    quantized = solution.levels * solution.scale[:, None] * solution.column_scale[:, :, None]
    product = problem.hessian @ quantized
    gradient = solution.target - product
    torch.testing.assert_close(solution.gradient, gradient, rtol=1e-4, atol=1e-4)
    # Least squares: the rest is orthogonal to each row, but for the ridge.
    own = (quantized * product).sum(1)
    assert ((quantized * gradient).sum(1).abs() < 1e-2 * own).all()


def test_refits_and_reordering() -> None:
    statistics = calibrated([correlated(400, 40, seed) for seed in (0, 10, 20)])
    ready = factored(statistics, torch.full((3,), 0.1))
    problem = Problem.of(random(3, 20, 40), ready, ready.hessian, lengthen=8.0)
    levels = torch.where(problem.weights.abs() > 0.3, problem.weights.sign(), 0.0)
    solution = Solution.fit(problem, levels, torch.ones(3, 20), torch.ones(3, 40))
    check(problem, solution)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    problem, solution = problem.reordered(order), solution.reordered(order)
    check(problem, solution)
    for refitted in (solution.columns_refitted(problem), solution.rows_refitted()):
        check(problem, refitted)
    back = problem.reordered(problem.order.argsort())
    assert torch.equal(back.order, torch.arange(40))
    assert torch.equal(back.reordered(order).hessian, problem.hessian)
