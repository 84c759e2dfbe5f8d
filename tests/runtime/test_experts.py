"""Layers of compressed experts, against transformers' own with the dense weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, SwitchTransformersConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from qmoe_format import QMoEFile
from qmoe_format.checkpoints.families import expert_layers
from qmoe_format.runtime.experts import CompressedExperts
from qmoe_format.runtime.lazy_stack import LazyStack
from qmoe_format.runtime.tuning import Tuning
from tests.refusals import refusal
from tests.runtime.files import EXPERTS, HIDDEN, INNER, Dense, random

K = 2


def compressed(
    file: QMoEFile, *inputs: str, silu_gate: bool = False, **tuning: int
) -> CompressedExperts:
    stacks = tuple(LazyStack(file, name) for name in inputs)
    return CompressedExperts(stacks, LazyStack(file, "down"), Tuning(**tuning), silu_gate)


def install(module: nn.Module, config: Any, experts: CompressedExperts) -> None:
    """Let a module of transformers compute with compressed experts."""
    model = nn.Module()
    model.experts, model.config = module, config
    (layer,) = expert_layers(model)

    def forward(x: Tensor, index: Tensor, weights: Tensor, *biases: Tensor) -> Tensor:
        return experts.forward(x, index, weights, lambda y: layer.hidden([y]), *biases)

    layer.install(model, experts, forward)


def mixtral(file: QMoEFile, dense: Dense, **tuning: int) -> tuple[Any, Any]:
    """A layer of Mixtral with two stacks for gate and up, and the dense one."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    layer, reference = MixtralExperts(config), MixtralExperts(config)
    reference.gate_up_proj.data = torch.cat([dense["gate"], dense["up"]], dim=1)
    reference.down_proj.data = dense["down"]
    install(layer, config, compressed(file, "gate", "up", silu_gate=True, **tuning))
    return layer, reference


def gpt_oss(file: QMoEFile, dense: Dense) -> tuple[Any, Any]:
    """A layer of gpt-oss: biases, gate and up interleaved in one stack."""
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    layer, reference = GptOssExperts(config), GptOssExperts(config)
    reference.gate_up_proj.data = dense["gate_up"].mT.contiguous()
    reference.down_proj.data = dense["down"].mT.contiguous()
    for name, shape in (("gate_up_proj_bias", 2 * INNER), ("down_proj_bias", HIDDEN)):
        bias = random(EXPERTS, shape, seed=7)
        getattr(layer, name).data, getattr(reference, name).data = bias, bias.clone()
    install(layer, config, compressed(file, "gate_up"))
    return layer, reference


def routing(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """K different experts a token, and their weights."""
    scores = random(tokens, EXPERTS, seed=seed)
    weights, index = scores.softmax(dim=-1).topk(K)
    return index, weights


@pytest.mark.parametrize("family", [mixtral, gpt_oss])
@pytest.mark.parametrize("tokens", [0, 1, 3, 400])
def test_like_transformers(
    file: QMoEFile, dense: Dense, family: Callable[..., Any], tokens: int
) -> None:
    layer, reference = family(file, dense)
    x, (index, weights) = random(tokens, HIDDEN), routing(tokens)
    with torch.no_grad():
        y, want = layer(x, index, weights), reference(x, index, weights)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairs", [1, 100, 10**6])
def test_any_number_of_pairs_at_a_time(file: QMoEFile, dense: Dense, pairs: int) -> None:
    layer, reference = mixtral(file, dense, pairs=pairs)
    x, (index, weights) = random(90, HIDDEN), routing(90)
    torch.testing.assert_close(layer(x, index, weights), reference(x, index, weights))


@pytest.mark.parametrize("tokens", [1, 30])
def test_bfloat16(file: QMoEFile, dense: Dense, tokens: int) -> None:
    layer, reference = mixtral(file, dense)
    x, (index, weights) = random(tokens, HIDDEN).bfloat16(), routing(tokens)
    y = layer(x, index, weights)
    assert y.dtype == torch.bfloat16
    want = reference(x.float(), index, weights)
    assert (y - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("tokens", [1, 40])
def test_gradients_of_tokens_and_of_the_routing(file: QMoEFile, dense: Dense, tokens: int) -> None:
    layer, reference = gpt_oss(file, dense)
    index, weights = routing(tokens)
    results = []
    for module in (layer, reference):
        x, w = random(tokens, HIDDEN).requires_grad_(), weights.clone().requires_grad_()
        y = module(x, index, w)
        grads = torch.autograd.grad(
            y, [x, w, module.gate_up_proj_bias, module.down_proj_bias], random(*y.shape, seed=3)
        )
        results.append(grads)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_experts_that_do_not_exist_are_left_out(file: QMoEFile, dense: Dense) -> None:
    """Under expert parallelism, the number of experts as an index means: on another device."""
    layer, reference = mixtral(file, dense)
    x, (index, weights) = random(5, HIDDEN), routing(5)
    index[1], index[2, 0] = EXPERTS, EXPERTS
    y = layer(x, index, weights)
    torch.testing.assert_close(y, reference(x, index, weights))
    assert not y[1].any()
    assert not layer(x, torch.full_like(index, EXPERTS), weights).any()


def switch(file: QMoEFile, dense: Dense) -> tuple[Any, Any]:
    config = SwitchTransformersConfig(d_model=HIDDEN, d_ff=INNER, num_experts=EXPERTS)
    layer, reference = SwitchTransformersExperts(config), SwitchTransformersExperts(config)
    install(layer, config, compressed(file, "up"))
    for e in range(EXPERTS):
        reference[f"expert_{e}"].wi.weight.data = dense["up"][e]
        reference[f"expert_{e}"].wo.weight.data = dense["down"][e]
    return layer.eval(), reference.eval()


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_switch(file: QMoEFile, dense: Dense, tokens: int) -> None:
    layer, reference = switch(file, dense)
    x, weights = random(tokens, HIDDEN), random(tokens, 1, seed=1)
    selected = torch.nn.functional.one_hot(
        torch.randint(EXPERTS, (tokens, 1), generator=torch.Generator().manual_seed(2)), EXPERTS
    )
    if tokens > 1:
        selected[3] = 0  # beyond its expert's capacity
    y = layer(x, selected, weights)
    torch.testing.assert_close(y, reference(x, selected, weights))
    if tokens > 1:
        assert not y[3].any()


def test_switch_drops_out_only_in_training(file: QMoEFile, dense: Dense) -> None:
    layer, _ = switch(file, dense)
    x, selected = random(4, HIDDEN), torch.eye(EXPERTS, dtype=torch.int64)[:4, None]
    weights = torch.ones(4, 1)
    assert torch.equal(layer(x, selected, weights), layer(x, selected, weights))
    layer.train()
    assert not torch.equal(layer(x, selected, weights), layer(x, selected, weights))


def test_nothing_is_in_the_state(file: QMoEFile, dense: Dense) -> None:
    layer, _ = switch(file, dense)
    assert not layer.state_dict()
    assert not list(layer.parameters()) + list(layer.buffers())


def test_copies_are_refused(file: QMoEFile, dense: Dense) -> None:
    layer, _ = switch(file, dense)
    for copying in (copy.deepcopy, pickle.dumps):
        assert "load the model again" in refusal(partial(copying, layer), "argument")


def test_stacks_of_other_shapes_are_refused(file: QMoEFile) -> None:
    for inputs in (("down",), ("gate_up", "down"), ()):
        refusal(partial(compressed, file, *inputs), "argument")
