"""Every recipe from a checkpoint to a file and back: what it decided is what a reader gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qmoe_format
from qmoe_format.container.inspection import describe
from qmoe_format.conversion.report import read_report, report_path

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import load_file
from torch import Tensor

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.conversion.work import Work
from qmoe_format.quantize import RECIPES, Recipe
from qmoe_format.quantize.level_weights import Quantized
from tests.refusals import refusal
from tests.runtime.models import generated, logits
from tests.tiny_models import load_model, save_model

Convert = Callable[..., Path]
Made = dict[bytes, Tensor]

CASES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "qmoe": {},
    "rd": {"rate_lambda": 0.02},
    "rd, 3 levels": {"rate_lambda": 0.02, "levels": 3},
    "gptq": {},
    "gptq, 2 bits": {"bits": 2},
    "moqe": {},
    "moqe, 8 bits": {"bits": 8},
    "moqe, log": {"bits": 4, "grid": "log"},
    "finequant": {},
    "finequant, 8 bits": {"bits": 8},
    "int4-experts": {},
}


def test_every_recipe_is_tested() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(RECIPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that nothing rounds what a file says."""
    return save_model(tmp_path_factory.mktemp("float32"), "mixtral", torch.float32)


def key(weights: Tensor) -> bytes:
    return weights.float().contiguous().numpy().tobytes()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """What matrices become, by their bytes."""
    found: Made = {}
    quantize = Recipe.quantize

    def noted(self: Recipe, weights: Tensor, *others: Any, **choices: Any) -> Quantized:
        result = quantize(self, weights, *others, **choices)
        found.update(zip(map(key, weights), result.weights.dequantize(), strict=True))
        return result

    monkeypatch.setattr(Recipe, "quantize", noted)
    return found


def stored(file: Path, folder: Path) -> dict[str, Tensor]:
    """The tensors of an unpacked file."""
    return load_file(qmoe_format.unpack(file, folder) / "model-00001-of-00001.safetensors")


def check(source: Path, file: Path, made: Made, unpacked: Path) -> None:
    """A good file; the values are those that the recipe chose; the model runs with them."""
    with qmoe_format.open(file) as opened:
        opened.verify()
        names = {name for name, entry in opened.tensors.items() if entry.stack}
    before, after = load_file(source / "model.safetensors"), stored(file, unpacked)
    assert before.keys() == after.keys()
    with open_checkpoint(source) as checkpoint:
        assert names == {stack.name for stack in checkpoint.stacks}
        members = {
            stack.member(expert) for stack in checkpoint.stacks for expert in range(stack.experts)
        }
    assert members < before.keys()
    for name, original in before.items():
        wanted = made[key(original)] if name in members else original
        assert torch.equal(after[name].view(torch.int32), wanted.view(torch.int32)), name
    model, dense = qmoe_format.load_model(file), load_model(unpacked)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)
    assert len(generated(model)[0]) == 8 + 12


@pytest.mark.parametrize("case", CASES)
def test_a_recipe(case: str, folder: Path, converted: Convert, made: Made, tmp_path: Path) -> None:
    name = case.partition(",")[0]
    options: dict[str, Any] = {"recipe": name, "samples": 6, **CASES[case]}
    if not RECIPES[name].calibrated:
        options["calibration"] = None
    file = converted(folder, **options)
    check(folder, file, made, tmp_path / "unpacked")
    with qmoe_format.open(file) as opened:
        for entry in (each for each in opened.tensors.values() if each.stack):
            assert entry.encoding == RECIPES[name].encoding
            for choice in CASES[case].keys() & {"bits", "grid"}:
                assert entry.parameters[choice] == CASES[case][choice]


RULES = ("*.w1=gptq:3", "*.layers.0.*.w3=moqe:log", "*.layers.1.*.w3=rtn")


def report_of(file: Path) -> Any:
    with qmoe_format.open(file) as opened:
        return read_report(opened)


