"""Sums over tokens, damping, factors and fallbacks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # an export not declared as one

from qmoe_format.quantize import hessian as hessian_module
from qmoe_format.quantize import recipe
from qmoe_format.quantize.hessian import (
    Statistics,
    factored,
    inverse_factor,
    relative_error,
)
from qmoe_format.quantize.rate import Rate
from tests.quantize.problems import array, calibrated, correlated, energy, random


def test_no_tokens() -> None:
    statistics = Statistics.zeros(3, 5)
    statistics.add(1, torch.zeros(0, 5))
    assert not statistics.sums.any()
    assert statistics.tokens.tolist() == [0, 0, 0]
    assert statistics.sums.shape == (3, 5, 5)
    assert statistics.sums.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2, 37, 100_000])
def test_sums_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    inputs = correlated(tokens, 6)
    statistics = Statistics.zeros(2, 6, dtype=dtype)
    statistics.add(1, inputs)
    assert statistics.sums.dtype == dtype
    assert statistics.tokens.tolist() == [0, tokens]
    assert not statistics.sums[0].any()
    x = array(inputs)
    expected = sum((np.outer(each, each) for each in x[:50]), x[50:].T @ x[50:])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(
        array(statistics.sums[1]), expected, atol=tolerance * np.abs(expected).max()
    )


@given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    rows=st.sampled_from([0, 1, 4]),
)
@settings(deadline=None, max_examples=30)
def test_chunks_add_up(cuts: list[int], dtype: torch.dtype, rows: int) -> None:
    inputs = correlated(60, 7).to(dtype)
    importance = random(60, rows, seed=9).square() if rows else None
    statistics = Statistics.zeros(2, 7, max(rows, 1), dtype=torch.float64)
    edges = [0, *sorted(cuts), 60]
    for start, end in itertools.pairwise(edges):
        part = slice(start, end)
        statistics.add(1, inputs[part])
        if importance is not None:
            statistics.weigh(1, importance[part])
    x = array(inputs)
    np.testing.assert_allclose(array(statistics.sums[1]), x.T @ x, rtol=1e-5, atol=1e-5)
    counts = np.ones((60, 1)) if importance is None else array(importance)
    expected = np.maximum(counts.mean(0), 1e-3 * counts.mean())
    np.testing.assert_allclose(statistics.importance()[1].numpy(), expected, rtol=1e-5)
    assert statistics.tokens.tolist() == [0, 60]
    assert not statistics.sums[0].any()
    assert not statistics.row_importance[0].any()


@given(
    columns=st.integers(1, 40),
    tokens=st.integers(1, 80),
    damping=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=40)
def test_the_factor_of_the_inverse(columns: int, tokens: int, damping: float, seed: int) -> None:
    x = array(correlated(tokens, columns, seed))
    hessian = x.T @ x
    hessian += damping * hessian.diagonal().mean() * np.eye(columns)
    factor = array(inverse_factor(torch.from_numpy(hessian)))
    assert np.array_equal(factor, np.triu(factor))
    assert (factor.diagonal() > 0).all()
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(columns), atol=1e-8)


@pytest.mark.parametrize("columns", [7, 8, 9, 16, 29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_in_blocks(
    monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype
) -> None:
    """Of one matrix and of many, whether or not blocks are whole."""
    monkeypatch.setattr(hessian_module, "_BLOCK", 8)
    x = array(correlated(3 * columns, columns, columns))
    hessian = x.T @ x / len(x)
    hessian += 0.1 * hessian.diagonal().mean() * np.eye(columns)
    many = torch.from_numpy(np.stack([hessian, 3 * np.eye(columns), hessian.T * 0.5])).to(dtype)
    for found in (inverse_factor(many), torch.stack([inverse_factor(each) for each in many])):
        assert found.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        for each, factor in zip(array(many), array(found), strict=True):
            assert np.array_equal(factor, np.triu(factor))
            expected = np.linalg.cholesky(np.linalg.inv(each)).T
            atol = tolerance * np.abs(expected).max()
            np.testing.assert_allclose(factor, expected, atol=atol)


def test_the_factor_of_many_columns() -> None:
    """More than fit in a block."""
    columns = 1100
    assert columns > hessian_module._BLOCK
    statistics = calibrated([correlated(columns, columns)])
    result = factored(statistics, torch.tensor([0.1]))
    h, factor = array(result.hessian[0]), array(result.factor[0])
    assert np.array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ (factor @ h), np.eye(columns), atol=1e-3)


@pytest.mark.parametrize("columns", [7, 8, 9, 21])
def test_sums_in_blocks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(hessian_module, "_BLOCK", 8)
    inputs = correlated(60, columns)
    statistics = Statistics.zeros(2, columns)
    for part in (inputs[:1], inputs[1:23], inputs[23:]):
        statistics.add(1, part)
    x, sums = array(inputs), array(statistics.sums[1])
    expected = x.T @ x
    np.testing.assert_allclose(sums, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(sums, sums.T, atol=1e-6 * np.abs(expected).max())
    for first in range(0, columns, 8):  # blocks off the diagonal are copies
        here, rest = slice(first, first + 8), slice(first + 8, None)
        assert np.array_equal(sums[rest, here], sums[here, rest].T)
    assert not statistics.sums[0].any()


def shared(experts: int = 3, columns: int = 12) -> Statistics:
    """Whose factors are kept."""
    statistics = calibrated([correlated(50, columns, 7 * e) for e in range(experts)])
    statistics.known = {}
    return statistics


@pytest.fixture
def factorizations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The Hessians that have been factored."""
    found: list[Tensor] = []

    def count(hessian: Tensor) -> Tensor:
        found.append(hessian.clone())
        return inverse_factor(hessian)

    monkeypatch.setattr(hessian_module, "inverse_factor", count)
    return found


