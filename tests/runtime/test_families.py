"""Every type of model: rounded, and run with compressed experts like with dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import qmoe_format
from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.quantize import RECIPES
from qmoe_format.runtime.experts import compressed_modules
from tests.runtime.conftest import Converted
from tests.runtime.models import from_pretrained, generated, logits
from tests.tiny_models import CONFIGS, WRAPPERS, load_model

every_type = pytest.mark.parametrize("model_type", sorted(CONFIGS | WRAPPERS))


def rounded(experts: Tensor) -> Tensor:
    """[experts, rows, columns] as the recipe rtn leaves them."""
    return RECIPES["rtn"].quantize(experts).weights.dequantize()


def expert_modules(model: torch.nn.Module) -> Iterator[str]:
    """Names of the modules that are experts by the names of their classes."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("Experts") and kind != "InklingSharedExperts":  # all of them always run
            yield name


@every_type
def test_each_expert_is_rounded_and_nothing_else_changes(
    model_type: str, converted: Callable[[str], Converted]
) -> None:
    files = converted(model_type)
    with qmoe_format.open(files.file) as opened:
        opened.verify()
    model = load_model(files.checkpoint)
    before, after = model.state_dict(), load_model(files.dense).state_dict()
    assert before.keys() == after.keys()
    transposed: dict[str, bool] = {}
    with open_checkpoint(files.checkpoint) as checkpoint:
        for each in checkpoint.layers:
            for matrix in (each.layer.inputs, each.layer.output):
                names = each.layer.members(matrix)
                transposed |= dict.fromkeys(names, each.layer.transposed)
        assert {each.path for each in checkpoint.layers} == set(expert_modules(model))
    assert transposed
    for name, original in before.items():
        if name not in transposed:
            assert after[name].equal(original), name
        elif transposed[name]:
            assert after[name].equal(rounded(original.mT).mT), name
        else:
            experts = original if original.ndim == 3 else original[None]
            assert after[name].equal(rounded(experts).view_as(original)), name


@every_type
@torch.no_grad()
def test_like_the_dequantized_model(model_type: str, converted: Callable[[str], Converted]) -> None:
    files = converted(model_type)
    model = qmoe_format.load_model(files.file)
    dense = load_model(files.dense)
    assert model.dtype == torch.float32
    assert {name for name, _ in compressed_modules(model)} == set(expert_modules(dense))
    found, expected = logits(model), logits(dense)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert found.std() > 1e-3
    torch.testing.assert_close(logits(from_pretrained(files.folder)), found)


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "mixtral", "switch_transformers"])
def test_generation(model_type: str, converted: Callable[[str], Converted]) -> None:
    files = converted(model_type)
    expected = generated(load_model(files.dense))
    for model in (qmoe_format.load_model(files.file), from_pretrained(files.folder)):
        assert generated(model) == expected


def test_which_activations_are_known(converted: Callable[[str], Converted]) -> None:
    """Those of the others are relu without a gate, limited, and gelu."""
    for model_type, expected in (
        ("mixtral", True),
        ("qwen3_moe", True),
        ("switch_transformers", False),
        ("gpt_oss", False),
        ("gemma4", False),
    ):
        model = qmoe_format.runtime.load_model(converted(model_type).file)
        gates = {each.compressed.silu_gate for _, each in compressed_modules(model)}
        assert gates == {expected}, model_type
