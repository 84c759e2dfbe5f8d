"""The recipes for integers in groups: which values they offer, and which of them a weight gets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.codec import dequantize, pack_groups
from qmoe_format.quantize.finequant import granularity, quantize_finequant
from qmoe_format.quantize.gptq_int import quantize_gptq
from qmoe_format.quantize.group_weights import GroupWeights
from qmoe_format.quantize.hessian import Statistics, relative_error
from qmoe_format.quantize.int4_experts import quantize_int4_experts
from qmoe_format.quantize.level_weights import Quantized
from qmoe_format.quantize.moqe import quantize_moqe
from tests.quantize.problems import array, calibrated, correlated, random
from tests.refusals import refusal

DATA_FREE: dict[str, Callable[[Tensor], Quantized]] = {
    **{f"moqe {bits}": partial(quantize_moqe, bits=bits) for bits in (2, 3, 4, 8)},
    **{f"moqe log {bits}": partial(quantize_moqe, bits=bits, grid="log") for bits in (2, 3, 4, 8)},
    "finequant 4": quantize_finequant,
    "finequant 8": partial(quantize_finequant, bits=8),
    "int4-experts": quantize_int4_experts,
}


def gptq(weights: Tensor, bits: int = 4) -> Quantized:
    """With inputs of some kind."""
    inputs = [correlated(90, weights.shape[2], seed) for seed in range(len(weights))]
    statistics = calibrated(inputs) if inputs else Statistics.zeros(0, weights.shape[2])
    return quantize_gptq(weights, statistics, bits)


RECIPES = DATA_FREE | {f"gptq {bits}": partial(gptq, bits=bits) for bits in (2, 3, 4)}


def grouped(quantized: Quantized) -> GroupWeights:
    weights = quantized.weights
    assert isinstance(weights, GroupWeights)
    return weights


def with_outliers(*shape: int, seed: int = 0) -> Tensor:
    """Normal weights, one in 300 of them 20 times as large."""
    weights = random(*shape, seed=seed)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 99)) < 1 / 300
    return torch.where(chosen, 20 * weights, weights)


def read(weights: GroupWeights, expert: int, codes: Tensor) -> npt.NDArray[np.float32]:
    """What a file gives for these codes of an expert."""
    zero_points = weights.zero_points
    return dequantize(
        pack_groups(
            codes.numpy(),
            weights.scales[expert].view(torch.uint16).numpy(),
            weights.bits,
            grid=weights.grid,
            group_size=weights.group_sizes[expert],
            zero_points=None if zero_points is None else zero_points[expert].numpy(),
        )
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("columns", [5, 300])
def test_values_are_those_of_a_file(name: str, columns: int) -> None:
    weights = with_outliers(3, 7, columns)
    result = grouped(RECIPES[name](weights))
    assert result.codes.dtype == torch.uint8
    assert result.codes.shape == weights.shape
    values = result.dequantize()
    assert values.dtype == torch.float32
    for expert, codes in enumerate(result.codes):
        assert values[expert].numpy().tobytes() == read(result, expert, codes).tobytes()


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_each_weight_goes_to_the_nearest_value(name: str, dtype: torch.dtype) -> None:
    weights = with_outliers(2, 5, 200).to(dtype)
    result = grouped(DATA_FREE[name](weights))
    for expert in range(2):
        options = [
            read(result, expert, torch.full((5, 200), code, dtype=torch.uint8))
            for code in range(2**result.bits)
        ]
        errors = np.abs(np.stack(options).astype(np.float64) - array(weights[expert]))
        chosen = np.abs(array(result.dequantize()[expert]) - array(weights[expert]))
        assert np.allclose(chosen, errors.min(0), rtol=1e-6, atol=0)


def test_scales() -> None:
    weights = random(1, 4, 40)
    largest = weights[0].abs().amax(1, keepdim=True)
    for result, scale in (
        (quantize_moqe(weights, 3), 2 * largest / 7),
        (quantize_moqe(weights, 4, "log"), largest),
        (quantize_int4_experts(weights), largest / 8),
        (quantize_finequant(weights[:, :, :8], 8), weights[0, :, :8].abs().amax(1, True) / 127),
    ):
        assert torch.equal(grouped(result).scales[0], scale.bfloat16())
        assert grouped(result).zero_points is None
        assert result.damping == [None]
        assert result.fallback == [None]


def test_int4_clips_the_largest() -> None:
    weights = torch.tensor([[[-4.0, 4.0, 0.26, 0.0]]])
    assert grouped(quantize_int4_experts(weights)).codes.tolist() == [[[0, 15, 9, 8]]]


def test_the_log_grid() -> None:
    weights = torch.tensor([[[1.0, -1.0, 0.51, -0.26, 0.74, 0.76, -0.1, 0.01, 0.0]]])
    result = grouped(quantize_moqe(weights, 3, "log"))
    expected = [1, -1, 0.5, -0.25, 0.5, 1, -0.125, 0.125, 0.125]
    assert result.dequantize().tolist() == [[expected]]


@pytest.mark.parametrize("name", RECIPES)
def test_batching_changes_nothing(name: str) -> None:
    weights = with_outliers(3, 6, 300)
    weights[1] = random(6, 300, seed=5)
    together = grouped(RECIPES[name](weights))
    statistics = calibrated([correlated(90, 300, seed) for seed in range(3)])
    for expert in range(3):
        part = slice(expert, expert + 1)
        if name.startswith("gptq"):
            one = quantize_gptq(weights[part], statistics.of(part), together.bits)
        else:
            one = DATA_FREE[name](weights[part])
        assert torch.equal(grouped(one).codes[0], together.codes[expert])
        assert torch.equal(grouped(one).scales[0], together.scales[expert])
        assert grouped(one).group_sizes[0] == together.group_sizes[expert]


def test_granularity_follows_outliers() -> None:
    """As far as it keeps them apart from the other weights; without any, whole rows."""
    flat = torch.rand(16, 1024, generator=torch.Generator().manual_seed(0)) + 1
    assert granularity(random(16, 1024)) == 128
    matrices = [flat]
    for columns in ([10, 74], [10, 42], [10]):
        matrices.append(flat.clone())
        matrices[-1][:, columns] = 100
    assert [granularity(each) for each in matrices] == [0, 128, 64, 32]
    result = grouped(quantize_finequant(torch.stack(matrices)))
    assert result.group_sizes == [0, 128, 64, 32]
    assert [each.shape[1] for each in result.scales] == [1, 8, 16, 32]


@pytest.mark.parametrize(("columns", "size"), [(32, 0), (64, 32), (100, 32)])
def test_groups_are_shorter_than_a_row(columns: int, size: int) -> None:
    """A longer one does not end the search either."""
    weights = torch.ones(8, columns)
    weights[:, 10] = 100
    assert granularity(weights) == size


def test_small_groups_help_against_outliers() -> None:
    weights = with_outliers(1, 32, 2048)
    fine, coarse = quantize_finequant(weights), quantize_int4_experts(weights)

    def error(result: Quantized) -> float:
        return float((grouped(result).dequantize() - weights).square().sum())

    assert error(fine) < 0.5 * error(coarse)


def plain_gptq(
    weights: npt.NDArray[np.float64], hessian: npt.NDArray[np.float64], result: GroupWeights
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Codes, column by column in float64 (Optimal Brain Surgeon), and how near a tie each was."""
    assert result.zero_points is not None
    scale = array(result.scales[0][:, 0])
    zero_point = array(result.zero_points[0][:, 0])
    rest, inverse = weights.copy(), np.linalg.inv(hessian)
    codes, margin = np.zeros_like(weights), np.zeros_like(weights)
    for column in range(weights.shape[1]):
        exact = rest[:, column] / scale + zero_point
        codes[:, column] = exact.round().clip(0, 2**result.bits - 1)
        margin[:, column] = np.abs(np.abs(exact - exact.round()) - 0.5)
        wrong = rest[:, column] - (codes[:, column] - zero_point) * scale
        rest[:, column + 1 :] -= wrong[:, None] * (inverse[0, 1:] / inverse[0, 0])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return codes, margin


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_the_plain_algorithm(bits: int) -> None:
    weights, inputs = random(1, 40, 60), correlated(200, 60)
    result = quantize_gptq(weights, calibrated([inputs]), bits)
    assert result.damping == [pytest.approx(0.1)]
    assert result.fallback == [None]
    sums = array(inputs.T @ inputs)
    hessian = sums + 0.1 * sums.diagonal().mean() * np.eye(60)
    codes, margin = plain_gptq(array(weights[0]), hessian, grouped(result))
    differ = codes != grouped(result).codes[0].numpy()
    for row in np.flatnonzero(differ.any(1)):  # only from a near-tie on
        assert margin[row, differ[row].argmax()] < 1e-4
    assert differ.any(1).mean() < 0.1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_than_rounding(bits: int) -> None:
    weights, statistics = random(2, 24, 80), calibrated([correlated(200, 80, s) for s in (0, 9)])
    errors = [
        relative_error(weights, grouped(each).dequantize(), statistics.sums)
        for each in (
            quantize_gptq(weights, statistics, bits),
            quantize_gptq(weights, Statistics.zeros(2, 80), bits),
        )
    ]
    assert (errors[0] < 0.8 * errors[1]).all()