@pytest.mark.parametrize("bits", [3.4, 5.0])
def test_a_file_of_several_recipes(
    folder: Path, converted: Convert, made: Made, tmp_path: Path, bits: float
) -> None:
    """As large as asked for, though only some of its matrices can be larger or smaller."""
    file = converted(folder, samples=6, rules=RULES, bits_per_weight=bits)
    check(folder, file, made, tmp_path / "unpacked")
    with qmoe_format.open(file) as opened:
        total = describe(opened)["totals"]["experts"]["total_bits_per_weight"]
        kinds = {
            name.replace(".block_sparse_moe.experts", ""): (
                entry.encoding, entry.parameters.get("bits"), entry.parameters.get("grid")
            )
            for name, entry in opened.tensors.items()
            if entry.stack
        }  # fmt: skip
    assert total == pytest.approx(bits, rel=0.02)
    levels = ("int-dict", None, None)
    assert kinds == {
        "model.layers.0.w1": ("int-group", 3, "linear"),
        "model.layers.0.w2": levels,
        "model.layers.0.w3": ("int-group", 3, "log"),
        "model.layers.1.w1": ("int-group", 3, "linear"),
        "model.layers.1.w2": levels,
        "model.layers.1.w3": levels,
    }
    report = report_of(file)
    assert report["settings"]["recipe"] == "rd"
    assert report["settings"]["rules"] == list(RULES)
    assert report["totals"]["total_bits_per_weight"] == pytest.approx(total, rel=1e-5)
    for stack in report["stacks"]:
        counts = {expert["levels"] for expert in stack["experts"]}
        rated = stack["name"].endswith("w2")
        assert (stack["lambda"] is not None) == rated
        if not rated:
            assert counts == {3 if stack["name"].endswith("1.block_sparse_moe.experts.w3") else 8}


def test_a_file_of_several_recipes_without_text(
    folder: Path, converted: Convert, made: Made, tmp_path: Path
) -> None:
    rules = ("*.w2=finequant", "*.layers.1.*=int-group:log:2", "*.layers.1.*.w3=int4-experts")
    file = converted(folder, calibration=None, rules=rules)
    check(folder, file, made, tmp_path / "unpacked")
    with qmoe_format.open(file) as opened:
        kinds = [entry.parameters.get("bits") for entry in opened.tensors.values() if entry.stack]
    assert kinds == [None, 4, None, 2, 2, 4]


def test_it_goes_on_with_the_same_rules_only(
    folder: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"samples": 4, "rate_lambda": 0.05, "rules": RULES}
    wanted = converted(folder, "wanted.qmoe", **options)
    record = Work.record

    def stopping(self: Work, kind: str, number: int, value: object) -> None:
        record(self, kind, number, value)
        if kind == "block":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "record", stopping)
        with pytest.raises(KeyboardInterrupt, match="continue with --resume"):
            converted(folder, **options)
    for other in ({"rules": RULES[:2]}, {"rules": RULES[::-1]}, {"levels": 3}):
        call = lambda: converted(folder, resume=True, **(options | other))  # noqa: B023, E731
        said = refusal(call, "argument")
        assert f"different in {'recipe' if 'levels' in other else 'rules'} (" in said
    file = converted(folder, resume=True, **options)
    assert file.read_bytes() == wanted.read_bytes()
    assert report_path(file).read_bytes() == report_path(wanted).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rules": ["*.w4=gptq"]}, "no stack matches '*.w4'; the experts' stacks are model.layers"),
        ({"rules": ["w1=gptq"]}, "no stack matches 'w1'"),
        ({"recipe": "gptq", "bits": 8}, "recipe 'gptq' does not have bits 8"),
        ({"recipe": "qmoe", "levels": 3}, "recipe 'qmoe' has no 'levels'; use it with rd"),
        ({"recipe": "rtn", "rules": ["*=moqe"]}, "recipe 'rtn' does not use calibration text"),
        ({"recipe": "qmoe", "rules": ["*.w1=gptq"], "rate_lambda": 0.1}, "has one size only"),
        ({"calibration": None, "rules": ["*.w1=gptq"]}, "'gptq' needs calibration text"),
        ({"calibration": None, "rules": ["*.w1=rd"]}, "'rd' needs calibration text"),
    ],
)
def test_what_is_refused_at_once(
    folder: Path, converted: Convert, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    seen: list[object] = []
    call = lambda: converted(folder, progress=lambda *at: seen.append(at), **options)  # noqa: E731
    assert said in refusal(call, "argument")
    assert not seen
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"recipe": "rtn", "rules": ["*.w1=gptq"]}, {"recipe": "gptq"}])
def test_text_for_some_of_the_stacks(
    folder: Path, converted: Convert, options: dict[str, Any]
) -> None:
    report = report_of(converted(folder, samples=3, **options))
    for stack in report["stacks"]:
        damped = {expert["damping"] is not None for expert in stack["experts"]}
        assert damped == {options["recipe"] == "gptq" or stack["name"].endswith("w1")}
        assert all(0 < expert["relative_error"] < 0.5 for expert in stack["experts"])
