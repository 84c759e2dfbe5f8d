"""Row scales against numpy's least squares; steps of column scales against what is best."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize import cpu_steps
from qmoe_format.quantize.kernels.fit import CHUNK
from qmoe_format.quantize.padding import padded, padded_columns, padded_rows, padded_square
from qmoe_format.quantize.refit import (
    COLUMN_RIDGE,
    MAX_SHARE,
    ROW_RIDGE,
    best_share,
    column_steps,
    refit_rows,
)
from tests.quantize.problems import Array, Batch, array, many_threads, random

SHAPES = [(1, 1, 1), (2, 1, 7), (2, 9, 1), (3, 17, 33), (1, 40, 70)]


def rows_of(batch: Batch) -> Tensor:
    own = (batch.quantized @ batch.hessian * batch.quantized).sum(2)
    aim = (batch.quantized * batch.target).sum(2)
    return batch.scale * refit_rows(own, aim)


def refitted(
    batch: Batch, most: int | None = None, ratio: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Column scales and gradient after a step.

    ``ratio``: by which target - gradient is yet to be multiplied.
    """
    _, rows, columns = batch.weights.shape
    ratio = torch.ones_like(batch.scale) if ratio is None else ratio
    target = padded(batch.target)
    product = (batch.target - batch.gradient) / ratio[:, :, None]
    gradient = padded(batch.target - product)
    new = padded_columns(batch.column_scale.clone())
    cpu_steps.refit_columns(
        padded(batch.levels), padded_rows(batch.scale), new, target, gradient, padded_rows(ratio),
        padded_square(batch.hessian), columns if most is None else most,
    )  # fmt: skip
    assert (new[:, columns:] == 1).all(), "padding stays 1"
    assert not gradient[:, rows:].any(), "padding stays 0"
    assert not gradient[:, :, columns:].any(), "padding stays 0"
    return new[:, :columns], gradient[:, :rows, :columns]


def root(hessian: Tensor) -> Array:
    """L with L L^T = H: the error of d is |d L|^2."""
    return np.linalg.cholesky(array(hessian)).astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_least_squares(shape: tuple[int, int, int]) -> None:
    batch = Batch.of(*shape, seed=sum(shape))
    scale = rows_of(batch)
    assert scale.shape == batch.scale.shape
    for expert in range(shape[0]):
        factor = root(batch.hessian[expert])
        a = (array(batch.levels[expert]) * array(batch.column_scale[expert])) @ factor
        w = array(batch.weights[expert]) @ factor
        own = (a**2).sum(1) * array(batch.scale[expert]) ** 2
        ridges = np.sqrt(ROW_RIDGE * (own + own.mean()))
        for row in range(shape[1]):
            old, new = float(batch.scale[expert, row]), float(scale[expert, row])
            if batch.levels[expert, row].any():
                design = np.append(a[row], ridges[row] / old)[:, None]
                best = np.linalg.lstsq(design, np.append(w[row], ridges[row]), rcond=None)[0][0]
                sane = 0.05 < best / old < 20
                assert new == pytest.approx(best if sane else old, rel=1e-4)
            else:
                assert new == old


def sums_of(batch: Batch, expert: int) -> tuple[Tensor, Tensor]:
    """What ``column_steps`` needs: A_i . G_i and A_i . A_i H_ii."""
    a = batch.levels[expert] * batch.scale[expert, :, None]
    own = a.square().sum(0) * batch.hessian[expert].diagonal()
    return (a * batch.gradient[expert]).sum(0), own


def errors_of(batch: Batch, column_scale: Array) -> float:
    """Of the only expert, in float64."""
    value = array(batch.scale[0])[:, None] * column_scale
    off = array(batch.weights[0]) - array(batch.levels[0]) * value
    return float((off @ array(batch.hessian[0]) * off).sum())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 7), (9, 1), (17, 33), (40, 70)])
