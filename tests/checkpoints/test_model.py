"""Configurations that transformers knows, does not know, or cannot build."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.checkpoints.model import MAX_COUNT, build, fill_buffers, load_config
from tests.conftest import MIXTRAL, random_state, write_checkpoint
from tests.refusals import refusal
from tests.tiny_configs import CONFIGS
from tests.tiny_models import build_model

Make = Callable[..., Path]


def refused(folder: Path) -> str:
    said = refusal(partial(open_checkpoint, folder), "checkpoint")
    assert "\n" not in said
    assert "config.json" in said
    return said


@pytest.mark.parametrize("model_type", ["no_such_type", None, ["mixtral"], 3])
def test_a_type_that_transformers_does_not_know(switch: Make, model_type: object) -> None:
    said = refused(switch(config={"model_type": model_type}))
    assert f"does not know the model_type {model_type!r}" in said


def test_no_type(switch: Make) -> None:
    folder = switch()
    (folder / "config.json").write_text("{}")
    assert "does not know the model_type None" in refused(folder)


def test_a_type_without_a_model_of_language(switch: Make) -> None:
    assert "no language model for the type 'vit'" in refused(switch(config={"model_type": "vit"}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_layers": "2"},
        {"num_layers": None},
        {"num_experts": True},
        {"num_experts": [4]},
        {"num_experts": 4.0},
        {"num_experts": -1},
        {"d_model": 0.5},
        {"dense_act_fn": "mish?"},
        {"dtype": "float17"},
        {"dtype": {}},
        {"d_model": 10**30},
    ],
)
def test_configurations_that_transformers_cannot_build(switch: Make, wrong: dict[str, Any]) -> None:
    assert "transformers cannot build this model" in refused(switch(config=wrong))


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"num_layers": 10**12}, "num_layers"),
        ({"num_experts": MAX_COUNT + 1}, "num_experts"),
        ({"moe": {"deep": {"n_routed_experts": 10**30}}}, "n_routed_experts"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"vision_config": {"depth": 10**9}}, "depth"),
        ({"audio_config": {"encoder_layers": 10**9}}, "encoder_layers"),
        ({"talker_config": {"num_code_groups": 10**9}}, "num_code_groups"),
    ],
)
def test_counts_that_no_model_has(switch: Make, wrong: dict[str, Any], key: str) -> None:
    """Building a model of them would not end."""
    assert f"{key!r} is " in refused(switch(config=wrong))


def test_a_type_that_is_no_name(switch: Make) -> None:
    wrong = {"text_config": {"model_type": {"a": 1}}}
    assert "'model_type' is {'a': 1}, which is not a name" in refused(switch(config=wrong))


@pytest.mark.parametrize(
    "architectures",
    [None, [], ["NoSuchClass"], ["LlamaForCausalLM"], ["GenerationMixin"], [3], 5, "Switch"],
)
def test_the_type_decides_if_no_class_of_it_is_named(switch: Make, architectures: object) -> None:
    with open_checkpoint(switch(config={"architectures": architectures})) as checkpoint:
        checkpoint.check_complete()
        name = type(checkpoint.model).__name__
        assert name == "SwitchTransformersForConditionalGeneration"


def test_a_type_that_shares_all_but_its_name(tmp_path: Path) -> None:
    config = {
        **CONFIGS["kimi_k2"],
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "dtype": "float32",
    }
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    published = config | {"model_type": "kimi_k2", "auto_map": code}
    folder = write_checkpoint(tmp_path / "checkpoint", random_state(config), published)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check_complete()
        assert checkpoint.config["model_type"] == "kimi_k2"
        assert type(checkpoint.model).__name__ == "DeepseekV3ForCausalLM"


def test_code_in_the_folder_is_neither_run_nor_asked_for(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = MIXTRAL | {"auto_map": {"AutoConfig": "code.Configuration"}}
    folder = write_checkpoint(tmp_path / "checkpoint", random_state(MIXTRAL), config)
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check_complete()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    refused(folder)
    assert not ran.exists()


def test_a_model_takes_no_memory(tmp_path: Path) -> None:
    config = MIXTRAL | {"hidden_size": 1 << 20, "intermediate_size": 1 << 20}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(load_config(tmp_path, config))
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"meta"}
    assert sum(each.numel() for each in model.parameters()) > 1 << 41
    assert not model.training


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_tables_are_as_transformers_computes_them(model_type: str) -> None:
    expected = build_model(model_type)
    model = build(expected.config)
    fill_buffers(model, model, "cpu")
    tables = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    assert tables
    persistent = model.state_dict()
    fresh = type(expected)._from_config(expected.config)
    for name, buffer in fresh.named_buffers():
        if name not in persistent:
            assert torch.equal(tables[name], buffer), name


def test_attention_of_another_machine(tmp_path: Path) -> None:
    raw = {**MIXTRAL, "attn_implementation": "flash_attention_2"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert build(load_config(tmp_path, raw)).config._attn_implementation == "sdpa"
