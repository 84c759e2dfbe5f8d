"""The recipe ``rd``: rate against error, unusual inputs, and independence of the batch."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.level_weights import Quantized
from qmoe_format.quantize.qmoe import quantize_qmoe
from qmoe_format.quantize.rate import Rate, weighted_energies
from qmoe_format.quantize.rd import EFFORTS, Search, quantize_rd
from tests.quantize.problems import (
    REAL,
    array,
    calibrated,
    code_length,
    correlated,
    energy,
    levels_of,
    many_threads,
    random,
    real,
)
from tests.refusals import refusal

BITS = 1.5  # per level
DEFAULT, UNLENGTHENED = Search(), Search(lengthen=0.0)


def check(result: Quantized, weights: Tensor) -> Tensor:
    """Check what holds for any input; return the values."""
    made = levels_of(result)
    experts, rows, columns = weights.shape
    assert made.levels.dtype == torch.int8
    assert made.levels.shape == weights.shape
    assert made.levels.is_contiguous()
    assert made.row_scale.shape == (experts, rows, 1)
    assert made.column_scale is not None
    assert made.column_scale.shape == (experts, columns)
    assert made.levels.amin() > -128
    for scale in (made.row_scale, made.column_scale):
        assert scale.dtype == torch.bfloat16
        assert torch.isfinite(scale).all()
        assert not torch.signbit(scale).any()
    assert (made.column_scale > 0).all()
    # Only rows without levels have a scale of 0.
    assert (made.row_scale[:, :, 0] > 0)[(made.levels != 0).any(2)].all()
    values = made.dequantize()
    assert torch.isfinite(values).all()
    assert torch.equal(values != 0, made.levels != 0)
    assert len(result.damping) == len(result.fallback) == experts
    for damping, why in zip(result.damping, result.fallback, strict=True):
        assert (damping is None) == (why is not None)
    return values


def rate_of(weights: Tensor, statistics: Statistics, lam: float) -> Rate:
    """The rate for a model of these experts only."""
    return Rate(lam, float(weighted_energies(weights, statistics).mean()))


def error(weights: Tensor, values: Tensor, statistics: Statistics) -> float:
    w, sums = array(weights), array(statistics.sums)
    return float(energy(w - array(values), sums).sum() / energy(w, sums).sum())


def example(
    experts: int = 2, rows: int = 48, columns: int = 64, tokens: int = 400, seed: int = 0
) -> tuple[Tensor, Statistics]:
    inputs = [correlated(tokens, columns, seed + 10 * e) for e in range(experts)]
    return random(experts, rows, columns, seed=seed), calibrated(inputs)


def test_prices_of_odd_rows_are_bounded() -> None:
    weights, statistics = example(1, 16, 32)
    usual = rate_of(weights, statistics, 0.03).reference
    for far in (1e8, 1e-8):
        near, further = (
            levels_of(quantize_rd(weights, statistics, Rate(0.03, usual * far**k))).levels
            for k in (1, 2)
        )
        assert near.equal(further)
        assert near.any()


@pytest.mark.parametrize("levels", [3, None])
def test_bits_fall_as_lambda_rises(levels: int | None) -> None:
    weights, statistics = example()
    bits, errors = [], []
    for lam in (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0):
        rate = rate_of(weights, statistics, lam)
        result = quantize_rd(weights, statistics, rate, levels)
        errors.append(error(weights, check(result, weights), statistics))
        bits.append(code_length(levels_of(result).levels))
        assert max(result.weights.counts()) <= (levels or 255)
    for k in range(1, len(bits)):
        assert bits[k] < 1.01 * bits[k - 1]
        assert errors[k] > 0.96 * errors[k - 1]
    assert bits[0] > (3 if levels is None else 1.3)
    assert bits[-1] < 0.5


def test_many_levels_are_better_than_three() -> None:
    """At as many bits as three take."""
    weights, statistics = example(1, 64, 128, seed=3)
    rate = rate_of(weights, statistics, 0.005)
    three = quantize_rd(weights, statistics, rate, levels=3)
    assert three.weights.counts() == [3]
    bits = code_length(levels_of(three).levels)
    found = quantize_rd(weights, statistics, rate)
    check(found, weights)
    assert found.weights.counts()[0] > 3
    worse = error(weights, three.weights.dequantize(), statistics)
    assert error_at(bits, weights, statistics) < 0.9 * worse


@pytest.mark.parametrize("lam", [0.0, 1e-9, 1e-5])
def test_bits_for_next_to_nothing(lam: float) -> None:
    """The error ends where levels do."""
    weights, statistics = example(1)
    result = quantize_rd(weights, statistics, rate_of(weights, statistics, lam))
    assert error(weights, check(result, weights), statistics) < 2e-4
    assert result.weights.counts()[0] > 100


def test_few_bits_make_three_levels() -> None:
    weights, statistics = example()
    rate = rate_of(weights, statistics, 1.5)
    free, three = (quantize_rd(weights, statistics, rate, levels) for levels in (None, 3))
    assert three.weights.counts() == [3, 3]
    assert free.weights.counts() == [3, 3]


@pytest.mark.parametrize("levels", [1, 2, 4, 255])
def test_other_numbers_of_levels(levels: int) -> None:
    weights, statistics = example(1, 4, 6)
    said = refusal(lambda: quantize_rd(weights, statistics, Rate(0.1, 1.0), levels), "argument")
    assert said == f"{levels} levels; ask for 3, or leave it open"


@pytest.mark.parametrize("effort", ["", "all", "Medium"])
def test_other_efforts(effort: str) -> None:
    weights, statistics = example(1, 4, 6)
    rate = Rate(0.1, 1.0)
    said = refusal(lambda: quantize_rd(weights, statistics, rate, effort=effort), "argument")
    assert said == f"effort {effort!r}; choose low, medium, high"


def test_more_effort_is_less_error() -> None:
    """At as many bits, between results that have a little more and a little less."""
    weights, statistics = example(1, 96, 256, tokens=800, seed=3)
    left = []
    for effort in EFFORTS:
        found = []
        for lam in (0.07, 0.11):
            rate = rate_of(weights, statistics, lam)
            result = quantize_rd(weights, statistics, rate, effort=effort)
            off = error(weights, check(result, weights), statistics)
            found.append((code_length(levels_of(result).levels), math.log(off)))
        (less, most), (more, least) = sorted(found)
        assert less < BITS < more
        left.append(math.exp(most + (least - most) * (BITS - less) / (more - less)))
    assert left[1] < 0.98 * left[0]
    assert left[2] < 0.98 * left[1]


def test_threads_change_nothing_but_sums() -> None:
    """Kernels have the same results; products of matrices may round in another order."""
    weights, statistics = example(2, 75, 130)
    rate = rate_of(weights, statistics, 0.03)
    results = []
    for threads in (1, 2, 3):
        with many_threads(threads):
            results.append(quantize_rd(weights, statistics, rate))
    usual = error(weights, check(results[0], weights), statistics)
    for other in results[1:]:
        same = levels_of(other).levels == levels_of(results[0]).levels
        assert same.double().mean() > 0.9
        off = error(weights, check(other, weights), statistics)
        assert off == pytest.approx(usual, rel=0.05)


def test_an_enormous_lambda_leaves_nothing() -> None:
    weights, statistics = example()
    result = quantize_rd(weights, statistics, Rate(1e9, 1.0))
    check(result, weights)
    assert not levels_of(result).levels.any()


def error_at(
    bits: float, weights: Tensor, statistics: Statistics, search: Search = DEFAULT
) -> float:
    """The error with at most these bits per level, by bisection."""
    low, high = 1e-4, 1.0
    best = 1.0
    for _ in range(6):
        lam = math.sqrt(low * high)
        rate = rate_of(weights, statistics, lam)
        result = quantize_rd(weights, statistics, rate, search=search)
        if code_length(levels_of(result).levels) <= bits:
            high = lam
            best = min(best, error(weights, result.weights.dequantize(), statistics))
        else:
            low = lam
    return best


def baseline(weights: Tensor, statistics: Statistics) -> tuple[float, float]:
    """Bits per level and error of the paper's recipe."""
    paper = levels_of(quantize_qmoe(weights, statistics))
    return code_length(paper.levels), error(weights, paper.dequantize(), statistics)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_it_beats_the_paper_at_equal_code_length(shape: tuple[int, int]) -> None:
    weights, statistics = example(1, *shape, seed=3)
    bits, worse = baseline(weights, statistics)
    assert error_at(bits, weights, statistics) < 0.75 * worse


