"""Every family there is: converted, unpacked, and loaded again by transformers."""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qmoe_format

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
from safetensors.torch import load_file
from torch import Tensor

from qmoe_format.checkpoints import FAMILIES, open_checkpoint
from qmoe_format.conversion.report import read_report
from qmoe_format.quantize import RECIPES
from tests.refusals import refusal
from tests.tiny_models import CONFIGS, add_prediction_layer, load_model, save_model

EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|down_proj|expert_\d+\.w[io]\.weight)")


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time that tiny models take is that of the garbage collector."""
    monkeypatch.setattr(gc, "collect", lambda: None)


@pytest.fixture(params=sorted(CONFIGS))
def model_type(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_model(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Of transformers' model, by its names."""
    found: dict[str, Tensor] = load_model(folder).state_dict()
    return found


def rounded(experts: Tensor) -> Tensor:
    """[experts, rows, columns] as the recipe rtn leaves them."""
    return RECIPES["rtn"].quantize(experts.bfloat16(), "BF16").weights.dequantize()


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


def test_each_expert_is_rounded_and_nothing_else_changes(
    model_type: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(model_type)
    file = qmoe_format.convert(folder, tmp_path / "m.qmoe", threads=1)
    with qmoe_format.open(file) as opened:
        opened.verify()
        assert not any(entry.stack for name, entry in opened.tensors.items() if "bias" in name)
    unpacked = qmoe_format.unpack(file, tmp_path / "unpacked")
    before, after = weights(folder), weights(unpacked)
    assert before.keys() == after.keys()
    assert any(map(EXPERTS.fullmatch, before))
    for name, original in before.items():
        if not EXPERTS.fullmatch(name):
            assert after[name].equal(original), name
        elif model_type == "gpt_oss":  # [experts, in, out]
            assert after[name].equal(rounded(original.mT).mT), name
        else:
            experts = original if original.ndim == 3 else original[None]
            assert after[name].equal(rounded(experts).view_as(original)), name


def test_names(model_type: str, folder_of: Callable[[str], Path]) -> None:
    family = FAMILIES[model_type]
    with open_checkpoint(folder_of(model_type)) as checkpoint:
        stacks = checkpoint.stacks
    assert {stack.matrix for stack in stacks} == {*family.inputs, family.output}
    for stack in stacks:
        assert family.stack_name(stack.prefix, stack.matrix) == stack.name
        rows, columns = (48 if "moe_intermediate_size" in CONFIGS[model_type] else 80), 64
        if model_type == "switch_transformers":
            rows = 96
        if len(family.inputs) < 2 and family.gated:
            rows = 160 if stack.matrix in family.inputs else 80
        shape = (columns, rows) if stack.matrix == family.output else (rows, columns)
        assert (stack.rows, stack.columns) == shape
    modules = {
        family.in_checkpoint(name)
        for name, module in load_model(folder_of(model_type)).named_modules()
        if hasattr(module, "is_concatenated")
        or type(module).__name__ == "SwitchTransformersExperts"
    }
    assert modules == {stack.prefix for stack in stacks}


def test_calibrated(
    model_type: str,
    folder_of: Callable[[str], Path],
    converted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = folder_of(model_type)
    if model_type == "gpt_oss":
        said = refusal(lambda: converted(folder), "checkpoint")
        assert "without calibration text" in said
        assert not list(tmp_path.iterdir())
        return
    file = converted(folder, recipe="rd", rate_lambda=0.02, samples=4)
    with qmoe_format.open(file) as opened:
        opened.verify()
        report = read_report(opened)
    with open_checkpoint(folder) as checkpoint:
        assert [each["name"] for each in report["stacks"]] == [s.name for s in checkpoint.stacks]
    errors = [e["relative_error"] for s in report["stacks"] for e in s["experts"] if e["tokens"]]
    assert errors
    assert all(error is not None and 0 < error < 0.5 for error in errors)
    before, after = weights(folder), weights(qmoe_format.unpack(file, tmp_path / "unpacked"))
    for name, original in before.items():
        if EXPERTS.fullmatch(name):
            difference = (after[name] - original).square().sum() / original.square().sum()
            assert 0 < difference < 0.6, name
        else:
            assert after[name].equal(original), name


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_experts_for_multi_token_prediction(
    model_type: str,
    folder_of: Callable[[str], Path],
    converted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Transformers does not run them, so that only their own weights can tell how to round them."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of(model_type), folder)
    further = add_prediction_layer(folder)
    options: dict[str, dict[str, Any]] = {
        "free.qmoe": {"calibration": None},
        "qmoe.qmoe": {"recipe": "qmoe"},
        "rd.qmoe": {"recipe": "rd", "rate_lambda": 0.02},
    }
    for file_name, settings in options.items():
        file = converted(folder, file_name, samples=4, **settings)
        unpacked = qmoe_format.unpack(file, tmp_path / f"unpacked-{file_name}")
        after = load_file(unpacked / "model-00001-of-00001.safetensors")
        assert after.keys() == load_file(folder / "model.safetensors").keys()
        for name, original in further.items():
            if ".experts." in name:
                error = (after[name] - original).float().square().sum()
                assert 0 < error < 0.5 * original.float().square().sum()
            else:
                assert after[name].equal(original)
        if settings.get("recipe"):
            with qmoe_format.open(file) as opened:
                report = read_report(opened)
            for stack in report["stacks"]:
                beyond = ".layers.2." in stack["name"]
                assert all((e["tokens"] == 0) >= beyond for e in stack["experts"])
                assert all(e["fallback"] for e in stack["experts"] if beyond)
