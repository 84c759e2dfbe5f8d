"""Recipes by name, what each does, and the values of its result."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest

from qmoe_format.quantize import RECIPES, recipe

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize.finequant import quantize_finequant
from qmoe_format.quantize.gptq_int import quantize_gptq
from qmoe_format.quantize.group_weights import GroupWeights
from qmoe_format.quantize.hessian import Statistics, relative_error
from qmoe_format.quantize.int4_experts import quantize_int4_experts
from qmoe_format.quantize.level_weights import LevelWeights, Quantized, kurtosis
from qmoe_format.quantize.moqe import quantize_moqe
from qmoe_format.quantize.qmoe import quantize_qmoe
from qmoe_format.quantize.rate import Rate
from qmoe_format.quantize.rd import quantize_rd
from qmoe_format.quantize.rtn import quantize_rtn, round_to_nearest
from tests.quantize.problems import calibrated, correlated, random
from tests.refusals import refusal

RATE = Rate(0.1, 1.0)
IN_LEVELS = [name for name, one in RECIPES.items() if one.encoding == "int-dict"]


def same(one: Quantized, other: Quantized) -> bool:
    """Whether files would have the same bytes."""
    (kind, *parts), (other_kind, *others) = (
        (type(each.weights), *vars_of(each.weights)) for each in (one, other)
    )
    return kind == other_kind and all(map(equal, parts, others))


def vars_of(weights: LevelWeights | GroupWeights) -> list[object]:
    return [getattr(weights, field.name) for field in fields(weights)]


def equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def shape(quantized: Quantized) -> tuple[int, ...]:
    weights = quantized.weights
    return (weights.levels if isinstance(weights, LevelWeights) else weights.codes).shape


def test_names() -> None:
    names = ["rtn", "qmoe", "rd", "gptq", "moqe", "finequant", "int4-experts"]
    assert list(RECIPES) == names
    for name, one in RECIPES.items():
        assert recipe(name) is one
        assert one.name == name
        assert one.summary
    assert [name for name in names if recipe(name).calibrated] == ["qmoe", "rd", "gptq"]
    assert [name for name in names if recipe(name).rated] == ["rd"]
    assert IN_LEVELS == ["rtn", "qmoe", "rd"]
    assert {recipe(name).encoding for name in names[3:]} == {"int-group"}
    message = refusal(lambda: recipe("gptq9"), "argument")
    assert message == f"recipe 'gptq9' is unknown; choose one of {', '.join(sorted(names))}"


def test_each_calls_its_function() -> None:
    weights = random(2, 12, 30)
    statistics = calibrated([correlated(90, 30), correlated(90, 30, 9)])
    direct = {
        "rtn": quantize_rtn(weights),
        "qmoe": quantize_qmoe(weights, statistics),
        "rd": quantize_rd(weights, statistics, RATE),
        "gptq": quantize_gptq(weights, statistics),
        "moqe": quantize_moqe(weights),
        "finequant": quantize_finequant(weights),
        "int4-experts": quantize_int4_experts(weights),
    }
    assert list(direct) == list(RECIPES)
    for name, one in direct.items():
        assert [other for other in direct if same(direct[other], one)] == [name]
        for rate in (None, RATE) if name != "rd" else (RATE,):
            assert same(recipe(name).quantize(weights, statistics, rate), one)


@pytest.mark.parametrize(
    ("name", "choices", "kind", "counts"),
    [
        ("rd", {"levels": 3}, "int-dict", 3),
        ("gptq", {"bits": 2}, "linear", 4),
        ("moqe", {"bits": 8}, "linear", 256),
        ("moqe", {"bits": 2, "grid": "log"}, "log", 4),
        ("finequant", {"bits": 8}, "linear", 256),
    ],
)
def test_choices(name: str, choices: dict[str, object], kind: str, counts: int) -> None:
    weights, statistics = random(2, 12, 30), calibrated([correlated(90, 30)] * 2)
    result = recipe(name).quantize(weights, statistics, Rate(0.01, 1.0), **choices).weights
    assert result.counts() == [counts, counts]
    assert kind == (result.grid if isinstance(result, GroupWeights) else "int-dict")


@pytest.mark.parametrize(
    ("name", "choice", "advice"),
    [
        ("rtn", "levels", "use it with rd"),
        ("qmoe", "bits", "use it with gptq or moqe or finequant"),
        ("gptq", "grid", "use it with moqe"),
        ("int4-experts", "bits", "use it with gptq or moqe or finequant"),
        ("rd", "width", "leave it out"),
    ],
)
def test_choices_that_a_recipe_does_not_have(name: str, choice: str, advice: str) -> None:
    weights, statistics = random(1, 2, 3), Statistics.zeros(1, 3)
    call = partial(recipe(name).quantize, weights, statistics, RATE, **{choice: 4})
    assert refusal(call, "argument") == f"recipe {name!r} has no {choice!r}; {advice}"


@pytest.mark.parametrize(
    ("name", "choices", "said"),
    [
        ("rd", {"levels": 5}, "recipe 'rd' does not have levels 5; choose one of 3"),
        ("gptq", {"bits": 8}, "recipe 'gptq' does not have bits 8; choose one of 2, 3, 4"),
        ("moqe", {"bits": 5}, "recipe 'moqe' does not have bits 5; choose one of 2, 3, 4, 8"),
        ("moqe", {"grid": "sine"}, "does not have grid 'sine'; choose one of linear, log"),
        ("finequant", {"bits": 3}, "recipe 'finequant' does not have bits 3; choose one of 4, 8"),
    ],
)
def test_choices_with_other_values(name: str, choices: dict[str, object], said: str) -> None:
    weights, statistics = random(1, 2, 3), Statistics.zeros(1, 3)
    call = partial(recipe(name).quantize, weights, statistics, RATE, **choices)
    assert said in refusal(call, "argument")


def test_what_a_recipe_needs() -> None:
    weights = random(2, 12, 30)
    statistics = calibrated([correlated(90, 30), correlated(90, 30, 9)])
    for one in RECIPES.values():
        if one.calibrated:
            message = refusal(partial(one.quantize, weights, rate=RATE), "argument")
            assert message.startswith(f"recipe {one.name!r} needs statistics")
        else:
            assert same(one.quantize(weights), one.quantize(weights, statistics, RATE))
    message = refusal(lambda: recipe("rd").quantize(weights, statistics), "argument")
    assert message.startswith("recipe 'rd' needs a rate")


@pytest.mark.parametrize("name", IN_LEVELS)
def test_shapes_and_types(name: str) -> None:
    statistics = calibrated([correlated(40, 7)] * 3)
    result = recipe(name).quantize(random(3, 5, 7), statistics, RATE)
    weights = result.weights
    assert isinstance(weights, LevelWeights)
    assert weights.levels.dtype == torch.int8
    assert weights.levels.shape == (3, 5, 7)
    assert weights.levels.is_contiguous()
    assert weights.row_scale.dtype == torch.bfloat16
    assert weights.row_scale.shape == (3, 5, 1 if name == "rd" else 2)
    if name == "rd":
        assert weights.column_scale is not None
        assert weights.column_scale.dtype == torch.bfloat16
        assert weights.column_scale.shape == (3, 7)
    else:
        assert weights.column_scale is None
    assert len(result.damping) == len(result.fallback) == 3
    assert result.fallback == [None] * 3
    dampings = {"rtn": None, "qmoe": pytest.approx(0.1), "rd": pytest.approx(0.1)}
    assert result.damping == [dampings[name]] * 3


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_matrices(name: str, size: tuple[int, int, int]) -> None:
    experts, _, columns = size
    statistics = Statistics.zeros(experts, columns)
    result = recipe(name).quantize(torch.zeros(size), statistics, RATE)
    assert shape(result) == size
    assert result.weights.dequantize().shape == size
    assert len(result.fallback) == len(result.damping) == experts


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("weights", "code"),
    [
        (torch.zeros(3, 4), "argument"),
        (torch.zeros(1, 3, 4, dtype=torch.int32), "argument"),
        (torch.zeros(1, 3, 4, 1), "argument"),
        (torch.full((1, 3, 4), torch.nan), "value"),
        (torch.full((1, 3, 4), torch.inf), "value"),
        (torch.full((1, 3, 4), 1e300, dtype=torch.float64), "value"),
    ],
)
def test_refusals(name: str, weights: Tensor, code: str) -> None:
    statistics = calibrated([correlated(9, 4)])
    message = refusal(lambda: recipe(name).quantize(weights, statistics, RATE), code)
    assert "; " in message, "it gives advice"


@pytest.mark.parametrize("name", ["qmoe", "rd", "gptq"])
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
    result = recipe(name).quantize(weights, calibrated([inputs]), Rate(0.01, 1.0))
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
    result = recipe(name).quantize(weights, statistics, Rate(lam, 1.0))
    values = result.weights.dequantize()
    assert torch.isfinite(values).all()
    assert not values[0].any()
    assert not values[1, 3:7].any()
    errors = relative_error(weights, values, statistics.sums)
    assert errors[0] == 0
    assert torch.isfinite(errors).all()
    if recipe(name).calibrated:
        assert result.fallback == [None, None, None, "inputs are all zero"]


def test_rtn_as_a_recipe() -> None:
    weights = random(2, 5, 7)
    result = quantize_rtn(weights)
    assert same(result, Quantized(round_to_nearest(weights), [], []))
    assert result.damping == [None, None]
    assert result.fallback == [None, None]


def test_dequantize_low_and_high() -> None:
    levels = torch.tensor([[[1, 0, -1], [-2, 1, 127]]], dtype=torch.int8)
    scales = torch.tensor([[[-0.5, 2.0], [-3.0, 0.25]]], dtype=torch.bfloat16)
    weights = LevelWeights(levels, scales)
    assert weights.dequantize().dtype == torch.float32
    assert weights.dequantize().tolist() == [[[2, 0, -0.5], [-6, 0.25, 31.75]]]
    assert weights.counts() == [255]


def test_dequantize_rows_and_columns() -> None:
    levels = torch.tensor([[[1, 0, -1], [-3, 1, 2]]], dtype=torch.int8)
    rows = torch.tensor([[[2.0], [0.5]]], dtype=torch.bfloat16)
    assert LevelWeights(levels, rows).dequantize().tolist() == [[[2, 0, -2], [-1.5, 0.5, 1]]]
    columns = torch.tensor([[1.0, 4.0, 0.5]], dtype=torch.bfloat16)
    values = LevelWeights(levels, rows, columns).dequantize()
    assert values.tolist() == [[[2, 0, -1], [-1.5, 2, 0.5]]]


def test_counts_are_those_of_each_expert() -> None:
    levels = torch.zeros(4, 2, 3, dtype=torch.int8)
    levels[1, 0, 1], levels[2, 1, 0], levels[3, 0, 0] = -1, 1, -127
    assert LevelWeights(levels, torch.ones(4, 2, 1).bfloat16()).counts() == [1, 3, 3, 255]
    assert LevelWeights(levels[:, :0], torch.ones(4, 0, 1).bfloat16()).counts() == [1] * 4


def test_kurtosis() -> None:
    """3 for normal numbers, 1.8 for uniform ones, more for outliers; of each matrix on its own."""
    normal = random(1, 200, 300) + 5
    uniform = torch.rand(1, 200, 300, generator=torch.Generator().manual_seed(1))
    heavy = torch.where(uniform > 0.99, 20 * normal, normal)
    equal_weights = torch.ones(1, 200, 300)
    found = kurtosis(torch.cat([normal, uniform, heavy, equal_weights]))
    assert found[:2] == [pytest.approx(3, abs=0.1), pytest.approx(1.8, abs=0.05)]
    assert found[2] is not None
    assert found[2] > 20
    assert found[3] is None
    scaled = kurtosis(1e30 * normal)[0]
    assert scaled == pytest.approx(found[0], rel=1e-4), "without overflow"


def test_names_do_not_need_torch() -> None:
    code = (
        "import sys; from qmoe_format.quantize import RECIPES; "
        "sys.exit('torch' in sys.modules or len(RECIPES) != 7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