def test_steps_of_columns_are_each_the_best(shape: tuple[int, int], share: float) -> None:
    batch = Batch.of(1, *shape, seed=sum(shape))
    most = int(share * shape[1])
    aim, own = sums_of(batch, 0)
    columns, steps = column_steps(aim, own, batch.column_scale[0], most)
    assert columns.shape == steps.shape == (most,)
    assert len(set(columns.tolist())) == most
    # The best of a column alone, from three errors along the line, with the ridge added.
    old = array(batch.column_scale[0])
    ridge = COLUMN_RIDGE * (array(own) + 0.1 * array(own).mean())
    here, best, gain = errors_of(batch, old), np.zeros(shape[1]), np.zeros(shape[1])
    for i in range(shape[1]):
        ahead, behind = (errors_of(batch, old + s * np.eye(shape[1])[i]) for s in (0.5, -0.5))
        slope, curve = ahead - behind, 2 * (ahead + behind - 2 * here) + ridge[i]
        step = -slope / (2 * curve) if own[i] > 0 else 0.0
        ratio = 1 + MAX_SHARE * step / old[i]
        best[i] = step if 0.1 < ratio < 10 else 0.0
        gain[i] = -best[i] * slope / 2
    np.testing.assert_allclose(array(steps), best[columns], rtol=1e-3, atol=1e-4)
    rest = np.delete(gain, columns)
    if most and len(rest):
        assert gain[columns].min() >= rest.max() * (1 - 1e-3) - 1e-6
    for i, step in zip(columns.tolist(), array(steps), strict=True):
        assert errors_of(batch, old + step * np.eye(shape[1])[i]) <= here + 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_the_share_is_the_best_along_the_line(seed: int) -> None:
    batch = Batch.of(1, 12, 20 + seed, seed=seed)
    aim, own = sums_of(batch, 0)
    columns, steps = column_steps(aim, own, batch.column_scale[0], 10)
    whole = np.zeros(20 + seed)
    whole[columns] = array(steps)
    old = array(batch.column_scale[0])
    move = array(batch.levels[0]) * array(batch.scale[0])[:, None] * whole
    curved = (move @ array(batch.hessian[0]) * move).sum()
    share = best_share(steps, aim[columns], torch.tensor(curved, dtype=torch.float64))
    assert share.dtype == torch.float32
    line = np.linspace(0, MAX_SHARE, 301)
    errors = [errors_of(batch, old + s * whole) for s in line]
    assert float(share) == pytest.approx(line[np.argmin(errors)], abs=0.006)
    assert errors_of(batch, old + float(share) * whole) <= min(errors) * (1 + 1e-5)


def test_the_share_is_bounded() -> None:
    steps, aim = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])
    for curved, expected in ((8.0, 0.5), (4.0, 1.0), (1e-3, MAX_SHARE), (0.0, 0.0)):
        assert float(best_share(steps, aim, torch.tensor(curved).double())) == expected
    assert float(best_share(steps, -aim, torch.tensor(8.0).double())) == 0
    nothing = torch.zeros(0)
    assert float(best_share(nothing, nothing, torch.tensor(0.0).double())) == 0


def test_no_scale_becomes_negative() -> None:
    """Where steps go together further than each alone, with few inputs and small scales."""
    longest = 0.0
    for seed in range(60):
        inputs, levels = random(8, 6, seed=seed), random(5, 6, seed=seed + 100).round()
        hessian = inputs.T @ inputs / 8 + 0.01 * torch.eye(6)
        old = 0.5 + random(6, seed=seed + 200).abs().clamp(max=1)
        levels.clamp_(-1, 1)
        gradient = (random(5, 6, seed=seed + 300) - levels * old) @ hessian
        aim, own = (levels * gradient).sum(0), levels.square().sum(0) * hessian.diagonal()
        columns, steps = column_steps(aim, own, old, 6)
        move = levels[:, columns] * steps
        curved = (move @ hessian[columns][:, columns] * move).sum().double()
        share = best_share(steps, aim[columns], curved)
        assert (old[columns] + share * steps > 0).all()
        longest = max(longest, float(share))
    assert longest > 1.2


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_many_steps_are_the_least_squares(share: float) -> None:
    """A few are nearly as good."""
    batch = Batch.of(1, 90, 70, seed=3)
    factor = root(batch.hessian[0])
    a = array(batch.levels[0]) * array(batch.scale[0])[:, None]
    design = (a[:, :, None] * factor).transpose(0, 2, 1).reshape(-1, 70)
    aim = (array(batch.weights[0]) @ factor).ravel()
    best = np.linalg.lstsq(design, aim, rcond=None)[0].astype(np.float64)
    assert (best > 0).all()
    least = errors_of(batch, best)
    before, found = errors_of(batch, array(batch.column_scale[0])), []
    for _ in range(30):
        batch.column_scale.copy_(refitted(batch, int(70 * share))[0])
        found.append(errors_of(batch, array(batch.column_scale[0])))
    assert (np.diff([before, *found]) <= 1e-6).all()
    left = [(each - least) / (before - least) for each in found]
    assert left[7] < (1e-6 if share == 1 else 1e-3)
    assert left[-1] < 1e-6


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
    rows=st.integers(1, 20) | st.just(CHUNK + 3),
    columns=st.integers(1, 40),
    away=st.floats(-0.5, 0.5),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    late=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_columns_never_make_the_error_larger(
    rows: int, columns: int, away: float, share: float, late: bool, seed: int
) -> None:
    batch = Batch.of(2, rows, columns, seed)
    batch.column_scale.mul_(10**away)
    most = int(columns * share)
    ratio = random(2, rows, seed=seed).mul(0.3).exp() if late else None
    new, gradient = refitted(batch, most, ratio)
    assert (new > 0).all()
    assert ((new != batch.column_scale).sum(1) <= most).all()
    before = batch.errors(batch.levels, batch.scale, batch.column_scale).sum(1)
    after = batch.errors(batch.levels, batch.scale, new).sum(1)
    assert (after <= before * (1 + 1e-4) + 1e-5).all()
    value = array(batch.scale)[:, :, None] * array(new)[:, None]
    off = array(batch.weights) - array(batch.levels) * value
    expected = off @ array(batch.hessian)
    largest = max(np.abs(expected).max(), np.abs(array(batch.target)).max())
    np.testing.assert_allclose(array(gradient), expected, atol=2e-5 * (1 + largest))