def test_gptq_without_tokens_rounds_between_the_extremes() -> None:
    weights = torch.tensor([[[-1.0, 0.0, 0.4, 2.0], [1.0, 2.0, 3.0, 0.1], [0, 0, 0, 0]]])
    result = quantize_gptq(weights, Statistics.zeros(1, 4), 2)
    assert result.fallback == ["no tokens"]
    assert result.damping == [None]
    assert grouped(result).codes.tolist() == [[[0, 1, 1, 3], [1, 2, 3, 0], [0, 0, 0, 0]]]
    assert grouped(result).dequantize().tolist() == [
        [[-1, 0, 0, 2], [1, 2, 3, 0], [0, 0, 0, 0]],
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_zeros(name: str) -> None:
    weights = random(2, 6, 300)
    weights[0] = 0
    weights[1, 2] = 0
    weights[1, :, 128:] = 0
    values = grouped(RECIPES[name](weights)).dequantize()
    assert torch.isfinite(values).all()
    assert not values[0].any()
    assert not values[1, 2].any()
    if "log" not in name and not name.startswith("gptq"):  # which moves errors to other columns
        assert not values[1, :, 128:].any()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_matrices(name: str, shape: tuple[int, int, int]) -> None:
    result = RECIPES[name](torch.zeros(shape))
    weights = grouped(result)
    assert weights.dequantize().shape == shape
    assert len(result.damping) == len(result.fallback) == len(weights.scales) == shape[0]
    assert all(each.shape == (shape[1], 1) for each in weights.scales)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("weights", "code"),
    [
        (torch.zeros(3, 4), "argument"),
        (torch.zeros(1, 3, 4, dtype=torch.int32), "argument"),
        (torch.full((1, 3, 4), torch.nan), "value"),
        (torch.full((1, 3, 4), 1e300, dtype=torch.float64), "value"),
    ],
)
def test_refusals(name: str, weights: Tensor, code: str) -> None:
    if name.startswith("gptq"):
        statistics, bits = calibrated([correlated(9, 4)]), int(name[-1])
        message = refusal(lambda: quantize_gptq(weights, statistics, bits), code)
    else:
        message = refusal(lambda: DATA_FREE[name](weights), code)
    assert "; " in message, "it gives advice"


def test_other_bits_are_refused() -> None:
    weights = random(1, 3, 4)
    refusal(lambda: quantize_moqe(weights, 5), "argument")
    refusal(lambda: quantize_moqe(weights, 3, "cubic"), "argument")
    refusal(lambda: quantize_finequant(weights, 3), "argument")
    refusal(lambda: quantize_gptq(weights, calibrated([correlated(9, 4)]), 8), "argument")