@pytest.mark.parametrize("which", REAL)
def test_it_beats_the_paper_on_real_matrices(shared_data: Path, which: str) -> None:
    matrices, inputs = real(shared_data, which, rows=48, columns=80, tokens=600)
    weights, statistics = matrices[:1], calibrated(inputs[:1])
    bits, worse = baseline(weights, statistics)
    assert error_at(bits, weights, statistics) < 0.9 * worse


def test_rows_are_as_long_as_before() -> None:
    """Least squares alone leaves a row too short by its relative error."""
    weights, statistics = random(1, 40, 48, seed=5), calibrated([correlated(300, 48)])
    result = quantize_rd(weights, statistics, rate_of(weights, statistics, 0.1))
    off = error(weights, check(result, weights), statistics)
    assert off > 0.02
    w, q, s = (array(each[0]) for each in (weights, check(result, weights), statistics.sums))
    along = (w @ s * q).sum(1) / (w @ s * w).sum(1)
    assert abs(along.mean() - 1) < off / 5


def test_rare_inputs_keep_their_answers() -> None:
    """Least squares alone is much too short where H is small."""
    weights = random(1, 60, 48, seed=5)
    inputs = correlated(2000, 48) * torch.linspace(3, 0.1, 48)
    statistics = calibrated([inputs])
    rare = torch.linalg.eigh(statistics.sums[0]).eigenvectors[:, :24].double()

    def share_left(search: Search) -> float:
        rate = rate_of(weights, statistics, 0.03)
        result = quantize_rd(weights, statistics, rate, search=search)
        q, w = result.weights.dequantize()[0].double() @ rare, weights[0].double() @ rare
        return float((q * w).sum() / (w * w).sum())

    assert share_left(DEFAULT) > 1.1 * share_left(UNLENGTHENED)