def test_a_column_whose_best_scale_is_negative_does_not_make_the_error_larger() -> None:
    # Least squares is c = (2, -0.9); with the second at 0.3, 2 is not the best for the first.
    hessian = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    weights, levels = torch.tensor([[[2.0, -0.9]]]), torch.ones(1, 1, 2, dtype=torch.int8)
    batch = Batch(weights, hessian, levels, torch.ones(1, 1), torch.tensor([[1.0, 0.3]]))
    errors = [errors_of(batch, array(batch.column_scale[0]))]
    for _ in range(20):
        batch.column_scale.copy_(refitted(batch)[0])
        assert (batch.column_scale > 0).all()
        errors.append(errors_of(batch, array(batch.column_scale[0])))
        assert errors[-1] <= errors[-2] * 1.001
    assert errors[-1] < 0.98 * errors[0]


def test_unused_rows_and_columns_keep_their_scales() -> None:
    batch = Batch.of(1, 6, 8, seed=2)
    batch.levels[:, :, 3] = 0
    batch.levels[:, 4] = 0
    scale = rows_of(batch)
    assert scale[0, 4] == batch.scale[0, 4]
    assert (scale != batch.scale).sum() == 5
    new, _ = refitted(batch)
    assert new[0, 3] == batch.column_scale[0, 3]
    assert (new != batch.column_scale).sum() == 7
    batch.levels[:] = 0
    scale = rows_of(batch)
    assert torch.equal(scale, batch.scale)
    assert torch.equal(refitted(batch)[0], batch.column_scale)


def test_exact_weights_stay_exact() -> None:
    batch = Batch.of(2, 10, 20, seed=6)
    batch.weights.copy_(batch.quantized)
    scale = rows_of(batch)
    torch.testing.assert_close(scale, batch.scale)
    torch.testing.assert_close(refitted(batch)[0], batch.column_scale)


@pytest.mark.parametrize("most", [1, 5, 20])
def test_a_wrong_scale_is_corrected(most: int) -> None:
    batch = Batch.of(1, 10, 20, seed=7)
    batch.weights.copy_(batch.quantized)
    right = batch.column_scale.clone()
    batch.column_scale[0, 5] *= 1.5
    for _ in range(12):
        batch.column_scale.copy_(refitted(batch, most)[0])
    torch.testing.assert_close(batch.column_scale, right, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", [75, 2 * CHUNK + 20])
def test_threads_and_other_experts_change_nothing(rows: int) -> None:
    batch, ratio = Batch.of(3, rows, 90, seed=8), random(3, rows).mul(0.2).exp()
    results = []
    for threads in (1, 2, 3):
        with many_threads(threads):
            results.append(refitted(batch, 20, ratio))
    for new, gradient in results[1:]:
        assert torch.equal(new, results[0][0])
        assert torch.equal(gradient, results[0][1])
    for expert in range(3):
        one = slice(expert, expert + 1)
        alone = Batch(
            batch.weights[one], batch.hessian[one], batch.levels[one], batch.scale[one],
            batch.column_scale[one],
        )  # fmt: skip
        torch.testing.assert_close(refitted(alone, 20, ratio[one])[0], results[0][0][one])
