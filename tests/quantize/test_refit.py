"""Least squares against numpy's, on the square root of the Hessian."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.quantize.refit import COLUMN_RIDGE, ROW_RIDGE, refit_columns, refit_rows
from tests.quantize.problems import Array, Batch, array

SHAPES = [(1, 1, 1), (2, 1, 7), (2, 9, 1), (3, 17, 33), (1, 40, 70)]


def rows_of(batch: Batch) -> torch.Tensor:
    own = (batch.quantized * (batch.hessian @ batch.quantized)).sum(1)
    aim = (batch.quantized * batch.target).sum(1)
    return batch.scale * refit_rows(own, aim)


def columns_of(batch: Batch, steps: int = 8) -> torch.Tensor:
    parts = (batch.levels, batch.hessian, batch.target, batch.scale, batch.column_scale)
    return torch.stack([refit_columns(*each, steps) for each in zip(*parts, strict=True)])


def root(hessian: torch.Tensor) -> Array:
    """L with L L^T = H: the error of d is |L^T d|^2."""
    return np.linalg.cholesky(array(hessian)).astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_least_squares(shape: tuple[int, int, int]) -> None:
    batch = Batch.of(*shape, seed=sum(shape))
    scale = rows_of(batch)
    assert scale.shape == batch.scale.shape
    for expert in range(shape[0]):
        factor = root(batch.hessian[expert]).T
        a = factor @ (array(batch.levels[expert]) * array(batch.column_scale[expert])[:, None])
        w = factor @ array(batch.weights[expert])
        own = (a**2).sum(0) * array(batch.scale[expert]) ** 2
        ridges = np.sqrt(ROW_RIDGE * (own + own.mean()))
        for row in range(shape[1]):
            old, new = float(batch.scale[expert, row]), float(scale[expert, row])
            if batch.levels[expert, :, row].any():
                design = np.append(a[:, row], ridges[row] / old)[:, None]
                best = np.linalg.lstsq(design, np.append(w[:, row], ridges[row]), rcond=None)[0][0]
                sane = 0.05 < best / old < 20
                assert new == pytest.approx(best if sane else old, rel=1e-4)
            else:
                assert new == old


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_the_least_squares(shape: tuple[int, int, int]) -> None:
    batch = Batch.of(*shape, seed=sum(shape))
    _, rows, columns = shape
    new = columns_of(batch, steps=100)
    assert new.dtype == torch.float32
    for expert in range(shape[0]):
        # One equation for each element of L^T (W - Q), and one for each ridge.
        factor = root(batch.hessian[expert])
        a = array(batch.levels[expert]) * array(batch.scale[expert])
        design = np.zeros((columns * rows, columns))
        for i in range(columns):
            design[:, i] = np.outer(factor[i], a[i]).ravel()
        aim = (factor.T @ array(batch.weights[expert])).ravel()
        diagonal = (design**2).sum(0)
        ridge = np.diag(np.sqrt(COLUMN_RIDGE * (diagonal + 0.1 * diagonal.mean())))
        old = array(batch.column_scale[expert])
        best = np.linalg.lstsq(
            np.concatenate([design, ridge]), np.concatenate([aim, ridge @ old]), rcond=None
        )[0]
        sane = (best / old > 0.1) & (best / old < 10)
        if not diagonal.any():
            sane[:] = False
        np.testing.assert_allclose(array(new[expert]), np.where(sane, best, old), rtol=1e-3)


def test_few_steps_for_columns_are_nearly_as_good() -> None:
    batch = Batch.of(2, 90, 70, seed=3)

    def error(columns: torch.Tensor) -> float:
        return float(batch.errors(batch.levels, batch.scale, columns).sum())

    before, few, least = map(
        error, (batch.column_scale, columns_of(batch), columns_of(batch, steps=200))
    )
    assert few - least < 0.01 * (before - least)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 40),
    away=st.floats(-2, 2),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_rows_never_make_the_error_larger(rows: int, columns: int, away: float, seed: int) -> None:
    batch = Batch.of(2, rows, columns, seed)
    batch.scale.mul_(10**away)
    scale = rows_of(batch)
    assert (scale > 0).all()
    before = batch.errors(batch.levels, batch.scale, batch.column_scale)
    after = batch.errors(batch.levels, scale, batch.column_scale)
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
    batch = Batch.of(2, rows, columns, seed)
    batch.column_scale.mul_(10**away)
    new = columns_of(batch)
    assert (new > 0).all()
    before = batch.errors(batch.levels, batch.scale, batch.column_scale).sum(1)
    after = batch.errors(batch.levels, batch.scale, new).sum(1)
    assert (after <= before * (1 + 1e-4) + 1e-5).all()


def test_a_column_whose_best_scale_is_negative_does_not_make_the_error_larger() -> None:
    # Least squares is c = (2, -0.9); with the second at 0.3, 2 is not the best for the first.
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    weights = torch.tensor([[2.0], [-0.9]])
    levels, scale, old = torch.ones(2, 1), torch.ones(1), torch.tensor([1.0, 0.3])
    new = refit_columns(levels, hessian, hessian @ weights, scale, old)
    assert (new > 0).all()

    def error(column_scale: torch.Tensor) -> float:
        off = weights - levels * column_scale[:, None]
        return float((off * (hessian @ off)).sum())

    assert error(new) <= error(old) * 1.001


def test_unused_rows_and_columns_keep_their_scales() -> None:
    batch = Batch.of(1, 6, 8, seed=2)
    batch.levels[:, 3] = 0
    batch.levels[:, :, 4] = 0
    scale = rows_of(batch)
    assert scale[0, 4] == batch.scale[0, 4]
    assert (scale != batch.scale).sum() == 5
    new = columns_of(batch)
    assert new[0, 3] == pytest.approx(float(batch.column_scale[0, 3]), rel=1e-6)
    batch.levels[:] = 0
    scale = rows_of(batch)
    assert torch.equal(scale, batch.scale)
    assert torch.equal(columns_of(batch), batch.column_scale)


def test_exact_weights_stay_exact() -> None:
    batch = Batch.of(2, 10, 20, seed=6)
    batch.weights.copy_(batch.quantized)
    scale = rows_of(batch)
    torch.testing.assert_close(scale, batch.scale)
    torch.testing.assert_close(columns_of(batch), batch.column_scale)


def test_a_wrong_scale_is_corrected() -> None:
    batch = Batch.of(1, 10, 20, seed=7)
    batch.weights.copy_(batch.quantized)
    right = batch.column_scale.clone()
    batch.column_scale[0, 5] *= 1.5
    torch.testing.assert_close(columns_of(batch), right, rtol=1e-2, atol=0)