def test_matrices_that_share_sums_share_factors(factorizations: list[Tensor]) -> None:
    statistics, damping = shared(), torch.full((3,), 0.1)
    other = replace(statistics, row_importance=torch.ones(3, 4))
    first = factored(statistics, damping)
    assert len(factorizations) == 3
    again = factored(other, damping.clone())
    assert len(factorizations) == 3
    usual = factored(replace(statistics, known=None), damping)
    assert len(factorizations) == 6, "without anything known, all are factored"
    for result in (first, again):
        assert torch.equal(result.hessian, usual.hessian)
        assert torch.equal(result.factor, usual.factor)
        assert torch.equal(result.unit, usual.unit)
        assert result.damping == usual.damping
        assert result.fallback == usual.fallback


def test_other_dampings_are_other_factors(factorizations: list[Tensor]) -> None:
    statistics = shared()
    for damping in ([0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [0.2, 0.1, 0.1]):
        for _ in range(2):
            result = factored(statistics, torch.tensor(damping))
            assert result.damping == pytest.approx(damping)
            usual = factored(replace(statistics, known=None), torch.tensor(damping))
            assert torch.equal(result.factor, usual.factor)
    assert len(factorizations) == 3 * (3 + 6)


def test_more_tokens_are_other_factors() -> None:
    statistics, damping = shared(), torch.full((3,), 0.1)
    other, part = replace(statistics), statistics.of(slice(0, 2))
    factored(statistics, damping)
    factored(part, damping[:2])
    other.add(1, correlated(20, 12, 99))
    for each in (statistics, other, statistics.of(slice(0, 2)), part):
        found = factored(each, damping[: len(each.sums)])
        usual = factored(replace(each, known=None), damping[: len(each.sums)])
        assert torch.equal(found.hessian, usual.hessian)
        assert torch.equal(found.factor, usual.factor)


def test_parts_have_factors_of_their_own(factorizations: list[Tensor]) -> None:
    statistics = shared(4)
    slices = [slice(0, 2), slice(2, 4), slice(1, 3), slice(0, 4, 2), slice(0, 4, 3), slice(0, 4)]
    for _ in range(2):
        for some in slices:
            part = statistics.of(some)
            assert part.known is not None
            damping = torch.full((len(part.sums),), 0.1)
            found = factored(part, damping)
            assert len(found.factor) == len(part.sums)
            assert torch.equal(found.hessian.diagonal(dim1=1, dim2=2).mean(1) > 1, damping > 0)
            for hessian, sums in zip(found.hessian, part.sums, strict=True):
                expected = sums / sums.diagonal().mean() + 0.1 * torch.eye(12)
                torch.testing.assert_close(hessian, expected)
    assert len(factorizations) == 5 * 2 + 4
    assert statistics.of(slice(1, 2)).of(slice(0, 1)).known is not None
    assert calibrated([correlated(9, 4)]).of(slice(0, 1)).known is None


def test_parts_are_not_mistaken_for_dampings() -> None:
    """Of the first and second of two: experts 0 to 2, or dampings of 0 and 2."""
    statistics = shared(2)
    factored(statistics.of(slice(1, 2)), torch.tensor([0.1]))
    assert factored(statistics, torch.tensor([1.0, 2.0])).damping == [1.0, 2.0]


def test_recipes_leave_shared_factors_as_they_are() -> None:
    weights, statistics = random(2, 32, 64), calibrated([correlated(200, 64, e) for e in range(2)])
    usual = [
        recipe(name).quantize(weights, statistics, Rate(0.03, 300.0) if name == "rd" else None)
        for name in ("qmoe", "rd", "gptq")
    ]
    statistics.known = {}
    for _ in range(2):
        for name, expected in zip(
            ("rd", "gptq", "qmoe"), (usual[1], usual[2], usual[0]), strict=True
        ):
            rate = Rate(0.03, 300.0) if name == "rd" else None
            found = recipe(name).quantize(weights, statistics, rate)
            assert torch.equal(found.weights.dequantize(), expected.weights.dequantize())
    assert statistics.known


def test_the_factor_has_the_type_of_the_hessian() -> None:
    assert inverse_factor(2 * torch.eye(3)).dtype == torch.float32
    with pytest.raises(LinAlgError):
        inverse_factor(-torch.eye(3))


def test_every_row_has_some_importance() -> None:
    """The least is a thousandth of the mean."""
    statistics = Statistics.zeros(2, 2, rows=2)
    statistics.add(0, torch.ones(4, 2))
    statistics.weigh(0, torch.tensor([[0.0, 2.0]] * 4))
    assert statistics.importance().tolist() == [[pytest.approx(1e-3), 2.0], [1.0, 1.0]]


def test_running_out_of_memory_is_no_singular_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    def cholesky(hessian: Tensor, check_errors: bool) -> Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)

    statistics = calibrated([correlated(50, 9, 0)])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky)
    with pytest.raises(RuntimeError, match="memory"):
        factored(statistics, torch.tensor([0.1]))


