"""What a model needs beside its experts: how it is read, and what is said if it is not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch

from qmoe_format.checkpoints import open_checkpoint
from tests import refusals
from tests.conftest import MIXTRAL, State, random_state, switch_config, write_checkpoint
from tests.tiny_configs import CONFIGS

Change = Callable[[State], object]
KIMI = {
    **CONFIGS["kimi_linear"],
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "dtype": "float32",
}
GLM4V = {
    **CONFIGS["glm4v_moe"],
    "architectures": ["Glm4vMoeForConditionalGeneration"],
    "model_type": "glm4v_moe",
    "dtype": "float32",
}
CONV = "model.layers.0.self_attn."


def unchanged(state: State) -> None:
    pass


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """What ``check_complete`` says of a changed checkpoint."""

    def run(config: dict[str, Any], change: Change = unchanged, **wrong: Any) -> str:
        state = random_state(config)
        change(state)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with open_checkpoint(write_checkpoint(folder, state, config | wrong)) as checkpoint:
            return refusals.refusal(checkpoint.check_complete, "checkpoint")

    return run


def dense(config: dict[str, Any]) -> list[str]:
    return [name for name in random_state(config) if ".experts." not in name]


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize(
    "config", [MIXTRAL, switch_config(), KIMI], ids=["mixtral", "switch", "kimi_linear"]
)
def test_parameters_are_those_of_the_model(
    tmp_path: Path, config: dict[str, Any], new_names: bool
) -> None:
    expected = random_state(config, new_names=True)
    state = random_state(config, new_names=new_names)
    with open_checkpoint(write_checkpoint(tmp_path / "checkpoint", state, config)) as checkpoint:
        checkpoint.check_complete()
        tied = checkpoint.model.all_tied_weights_keys
        names = [name for name in checkpoint.names.shapes if ".experts." not in name]
        assert names == list(checkpoint.parameters(names))
        for name, tensor in checkpoint.parameters(names).items():
            assert torch.equal(tensor, expected[tied.get(name, name)]), name
        assert checkpoint.loads.keys() == set(names)
        assert bool(tied) == (config["model_type"] == "switch_transformers")


@pytest.mark.parametrize("name", [*dense(MIXTRAL), *dense(switch_config())])
@pytest.mark.parametrize("empty", [False, True])
def test_a_weight_that_is_missing_or_left_empty(
    refusal: Callable[..., str], name: str, empty: bool
) -> None:
    def change(state: State) -> None:
        tensor = state.pop(name)
        if empty:  # as DeepSpeed's ZeRO-3 leaves it
            state[name] = tensor.new_empty(0)

    config = MIXTRAL if name in dense(MIXTRAL) else switch_config()
    said = refusal(config, change)
    if empty:
        assert f"tensor {name!r} has shape [0], but by config.json" in said
    elif name == "shared.weight":
        assert "no weights for 'decoder.embed_tokens.weight' and 3 more" in said
    else:
        assert "there are no weights for " in said
        assert "more" not in said
        assert name.replace("block_sparse_moe", "mlp") in said


def test_what_is_there_instead_is_named(refusal: Callable[..., str]) -> None:
    def change(state: State) -> None:
        state["_orig_mod.lm_head.weight"] = state.pop("lm_head.weight")

    said = refusal(MIXTRAL, change)
    assert "'lm_head.weight'" in said
    assert "the model has no '_orig_mod.lm_head.weight', which is there" in said


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_there_under_any_of_their_names(tmp_path: Path, name: str) -> None:
    """Whichever a library kept when it saved the model."""
    config = switch_config()
    state = random_state(config)
    weight = state[name] = state.pop("shared.weight")
    with open_checkpoint(write_checkpoint(tmp_path / "checkpoint", state, config)) as checkpoint:
        checkpoint.check_complete()
        names = ["shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
        for tensor in checkpoint.parameters(names).values():
            assert torch.equal(tensor, weight)


def test_a_weight_under_two_names(tmp_path: Path) -> None:
    """Transformers takes the one whose name sorts first."""
    old, new = "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"
    state = random_state(MIXTRAL)
    state[new] = torch.zeros_like(state[old])
    with open_checkpoint(write_checkpoint(tmp_path / "checkpoint", state, MIXTRAL)) as checkpoint:
        checkpoint.check_complete()
        assert torch.equal(checkpoint.parameters([new])[new], state[old])
        assert {old, new} <= set(checkpoint.others)


def test_asking_for_a_parameter_that_is_missing(tmp_path: Path) -> None:
    state = random_state(MIXTRAL)
    del state["model.norm.weight"]
    with open_checkpoint(write_checkpoint(tmp_path / "checkpoint", state, MIXTRAL)) as checkpoint:
        call = partial(checkpoint.parameters, ["lm_head.weight", "model.norm.weight"])
        assert "'model.norm.weight'" in refusals.refusal(call, "checkpoint")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(f"{CONV}k_conv1d.weight"), "but by config.json its shape is [192"),
        (
            lambda state: state.update({f"{CONV}k_conv1d.weight": torch.zeros(3)}),
            f"transformers cannot make '{CONV}conv1d.weight' of '{CONV}k_conv1d.weight' [3] and 2",
        ),
        (
            lambda state: [state.pop(f"{CONV}{part}_conv1d.weight") for part in "qkv"],
            f"there are no weights for '{CONV}conv1d.weight'",
        ),
    ],
)
def test_parts_of_a_weight(refusal: Callable[..., str], change: Change, said: str) -> None:
    message = refusal(KIMI, change)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "layers", "said"),
    [
        (switch_config(), {"num_layers": 3}, "no weights for 'encoder.block.2."),
        (
            MIXTRAL | {"num_hidden_layers": 3},
            {"num_hidden_layers": 2},
            "'model.layers.2.block_sparse_moe.gate.weight' is of a block that the model does not",
        ),
        (
            switch_config() | {"num_layers": 4, "num_sparse_encoder_layers": 2},
            {"num_layers": 2, "num_sparse_encoder_layers": 1},
            "'encoder.block.2.layer.0.SelfAttention.k.weight' is of a block that the model does",
        ),
    ],
)
def test_another_number_of_blocks(
    refusal: Callable[..., str], config: dict[str, Any], layers: dict[str, int], said: str
) -> None:
    assert said in refusal(config, **layers)


def test_a_block_of_nothing_but_experts_too_many(refusal: Callable[..., str]) -> None:
    def change(state: State) -> None:
        for name in [name for name in state if ".layers.1." in name and ".experts." not in name]:
            del state[name]

    config = MIXTRAL | {"num_hidden_layers": 2}
    said = refusal(config, change, num_hidden_layers=1)
    assert "'model.layers.1.block_sparse_moe.experts.w1' is of a block" in said


@pytest.mark.parametrize("config", [MIXTRAL, GLM4V], ids=["mixtral", "glm4v_moe"])
def test_blocks_that_predict_further_tokens(tmp_path: Path, config: dict[str, Any]) -> None:
    """They are converted, though transformers has no place for them."""

    def configuration(layers: int, **further: int) -> dict[str, Any]:
        changes = {"num_hidden_layers": layers} | further
        if "text_config" in config:
            changes = {"text_config": config["text_config"] | changes}
        return config | changes

    state = random_state(configuration(3))
    for further in (0, 1):
        wrong = configuration(2, num_nextn_predict_layers=further)
        folder = write_checkpoint(tmp_path / str(further), state, wrong)
        with open_checkpoint(folder) as checkpoint:
            assert [layer.runs for layer in checkpoint.layers[-2:]] == [True, False]
            assert ".2." in checkpoint.layers[-1].path
            if further:
                checkpoint.check_complete()
            else:
                said = refusals.refusal(checkpoint.check_complete, "checkpoint")
                assert "is of a block that the model does not have" in said


def test_a_block_that_transformers_expects_to_be_left_over(tmp_path: Path) -> None:
    """By number, for models whose configuration does not count it."""
    config = {
        **CONFIGS["deepseek_v3"],
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "float32",
    }
    state = random_state(config)
    for number, good in ((61, True), (60, False)):
        folder = tmp_path / str(number)
        name = f"model.layers.{number}.enorm.weight"
        write_checkpoint(folder, state | {name: torch.zeros(64)}, config)
        with open_checkpoint(folder) as checkpoint:
            if good:
                checkpoint.check_complete()
            else:
                assert name in refusals.refusal(checkpoint.check_complete, "checkpoint")
