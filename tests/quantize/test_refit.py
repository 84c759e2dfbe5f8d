"""Least squares against numpy's, on the square root of the Hessian."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.quantize import refit
from qmoe_format.quantize.refit import refit_columns, refit_rows
from tests.quantize.problems import Array, Problem, array

SHAPES = [(1, 1, 1), (2, 1, 7), (2, 9, 1), (3, 17, 33), (1, 40, 70)]


def rows_of(problem: Problem) -> torch.Tensor:
    own = (problem.quantized * (problem.hessian @ problem.quantized)).sum(1)
    aim = (problem.quantized * problem.target).sum(1)
    return problem.scale * refit_rows(own, aim)


def columns_of(problem: Problem) -> torch.Tensor:
    each = zip(
        problem.trits,
        problem.hessian,
        problem.target,
        problem.scale,
        problem.column_scale,
        strict=True,
    )
    return torch.stack([refit_columns(*arguments) for arguments in each])


def root(hessian: torch.Tensor) -> Array:
    """L with L L^T = H: the error of d is |L^T d|^2."""
    return np.linalg.cholesky(array(hessian)).astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_least_squares(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "ROW_RIDGE", 0.0)
    problem = Problem.of(*shape, seed=sum(shape))
    scale = rows_of(problem)
    assert scale.shape == problem.scale.shape
    for expert in range(shape[0]):
        factor = root(problem.hessian[expert]).T
        a = factor @ (array(problem.trits[expert]) * array(problem.column_scale[expert])[:, None])
        w = factor @ array(problem.weights[expert])
        for row in range(shape[1]):
            old, new = float(problem.scale[expert, row]), float(scale[expert, row])
            if problem.trits[expert, :, row].any():
                best = np.linalg.lstsq(a[:, [row]], w[:, row], rcond=None)[0][0]
                sane = 0.05 < best / old < 20
                assert new == pytest.approx(best if sane else old, rel=1e-4)
            else:
                assert new == old


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_the_least_squares(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "STEPS", 100)
    problem = Problem.of(*shape, seed=sum(shape))
    _, rows, columns = shape
    new = columns_of(problem)
    assert new.dtype == torch.float32
    for expert in range(shape[0]):
        # One equation for each number of L^T (W - Q), one for each ridge.
        factor = root(problem.hessian[expert])
        a = array(problem.trits[expert]) * array(problem.scale[expert])
        design = np.zeros((columns * rows, columns))
        for i in range(columns):
            design[:, i] = np.outer(factor[i], a[i]).ravel()
        aim = (factor.T @ array(problem.weights[expert])).ravel()
        diagonal = (design**2).sum(0)
        ridge = np.diag(np.sqrt(refit.COLUMN_RIDGE * (diagonal + 0.1 * diagonal.mean())))
        old = array(problem.column_scale[expert])
        best = np.linalg.lstsq(
            np.concatenate([design, ridge]), np.concatenate([aim, ridge @ old]), rcond=None
        )[0]
        sane = (best / old > 0.1) & (best / old < 10)
        if not diagonal.any():
            sane[:] = False
        np.testing.assert_allclose(array(new[expert]), np.where(sane, best, old), rtol=1e-3)


def test_few_steps_for_columns_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.of(2, 90, 70, seed=3)

    def error(columns: torch.Tensor) -> float:
        return float(problem.errors(problem.trits, problem.scale, columns).sum())

    few = error(columns_of(problem))
    monkeypatch.setattr(refit, "STEPS", 200)
    before, least = error(problem.column_scale), error(columns_of(problem))
    assert few - least < 0.01 * (before - least)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 40),
    away=st.floats(-2, 2),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_rows_never_make_the_error_larger(rows: int, columns: int, away: float, seed: int) -> None:
    problem = Problem.of(2, rows, columns, seed)
    problem.scale.mul_(10**away)
    scale = rows_of(problem)
    assert (scale > 0).all()
    before = problem.errors(problem.trits, problem.scale, problem.column_scale)
    after = problem.errors(problem.trits, scale, problem.column_scale)
    assert (after <= before * (1 + 1e-4) + 1e-5).all()


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 40),
    away=st.floats(-0.5, 0.5),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_columns_never_make_the_error_larger(
    rows: int, columns: int, away: float, seed: int
) -> None:
    problem = Problem.of(2, rows, columns, seed)
    problem.column_scale.mul_(10**away)
    new = columns_of(problem)
    assert (new > 0).all()
    before = problem.errors(problem.trits, problem.scale, problem.column_scale).sum(1)
    after = problem.errors(problem.trits, problem.scale, new).sum(1)
    assert (after <= before * (1 + 1e-4) + 1e-5).all()


def test_a_column_whose_best_scale_is_negative_does_not_make_the_error_larger() -> None:
    # Least squares is c = (2, -0.9); with the second at 0.3, 2 is not the best for the first.
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    weights = torch.tensor([[2.0], [-0.9]])
    trits, scale, old = torch.ones(2, 1), torch.ones(1), torch.tensor([1.0, 0.3])
    new = refit_columns(trits, hessian, hessian @ weights, scale, old)
    assert (new > 0).all()

    def error(column_scale: torch.Tensor) -> float:
        off = weights - trits * column_scale[:, None]
        return float((off * (hessian @ off)).sum())

    assert error(new) <= error(old) * 1.001


def test_what_is_not_used_keeps_its_scale() -> None:
    problem = Problem.of(1, 6, 8, seed=2)
    problem.trits[:, 3] = 0
    problem.trits[:, :, 4] = 0
    scale = rows_of(problem)
    assert scale[0, 4] == problem.scale[0, 4]
    assert (scale != problem.scale).sum() == 5
    new = columns_of(problem)
    assert new[0, 3] == pytest.approx(float(problem.column_scale[0, 3]), rel=1e-6)
    problem.trits[:] = 0
    scale = rows_of(problem)
    assert torch.equal(scale, problem.scale)
    assert torch.equal(columns_of(problem), problem.column_scale)


def test_exact_weights_stay_exact() -> None:
    problem = Problem.of(2, 10, 20, seed=6)
    problem.weights.copy_(problem.quantized)
    scale = rows_of(problem)
    torch.testing.assert_close(scale, problem.scale)
    torch.testing.assert_close(columns_of(problem), problem.column_scale)


def test_a_scale_that_is_far_off_is_found() -> None:
    problem = Problem.of(1, 10, 20, seed=7)
    problem.weights.copy_(problem.quantized)
    right = problem.column_scale.clone()
    problem.column_scale[0, 5] *= 1.5
    torch.testing.assert_close(columns_of(problem), right, rtol=1e-2, atol=0)