def statistics_of(sums: Tensor, tokens: list[int]) -> Statistics:
    result = Statistics.zeros(len(sums), sums.shape[1])
    result.sums.copy_(sums)
    result.tokens.copy_(torch.tensor(tokens))
    return result


def check(sums: Tensor, hessian: Tensor, factor: Tensor, damping: float) -> None:
    s = array(sums)
    expected = s / s.diagonal().mean() + damping * np.eye(len(s))
    np.testing.assert_allclose(array(hessian), expected, rtol=1e-6, atol=1e-6)
    u = array(factor)
    inverse = np.linalg.inv(expected)
    np.testing.assert_allclose(u.T @ u, inverse, atol=1e-4 * np.abs(inverse).max())


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    statistics = calibrated([correlated(50, 9, e) * 10**e for e in range(3)])
    result = factored(statistics, torch.tensor([0.1, 0.5, 0.02]))
    assert result.damping == pytest.approx([0.1, 0.5, 0.02])
    assert result.fallback == [None] * 3
    diagonals = statistics.sums.diagonal(dim1=1, dim2=2)
    np.testing.assert_allclose(result.unit.numpy(), array(diagonals).mean(1), rtol=1e-6)
    assert result.unit.dtype == torch.float64
    for expert, damping in enumerate([0.1, 0.5, 0.02]):
        check(statistics.sums[expert], result.hessian[expert], result.factor[expert], damping)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_columns(tokens: int) -> None:
    statistics = calibrated([correlated(tokens, 30)])
    result = factored(statistics, torch.tensor([0.1]))
    assert result.fallback == [None]
    assert result.damping == pytest.approx([0.1])
    check(statistics.sums[0], result.hessian[0], result.factor[0], 0.1)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_inputs_in_float64(scale: float) -> None:
    inputs = correlated(40, 8).double()
    usual = factored(calibrated([inputs], torch.float64), torch.tensor([0.1]))
    scaled = factored(calibrated([inputs * scale], torch.float64), torch.tensor([0.1]))
    assert scaled.fallback == [None]
    torch.testing.assert_close(scaled.hessian, usual.hessian)
    torch.testing.assert_close(scaled.factor, usual.factor)
    np.testing.assert_allclose(scaled.unit.numpy(), usual.unit.numpy() * scale**2)


