"""Every type of model: read in each layout on disk, and converted with calibration text."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qmoe_format

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import load_file
from torch import Tensor

from qmoe_format.checkpoints import open_checkpoint, registry
from qmoe_format.checkpoints.model import load_config
from qmoe_format.checkpoints.registry import UNCALIBRATED, UNSUPPORTED, supported_types
from qmoe_format.conversion.report import read_report
from tests.refusals import refusal
from tests.tiny_models import (
    CONFIGS,
    add_prediction_layer,
    build_model,
    changed,
    load_model,
    save_model,
)

every_type = pytest.mark.parametrize("model_type", sorted(CONFIGS))


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time that tiny models take is that of the garbage collector."""
    monkeypatch.setattr(gc, "collect", lambda: None)


def test_every_type_is_tested() -> None:
    assert set(CONFIGS) == set(supported_types())
    assert CONFIGS.keys() >= UNCALIBRATED.keys()


@pytest.mark.parametrize("model_type", sorted(UNSUPPORTED))
def test_types_that_do_not_convert(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(lambda: load_config(tmp_path, {"model_type": model_type}), "checkpoint")
    assert repr(model_type) in said
    assert UNSUPPORTED[model_type] in said
    monkeypatch.setattr(registry, "UNSUPPORTED", {})
    assert model_type in supported_types()


def expert_matrices(folder: Path) -> dict[str, list[Tensor]]:
    """As the model of a checkpoint has them, [rows, columns] of each expert, by its names."""
    found = {}
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check_complete()
        for each in checkpoint.layers:
            for matrix, stacks in (
                (each.layer.inputs, each.inputs),
                (each.layer.output, (each.output,)),
            ):
                experts = [
                    torch.cat([checkpoint.read_expert(stack, expert) for stack in stacks])
                    for expert in range(each.output.experts)
                ]
                if each.interleaved and matrix == each.layer.inputs:
                    experts = [torch.cat([rows[0::2], rows[1::2]]) for rows in experts]
                found[matrix] = experts
    return found


@every_type
def test_each_layout_on_disk(model_type: str, tmp_path: Path) -> None:
    """That of published checkpoints, that of transformers' model, and its state dict."""
    folders = [tmp_path / name for name in ("published", "model", "pickled")]
    for folder, original in zip(folders, (True, False), strict=False):
        save_model(folder, model_type, original=original)
    state = build_model(model_type).state_dict()
    shutil.copytree(folders[1], folders[2], ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(state, folders[2] / "pytorch_model.bin")
    with open_checkpoint(folders[0]) as checkpoint:
        layers = {m: e.layer for e in checkpoint.layers for m in (e.layer.inputs, e.layer.output)}
    for folder in folders:
        found = expert_matrices(folder)
        assert found.keys() == layers.keys()
        for matrix, experts in found.items():
            members = [state[name] for name in layers[matrix].members(matrix)]
            expected = members if len(members) > 1 else list(members[0])
            if layers[matrix].transposed:
                expected = [each.T for each in expected]
            assert all(one.equal(other) for one, other in zip(experts, expected, strict=True))


def test_a_layout_with_rows_and_columns_swapped(tmp_path: Path) -> None:
    """Transformers reads experts of Qwen3-VL-MoE either way round."""
    folder = save_model(tmp_path / "model", "qwen3_vl_moe")

    def swap(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if ".experts." in name]:
            state[name] = state[name].mT.contiguous()

    found = expert_matrices(changed(folder, tmp_path / "swapped", swap))
    for matrix, experts in expert_matrices(folder).items():
        assert all(one.equal(other) for one, other in zip(found[matrix], experts, strict=True))


@every_type
def test_calibrated(model_type: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", model_type)
    options: dict[str, Any] = {"recipe": "rd", "rate_lambda": 0.02, "samples": 4}
    options["sequence_length"] = 16
    if reason := UNCALIBRATED.get(model_type):
        assert reason in refusal(lambda: converted(folder, **options), "checkpoint")
        return
    file = converted(folder, **options)
    with qmoe_format.open(file) as opened:
        opened.verify()
        report = read_report(opened)
    with open_checkpoint(folder) as checkpoint:
        assert [each["name"] for each in report["stacks"]] == [s.name for s in checkpoint.stacks]
        experts = {
            name
            for each in checkpoint.layers
            for matrix in (each.layer.inputs, each.layer.output)
            for name in each.layer.members(matrix)
        }
    errors = [e["relative_error"] for s in report["stacks"] for e in s["experts"] if e["tokens"]]
    assert errors
    assert all(error is not None and 0 < error < 0.5 for error in errors)
    before, after = (
        load_model(each).state_dict()
        for each in (folder, qmoe_format.unpack(file, tmp_path / "unpacked"))
    )
    for name, original in before.items():
        if name in experts:
            difference = (after[name] - original).square().sum() / original.square().sum()
            assert 0 < difference < 0.7, name
        else:
            assert after[name].equal(original), name


@pytest.mark.parametrize(
    ("model_type", "last", "further"),
    [
        ("deepseek_v3", "model.layers.1.", "model.layers.2."),
        ("glm4_moe", "model.layers.1.", "model.layers.2."),
        ("qwen3_next", "model.layers.1.", "mtp.layers.0."),
        ("qwen3_5_moe", "model.language_model.layers.1.", "mtp.layers.0."),
    ],
)
@pytest.mark.parametrize("numbered", [True, False], ids=["numbered", "fused"])
def test_experts_for_multi_token_prediction(
    model_type: str,
    last: str,
    further: str,
    numbered: bool,
    converted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Transformers does not run them, so that only their own weights can tell how to round them."""
    folder = save_model(tmp_path / "model", model_type, original=numbered)
    added = add_prediction_layer(folder, last, further)
    assert any(name.startswith(f"{further}mlp.experts.") for name in added)
    options: dict[str, dict[str, Any]] = {
        "free.qmoe": {"calibration": None},
        "rd.qmoe": {"recipe": "rd", "rate_lambda": 0.02},
    }
    for file_name, settings in options.items():
        file = converted(folder, file_name, samples=4, **settings)
        unpacked = qmoe_format.unpack(file, tmp_path / f"unpacked-{file_name}")
        after = load_file(unpacked / "model-00001-of-00001.safetensors")
        assert after.keys() == load_file(folder / "model.safetensors").keys()
        for name, original in added.items():
            if ".experts." in name:
                error = (after[name] - original).float().square().sum()
                assert 0 < error < 0.5 * original.float().square().sum()
            else:
                assert after[name].equal(original)
        if settings.get("recipe"):
            with qmoe_format.open(file) as opened:
                report = read_report(opened)
            qmoe_format.load_model(file)
            for stack in report["stacks"]:
                beyond = stack["name"].startswith(further)
                assert all((e["tokens"] == 0) >= beyond for e in stack["experts"])
                assert all(e["fallback"] for e in stack["experts"] if beyond)