def test_directions_without_inputs_are_not_lengthened() -> None:
    weights, inputs = random(1, 60, 48, seed=5), correlated(2000, 48)
    basis = torch.linalg.eigh(inputs.T @ inputs).eigenvectors
    statistics = calibrated([inputs @ basis * (torch.arange(48) < 16).add(0.01) @ basis.T])
    found = error_at(0.9, weights, statistics)
    assert found < 1.5 * error_at(0.9, weights, statistics, UNLENGTHENED)


def test_more_important_rows_get_more_bits() -> None:
    weights, inputs = random(1, 40, 48, seed=5), correlated(300, 48)
    importance = torch.ones(300, 40)
    importance[:, :20] = 100
    statistics = Statistics.zeros(1, 48, 40)
    statistics.add(0, inputs)
    statistics.weigh(0, importance)
    result = quantize_rd(weights, statistics, rate_of(weights, statistics, 0.2))
    check(result, weights)
    share = (levels_of(result).levels[0] != 0).float().mean(1)
    assert share[:20].mean() > 1.5 * share[20:].mean()


def test_experts_with_more_energy_get_more_bits() -> None:
    weights = random(1, 40, 48, seed=5).repeat(2, 1, 1)
    inputs = correlated(300, 48)
    statistics = calibrated([inputs, 10 * inputs])
    result = quantize_rd(weights, statistics, rate_of(weights, statistics, 0.1))
    share = (levels_of(result).levels != 0).float().mean((1, 2))
    assert share[1] > 1.2 * share[0]