def test_damping_grows_tenfold_until_it_suffices() -> None:
    # Rounding may leave sums like these. Their mean is 0.5, so H = diag(2, 2, 2, -2) + d.
    sums = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0]))[None].repeat(2, 1, 1)
    result = factored(statistics_of(sums, [4, 4]), torch.tensor([0.1, 3.0]))
    assert result.damping == pytest.approx([10, 3])
    assert result.fallback == [None, None]
    check(sums[0], result.hessian[0], result.factor[0], 10)
    check(sums[1], result.hessian[1], result.factor[1], 3)


UNUSABLE = {
    "no tokens": (torch.zeros(3, 3), 0),
    "inputs are all zero": (torch.zeros(3, 3), 7),
    "singular Hessian": (torch.diag(torch.tensor([1000.0, 1.0, -998.0])), 7),
    "Hessian is not finite": (torch.full((3, 3), math.nan), 7),
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_fallbacks_are_named_and_leave_the_others_alone(why: str) -> None:
    sums, tokens = UNUSABLE[why]
    good = calibrated([correlated(20, 3), correlated(20, 3, 5)])
    both = statistics_of(torch.stack([good.sums[0], sums, good.sums[1]]), [20, tokens, 20])
    damping = torch.tensor([0.1, 0.1, 0.1])
    result = factored(both, damping)
    assert result.fallback == [None, why, None]
    assert result.damping == [pytest.approx(0.1), None, pytest.approx(0.1)]
    assert result.unit[1] == 1
    assert torch.equal(result.hessian[1], torch.eye(3))
    assert torch.equal(result.factor[1], torch.eye(3))
    alone = factored(good, damping[:2])
    assert torch.equal(result.hessian[::2], alone.hessian)
    assert torch.equal(result.factor[::2], alone.factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 1)])
def test_one_number_that_is_not_finite(bad: float, place: tuple[int, int]) -> None:
    statistics = calibrated([correlated(20, 3)])
    statistics.sums[0][place] = bad
    result = factored(statistics, torch.tensor([0.1]))
    assert result.fallback == ["Hessian is not finite"]
    assert torch.isfinite(result.hessian).all()


def test_inputs_whose_squares_overflow() -> None:
    statistics = calibrated([correlated(20, 3) * 1e30])
    assert factored(statistics, torch.tensor([0.1])).fallback == ["Hessian is not finite"]


def test_relative_error() -> None:
    weights = random(3, 4, 6)
    quantized = weights + 0.1 * random(3, 4, 6, seed=1)
    weights[2] = 0
    quantized[2] = 0
    sums = calibrated([correlated(30, 6, e) for e in range(3)]).sums
    result = relative_error(weights, quantized, sums)
    assert result.dtype == torch.float64
    w, s = array(weights), array(sums)
    expected = energy(w - array(quantized), s).sum(1)[:2] / energy(w, s).sum(1)[:2]
    np.testing.assert_allclose(result[:2].numpy(), expected, rtol=1e-4)
    assert result[2] == 0


def test_relative_error_where_nothing_is_lost() -> None:
    """Because nothing is there, or nothing sees it, whatever the sums are."""
    unseen = torch.tensor([[[0.0, 0.0, 3.0], [0.0, 0.0, 4.0]]])
    inputs = correlated(30, 3) * torch.tensor([1.0, 1.0, 0.0])
    sums = calibrated([inputs]).sums
    assert relative_error(unseen, torch.zeros_like(unseen), sums).tolist() == [0]
    zero = torch.zeros(1, 2, 3)
    for sums in (torch.zeros(1, 3, 3), torch.full((1, 3, 3), torch.inf)):
        assert relative_error(zero, zero, sums).tolist() == [0]
    assert relative_error(zero, unseen, calibrated([correlated(30, 3)]).sums).tolist() == [
        torch.inf
    ]


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_relative_error_of_huge_and_tiny_numbers(scale: float) -> None:
    weights, quantized = random(1, 4, 6), random(1, 4, 6).bfloat16().float()
    inputs = correlated(30, 6).double()
    usual = relative_error(weights, quantized, calibrated([inputs], torch.float64).sums)
    sums = calibrated([inputs * scale], torch.float64).sums
    assert relative_error(weights, quantized, sums).item() == pytest.approx(usual.item(), rel=1e-4)
    sums = calibrated([inputs], torch.float64).sums
    scaled = relative_error(weights * scale, quantized * scale, sums)
    assert scaled.item() == pytest.approx(usual.item(), rel=1e-4)
