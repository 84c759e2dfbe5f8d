"""Recipes by name, what each does, and the values of its result."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from qmoe_format.quantize import RECIPES, recipe

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize.hessian import Statistics, relative_error
from qmoe_format.quantize.level_weights import LevelWeights, Quantized
from qmoe_format.quantize.qmoe import quantize_qmoe
from qmoe_format.quantize.rate import Rate
from qmoe_format.quantize.rd import quantize_rd
from qmoe_format.quantize.rtn import quantize_rtn, round_to_nearest
from tests.quantize.problems import calibrated, correlated, random
from tests.refusals import refusal

RATE = Rate(0.1, 1.0)


def same(one: Quantized, other: Quantized) -> bool:
    a, b = one.weights, other.weights
    if a.column_scale is None or b.column_scale is None:
        columns = a.column_scale is b.column_scale
    else:
        columns = torch.equal(a.column_scale, b.column_scale)
    return columns and torch.equal(a.levels, b.levels) and torch.equal(a.row_scale, b.row_scale)


def test_names() -> None:
    assert list(RECIPES) == ["rtn", "qmoe", "rd"]
    for name, one in RECIPES.items():
        assert recipe(name) is one
        assert one.name == name
        assert one.summary
    assert [one.calibrated for one in RECIPES.values()] == [False, True, True]
    assert [one.rated for one in RECIPES.values()] == [False, False, True]
    message = refusal(lambda: recipe("gptq9"), "argument")
    assert message == "recipe 'gptq9' is unknown; choose one of qmoe, rd, rtn"


def test_each_calls_its_function() -> None:
    weights = random(2, 12, 30)
    statistics = calibrated([correlated(90, 30), correlated(90, 30, 9)])
    rounded = quantize_rtn(weights, "BF16")
    paper = quantize_qmoe(weights, "BF16", statistics)
    ours = quantize_rd(weights, "BF16", statistics, RATE)
    assert not same(rounded, paper)
    assert not same(paper, ours)
    for rate in (None, RATE):
        assert same(recipe("rtn").quantize(weights, "BF16", statistics, rate), rounded)
        assert same(recipe("qmoe").quantize(weights, "BF16", statistics, rate), paper)
    assert same(recipe("rd").quantize(weights, "BF16", statistics, RATE), ours)


def test_what_a_recipe_needs() -> None:
    weights = random(2, 12, 30)
    statistics = calibrated([correlated(90, 30), correlated(90, 30, 9)])
    assert same(recipe("rtn").quantize(weights, "BF16"), quantize_rtn(weights, "BF16"))
    for one in (recipe("qmoe"), recipe("rd")):
        message = refusal(partial(one.quantize, weights, "BF16", rate=RATE), "argument")
        assert message.startswith(f"recipe {one.name!r} needs statistics")
    message = refusal(lambda: recipe("rd").quantize(weights, "BF16", statistics), "argument")
    assert message.startswith("recipe 'rd' needs a rate")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scale_dtype", ["BF16", "F16", "F32"])
def test_shapes_and_types(name: str, scale_dtype: str) -> None:
    statistics = calibrated([correlated(40, 7)] * 3)
    result = recipe(name).quantize(random(3, 5, 7), scale_dtype, statistics, RATE)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[scale_dtype]
    weights = result.weights
    assert weights.levels.dtype == torch.int8
    assert weights.levels.shape == (3, 5, 7)
    assert weights.levels.is_contiguous()
    assert weights.row_scale.dtype == dtype
    assert weights.row_scale.shape == (3, 5, 1, 1 if name == "rd" else 2)
    if name == "rd":
        assert weights.column_scale is not None
        assert weights.column_scale.dtype == dtype
        assert weights.column_scale.shape == (3, 7)
    else:
        assert weights.column_scale is None
    assert len(result.damping) == len(result.fallback) == 3
    assert result.fallback == [None] * 3
    dampings = {"rtn": None, "qmoe": pytest.approx(0.1), "rd": pytest.approx(0.1)}
    assert result.damping == [dampings[name]] * 3


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_matrices(name: str, shape: tuple[int, int, int]) -> None:
    experts, _, columns = shape
    statistics = Statistics.zeros(experts, columns)
    result = recipe(name).quantize(torch.zeros(shape), "BF16", statistics, RATE)
    assert result.weights.levels.shape == shape
    assert len(result.fallback) == shape[0]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("weights", "scale_dtype", "code"),
    [
        (torch.zeros(3, 4), "BF16", "argument"),
        (torch.zeros(1, 3, 4, dtype=torch.int32), "BF16", "argument"),
        (torch.zeros(1, 3, 4, 1), "BF16", "argument"),
        (torch.ones(1, 3, 4), "I8", "argument"),
        (torch.full((1, 3, 4), torch.nan), "BF16", "value"),
        (torch.full((1, 3, 4), torch.inf), "BF16", "value"),
        (torch.full((1, 3, 4), 1e6), "F16", "value"),
        (torch.full((1, 3, 4), 1e300, dtype=torch.float64), "BF16", "value"),
    ],
)
def test_refusals(name: str, weights: Tensor, scale_dtype: str, code: str) -> None:
    statistics = calibrated([correlated(9, 4)])
    message = refusal(lambda: recipe(name).quantize(weights, scale_dtype, statistics, RATE), code)
    assert "; " in message, "it gives advice"


@pytest.mark.parametrize("name", ["qmoe", "rd"])
@pytest.mark.parametrize(
    "inputs",
    [
        random(50, 1) * random(1, 20, seed=1),
        torch.ones(50, 20),
        correlated(1, 20),
        correlated(100_000, 20),
        correlated(50, 20) * (torch.arange(20) % 3 > 0),
        correlated(50, 20) * 1e12,
        correlated(50, 20) * 1e-12,
    ],
    ids=["rank one", "constant", "one token", "many tokens", "dead columns", "large", "small"],
)
def test_odd_inputs(name: str, inputs: Tensor) -> None:
    weights = random(1, 12, 20)
    result = recipe(name).quantize(weights, "BF16", calibrated([inputs]), Rate(0.01, 1.0))
    assert result.fallback == [None]
    values = result.weights.dequantize()
    error = ((weights - values)[0] @ inputs.T).square().sum() / (
        weights[0] @ inputs.T
    ).square().sum()
    assert error < 0.5


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("lam", [1e-6, 0.05, 3.0])
@pytest.mark.parametrize("importance", [None, 0.0, 1.0])
def test_zeros_stay_zeros(name: str, lam: float, importance: float | None) -> None:
    """A matrix and rows of zeros; nor do columns and inputs of zeros make anything infinite."""
    weights = random(4, 12, 20)
    weights[0] = 0
    weights[1, 3:7] = 0
    weights[2, :, 4:9] = 0
    inputs = [correlated(50, 20, expert) for expert in range(4)]
    inputs[3] = torch.zeros(50, 20)
    statistics = calibrated(inputs)
    if importance is not None:
        statistics.row_importance = torch.full((4, 12), importance, dtype=torch.float64)
    result = recipe(name).quantize(weights, "BF16", statistics, Rate(lam, 1.0))
    values = result.weights.dequantize()
    assert torch.isfinite(values).all()
    assert not values[0].any()
    assert not values[1, 3:7].any()
    errors = relative_error(weights, values, statistics.sums)
    assert errors[0] == 0
    assert torch.isfinite(errors).all()
    if name != "rtn":
        assert result.fallback == [None, None, None, "inputs are all zero"]


def test_rtn_as_a_recipe() -> None:
    weights = random(2, 5, 7)
    result = quantize_rtn(weights, "F16")
    assert torch.equal(result.weights.levels, round_to_nearest(weights, "F16").levels)
    assert result.damping == [None, None]
    assert result.fallback == [None, None]


def test_scale_types() -> None:
    for one in RECIPES.values():
        assert one.scale_dtype("F16") == "F16"
        assert one.scale_dtype("F32") == one.scale_dtype("BF16") == "BF16"


def test_dequantize_low_and_high() -> None:
    levels = torch.tensor([[[1, 0, -1], [-1, 1, 1]]], dtype=torch.int8)
    scales = torch.tensor([[[[-0.5, 2.0]], [[-3.0, 0.25]]]], dtype=torch.bfloat16)
    values = LevelWeights(levels, scales).dequantize()
    assert values.dtype == torch.float32
    assert values.tolist() == [[[2, 0, -0.5], [-3, 0.25, 0.25]]]


def test_dequantize_rows_and_columns() -> None:
    levels = torch.tensor([[[1, 0, -1], [-1, 1, 1]]], dtype=torch.int8)
    rows = torch.tensor([[[[2.0]], [[0.5]]]], dtype=torch.float16)
    assert LevelWeights(levels, rows).dequantize().tolist() == [[[2, 0, -2], [-0.5, 0.5, 0.5]]]
    columns = torch.tensor([[1.0, 4.0, 0.5]], dtype=torch.float16)
    values = LevelWeights(levels, rows, columns).dequantize()
    assert values.tolist() == [[[2, 0, -1], [-0.5, 2, 0.25]]]


def test_names_do_not_need_torch() -> None:
    code = (
        "import sys; from qmoe_format.quantize import RECIPES; "
        "sys.exit('torch' in sys.modules or len(RECIPES) != 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