@given(
    experts=st.integers(1, 2),
    rows=st.integers(1, 12),
    columns=st.integers(1, 50),
    tokens=st.sampled_from([0, 1, 2, 50]),
    kind=st.sampled_from(["normal", "sparse", "rank one", "constant", "outlier", "steps"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    lam=st.sampled_from([0.0, 1e-5, 0.003, 0.1, 3.0]),
    levels=st.sampled_from([3, None]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_any_matrix(
    experts: int,
    rows: int,
    columns: int,
    tokens: int,
    kind: str,
    dtype: torch.dtype,
    lam: float,
    levels: int | None,
    seed: int,
) -> None:
    weights = random(experts, rows, columns, seed=seed)
    if kind == "sparse":
        weights *= random(experts, rows, columns, seed=seed + 1) > 1
    elif kind == "rank one":
        weights = weights[:, :, :1] * weights[:, :1]
    elif kind == "constant":
        weights = weights[:, :1, :1].expand_as(weights)
    elif kind == "outlier":
        weights[:, :, 0] *= 1000
    elif kind == "steps":
        weights = weights.round()
    weights = weights.to(dtype)
    inputs = [correlated(tokens, columns, seed + e) for e in range(experts)]
    result = quantize_rd(weights, calibrated(inputs), Rate(lam, 1.0), levels)
    check(result, weights)
    assert max(result.weights.counts()) <= (levels or 255)
    assert [why == "no tokens" for why in result.fallback] == [tokens == 0] * experts


SHAPES = [(1, 1), (1, 9), (9, 1), (1, 200), (200, 1), (33, 65), (65, 33), (7, 129)]


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: tuple[int, int]) -> None:
    weights, statistics = random(2, *shape), calibrated([correlated(100, shape[1])] * 2)
    result = quantize_rd(weights, statistics, rate_of(weights, statistics, 0.01))
    values = check(result, weights)
    assert error(weights, values, statistics) < 0.25


def test_an_all_zero_matrix() -> None:
    weights, statistics = example(3, 8, 12)
    weights[1] = 0
    result = quantize_rd(weights, statistics, Rate(0.1, 1.0))
    check(result, weights)
    assert not levels_of(result).levels[1].any()
    assert levels_of(result).levels[0].any()
    zeros, statistics = torch.zeros(1, 8, 12), calibrated([correlated(9, 12)])
    result = quantize_rd(zeros, statistics, Rate(0.0, 0.0))
    check(result, zeros)
    assert not levels_of(result).levels.any()


def test_an_all_zero_matrix_without_tokens() -> None:
    weights = torch.zeros(1, 4, 6)
    result = quantize_rd(weights, Statistics.zeros(1, 6), Rate(0.1, 1.0))
    check(result, weights)
    assert not levels_of(result).levels.any()


def test_all_zero_rows_and_columns() -> None:
    weights, statistics = example(1, 8, 12)
    weights[0, 2] = 0
    weights[0, :, 5] = 0
    result = quantize_rd(weights, statistics, rate_of(weights, statistics, 0.03))
    check(result, weights)
    assert not levels_of(result).levels[0, 2].any()
    rest = [row for row in range(8) if row != 2]
    assert levels_of(result).levels[0, rest].any()


@pytest.mark.parametrize("value", [1.5, -0.25])
def test_a_constant_matrix_is_exact(value: float) -> None:
    """Once its scales are refitted often; before, what inputs see of it is."""
    weights = torch.full((1, 6, 10), value)
    statistics = calibrated([correlated(90, 10)])
    rate = rate_of(weights, statistics, 0.01)
    result = quantize_rd(weights, statistics, rate)
    assert error(weights, check(result, weights), statistics) < 1e-3
    often = Search(rounds=160, first_columns=1.0, columns=1.0, columns_every=1)
    result = quantize_rd(weights, statistics, rate, search=often)
    torch.testing.assert_close(check(result, weights), weights, rtol=1e-2, atol=0)


def test_a_matrix_of_rank_one_is_almost_exact() -> None:
    signs = random(1, 20, 30).sign()
    weights = signs * random(1, 20, 1, seed=1).exp() * random(1, 1, 30, seed=2).mul(0.5).exp()
    statistics = calibrated([correlated(200, 30)])
    result = quantize_rd(weights, statistics, rate_of(weights, statistics, 1e-4))
    assert error(weights, check(result, weights), statistics) < 1e-3


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_units_change_no_level(factor: float) -> None:
    """About 1e30 and 1e-30; ``Rate.reference`` is in the same units."""
    weights, inputs = random(2, 9, 30, seed=1), [correlated(90, 30).double()] * 2
    statistics = calibrated(inputs, torch.float64)
    usual = quantize_rd(weights, statistics, Rate(0.05, 100.0))
    check(usual, weights)
    rate = Rate(0.05, 100.0 * factor**2)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        if dtype == torch.bfloat16:
            weights = weights.bfloat16().float()
            usual = quantize_rd(weights, statistics, Rate(0.05, 100.0))
        large = (weights.double() * factor).to(dtype)
        scaled = quantize_rd(large, statistics, rate)
        check(scaled, large)
        assert torch.equal(levels_of(scaled).levels, levels_of(usual).levels)
        assert torch.equal(levels_of(scaled).row_scale, levels_of(usual).row_scale * factor)
    other = calibrated([each * factor for each in inputs], torch.float64)
    scaled = quantize_rd(weights, other, rate)
    assert torch.equal(levels_of(scaled).levels, levels_of(usual).levels)
    assert torch.equal(levels_of(scaled).row_scale, levels_of(usual).row_scale)


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_huge_and_tiny_inputs_in_float32(factor: float) -> None:
    weights = random(1, 9, 30)
    statistics = calibrated([correlated(90, 30) * factor])
    result = quantize_rd(weights, statistics, Rate(0.05, 1.0))
    check(result, weights)
    assert result.fallback == ["Hessian is not finite" if factor > 1 else "inputs are all zero"]
    assert levels_of(result).levels.any()


@pytest.mark.parametrize("tokens", [0, 1, 5, 1000, 100_000])
def test_tokens_from_none_to_many(tokens: int) -> None:
    weights, statistics = random(1, 12, 20), calibrated([correlated(tokens, 20)])
    result = quantize_rd(weights, statistics, Rate(0.03, 100.0 * max(tokens, 1)))
    check(result, weights)
    assert levels_of(result).levels.any()
    if tokens:
        assert result.fallback == [None]
        assert result.damping == [pytest.approx(max(0.1, 0.05 * 20 / tokens))]
    else:
        assert result.fallback == ["no tokens"]


def test_without_tokens_bits_fall_too() -> None:
    weights = random(1, 48, 64)
    bits = []
    for lam in (0.01, 0.3, 1.0):
        result = quantize_rd(weights, Statistics.zeros(1, 64), Rate(lam, 1.0))
        check(result, weights)
        bits.append(code_length(levels_of(result).levels))
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > 1.5 * bits[-1]


def test_the_type_of_a_checkpoint_does_not_matter() -> None:
    weights, statistics = example(1, 10, 30)
    rate = rate_of(weights, statistics, 0.03)
    for narrow in (torch.bfloat16, torch.float16):
        small = weights.to(narrow)
        usual = quantize_rd(small, statistics, rate)
        check(usual, small)
        for dtype in (torch.float32, torch.float64):
            wide = quantize_rd(small.to(dtype), statistics, rate)
            assert torch.equal(levels_of(wide).levels, levels_of(usual).levels)
            assert torch.equal(levels_of(wide).row_scale, levels_of(usual).row_scale)


@pytest.mark.parametrize("lam", [0.01, 1.0, 100.0])
def test_weights_at_the_end_of_the_range(lam: float) -> None:
    """Scales are finite or refused; a row without levels needs none."""
    weights = (random(1, 8, 12).clamp(-1, 1) * 3e38).bfloat16()
    statistics = calibrated([correlated(60, 12)])
    try:
        result = quantize_rd(weights, statistics, Rate(lam, 9e76))
    except QMoEError as error:
        assert error.code == "value"
        assert lam < 100
    else:
        check(result, weights)


@pytest.mark.parametrize("value", [1e-38, 1e-40, 1e-44, 1e-200])
def test_weights_that_vanish_in_bfloat16(value: float) -> None:
    weights = random(1, 8, 12).double() * value
    weights[0, 0, 0] = value * 300
    weights[0, :, 1] /= 100
    statistics = calibrated([correlated(60, 12)])
    check(quantize_rd(weights, statistics, Rate(0.0, 0.0)), weights)


def test_rows_and_columns_of_very_different_size() -> None:
    weights, statistics = example(1, 10, 20)
    weights *= torch.logspace(-30, 0, 10)[:, None]
    check(quantize_rd(weights, statistics, Rate(0.01, 1.0)), weights)
    weights, statistics = example(1, 10, 20)
    weights *= torch.logspace(-30, 0, 20)
    check(quantize_rd(weights, statistics, Rate(0.01, 1.0)), weights)


def test_inputs_of_very_different_size() -> None:
    weights = random(1, 10, 20)
    statistics = calibrated([correlated(200, 20) * torch.logspace(-12, 6, 20)])
    check(quantize_rd(weights, statistics, Rate(0.01, 1.0)), weights)


def mixed_experts(rows: int, columns: int) -> tuple[Tensor, list[Tensor | None]]:
    """Experts with many tokens, few, and none; one with rounded weights."""
    weights = random(5, rows, columns, seed=rows)
    weights[3] = weights[3].round()
    counts = [300, 1, 0, 40, 77]
    return weights, [correlated(n, columns, 9 * e) if n else None for e, n in enumerate(counts)]


def part(weights: Tensor, inputs: list[Tensor | None], some: list[int], rows: int) -> Quantized:
    statistics = Statistics.zeros(len(some), weights.shape[2], rows)
    for place, expert in enumerate(some):
        each = inputs[expert]
        if each is not None:
            statistics.add(place, each)
            statistics.weigh(place, 1 + random(len(each), rows, seed=expert).abs())
    return quantize_rd(weights[some], statistics, Rate(0.03, 300.0))


@pytest.mark.parametrize("shape", [(1, 7), (7, 33), (33, 67), (51, 130)])
def test_the_other_experts_do_not_matter(shape: tuple[int, int]) -> None:
    weights, inputs = mixed_experts(*shape)
    together = part(weights, inputs, [0, 1, 2, 3, 4], shape[0])
    again = part(weights, inputs, [0, 1, 2, 3, 4], shape[0])
    values = check(together, weights)
    assert torch.equal(again.weights.dequantize(), values)
    for some in ([0], [1], [2], [3], [4], [3, 1], [4, 0, 2]):
        result = part(weights, inputs, some, shape[0])
        ours, all_of_them = levels_of(result), levels_of(together)
        assert ours.column_scale is not None
        assert all_of_them.column_scale is not None
        assert torch.equal(ours.levels, all_of_them.levels[some])
        assert torch.equal(ours.row_scale, all_of_them.row_scale[some])
        assert torch.equal(ours.column_scale, all_of_them.column_scale[some])
        assert result.damping == [together.damping[e] for e in some]
        assert result.fallback == [together.fallback[e] for e in some]


def test_inputs_are_left_as_they_are() -> None:
    weights, statistics = example()
    before = weights.clone(), statistics.sums.clone(), statistics.row_importance.clone()
    torch.manual_seed(1)
    first = quantize_rd(weights, statistics, Rate(0.03, 100.0))
    assert torch.equal(weights, before[0])
    assert torch.equal(statistics.sums, before[1])
    assert torch.equal(statistics.row_importance, before[2])
    # Neither the global generator nor a view that is not contiguous matters.
    torch.manual_seed(2)
    view = weights.transpose(1, 2).contiguous().transpose(1, 2)
    second = quantize_rd(view, statistics, Rate(0.03, 100.0))
    assert torch.equal(first.weights.dequantize(), second.weights.dequantize())


@pytest.mark.parametrize("recipe", ["qmoe", "rd"])
def test_no_tensor_waits_for_the_garbage_collector(recipe: str) -> None:
    """A reference cycle would keep 20 Hessians: 18 GB for 7168 columns."""
    statistics = calibrated([correlated(200, 70)])
    weights = random(1, 40, 70)
    gc.collect()
    gc.disable()
    try:
        if recipe == "rd":
            quantize_rd(weights, statistics, Rate(0.05, 1.0))
        else:
            quantize_qmoe(weights, statistics)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [each for each in gc.garbage if isinstance(each, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
