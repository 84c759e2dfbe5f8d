"""How transformers builds each model family: where its blocks and experts are, and how it routes.

One record a family. ``calibration.walk`` runs any model that one describes, ``runtime`` puts
compressed experts into it. How tensors are named on disk is ``qmoe_format.checkpoints``' affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qmoe_format.errors import QMoEError


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a token goes through an expert: ``output(hidden([m(token) for m in inputs]))``.

    Attributes:
        inputs: the matrices that the token is multiplied with; one that has the rows of two, gate
            above up, counts as one.
        output: the matrix whose product is the expert's output.
        hidden: from the ``inputs``' products, each [tokens, rows], to ``output``'s factor.
    """

    inputs: tuple[str, ...]
    output: str
    hidden: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stack of blocks. Names are those of transformers' modules.

    Attributes:
        stack: the module whose forward runs the blocks.
        blocks: the list of blocks in it.
        experts: the experts of a block that has some.
        embedding: the checkpoint's names of its token embedding; the first that is there counts.
        kept: parameters of ``stack`` that its forward needs whatever the block.
        rotary: the child of ``stack`` that makes rotary embeddings, which has no weights.
    """

    stack: str
    blocks: str
    experts: str
    embedding: tuple[str, ...]
    kept: tuple[str, ...] = ()
    rotary: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Attributes:
        stages: the one stack, or the encoder's and the decoder's.
        top_k: key in the configuration of how many experts a token goes to; None: one.
        routing: from the arguments of the experts' forward after the hidden states to what
            ``Routed`` calls ``experts`` and ``weights``.
        skip: what a block returns that lets hidden states through unchanged, from the block, the
            hidden states and the remaining positional arguments of its forward.
        renamed: parts of module names and what they are in the checkpoint.
        settings: what to change in the configuration for calibration.
        inputs, output: as in ``Wiring``, by their names in the checkpoint.
        gated: what goes on is activation(gate) × up; otherwise activation(the one product).
        activation: key in the configuration and its default; None: experts compute something else,
            and cannot be calibrated.
    """

    stages: tuple[Stage, ...]
    top_k: str | None
    routing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    inputs: tuple[str, ...]
    output: str
    gated: bool
    activation: tuple[str, str] | None
    skip: Callable[..., Any] = lambda block, hidden, *arguments: hidden
    renamed: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def on_disk(self, name: str) -> str:
        """The checkpoint's name of a module or parameter."""
        for part, renamed in self.renamed:
            name = name.replace(part, renamed)
        return name


def _switch_routing(selected: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``selected`` is one-hot [tokens, 1, experts], or zero beyond an expert's capacity."""
    return torch.where(selected.any(-1), selected.argmax(-1), -1), weights


def _switch_skip(block: nn.Module, hidden: Tensor, *arguments: Any) -> Any:
    """The first block makes the bias of the positions, which every block hands to the next."""
    bias = arguments[1]
    if bias is None:
        length = hidden.shape[1]
        attention: Any = block.get_submodule("layer.0.SelfAttention")
        bias = attention.compute_bias(length, length, device=hidden.device)
    return hidden, bias, None


def _switch_stage(stack: str, feed_forward: int) -> Stage:
    return Stage(
        stack,
        blocks="block",
        experts=f"layer.{feed_forward}.mlp.experts",
        embedding=(f"{stack}.embed_tokens.weight", "shared.weight"),
        kept=(
            "final_layer_norm.weight",
            "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    )


SWITCH = Family(
    stages=(_switch_stage("encoder", 1), _switch_stage("decoder", 2)),
    top_k=None,
    routing=_switch_routing,
    skip=_switch_skip,
    settings={"expert_capacity": 2**31 - 1},  # no token of the calibration is to be dropped
    inputs=("wi",),
    output="wo",
    gated=False,
    activation=("dense_act_fn", "relu"),
)


def _decoder(inputs: tuple[str, ...], output: str, experts: str = "mlp.experts") -> Family:
    """A causal model with gated experts, as most are."""
    stage = Stage(
        "model",
        blocks="layers",
        experts=experts,
        embedding=("model.embed_tokens.weight",),
        rotary="rotary_emb",
    )
    return Family(
        stages=(stage,),
        top_k="num_experts_per_tok",
        routing=lambda index, weights: (index, weights),
        inputs=inputs,
        output=output,
        gated=True,
        activation=("hidden_act", "silu"),
    )


GATE_UP_DOWN = _decoder(("gate_proj", "up_proj"), "down_proj")

MIXTRAL = replace(
    _decoder(("w1", "w3"), "w2"),
    renamed=((".mlp.", ".block_sparse_moe."),),
)
PHIMOE = replace(
    MIXTRAL,
    renamed=(*MIXTRAL.renamed, (".router.weight", ".gate.weight")),
)
GRANITE = replace(
    _decoder(("input_linear",), "output_linear", "block_sparse_moe.experts"),
    renamed=(
        (".block_sparse_moe.experts", ".block_sparse_moe"),
        (".router.weight", ".router.layer.weight"),
    ),
)
GPT_OSS = replace(_decoder(("gate_up_proj",), "down_proj"), activation=None)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": GATE_UP_DOWN,
    "deepseek_v3": GATE_UP_DOWN,
    "glm4_moe": GATE_UP_DOWN,
    "gpt_oss": GPT_OSS,
    "granitemoe": GRANITE,
    "mixtral": MIXTRAL,
    "olmoe": GATE_UP_DOWN,
    "phimoe": PHIMOE,
    "qwen2_moe": GATE_UP_DOWN,
    "qwen3_moe": GATE_UP_DOWN,
    "switch_transformers": SWITCH,
}


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``; ``checkpoint`` if there is none."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise QMoEError(
        "checkpoint",
        f"config.json: model_type {model_type!r} is not a family that can be run; those are "
        f"{', '.join(sorted(FAMILIES))}",
    )


def wiring(config: Mapping[str, Any]) -> Wiring:
    """How the experts of the model with this ``config.json`` are wired.

    Raises:
        QMoEError: ``checkpoint`` if the family or its activation is not known.
    """
    family = family_for(config)
    if family.activation is None:
        raise QMoEError(
            "checkpoint",
            f"config.json: models of type {config['model_type']!r} cannot be calibrated; convert "
            "this one without calibration text",
        )
    key, default = family.activation
    name = config.get(key, default)
    if name not in ACT2FN:
        raise QMoEError(
            "checkpoint",
            f"config.json: {key!r} is {name!r}, no activation that transformers knows; update "
            "transformers, or convert without calibration text",
        )
    activation: Callable[[Tensor], Tensor] = ACT2FN[name]

    def gated(products: Sequence[Tensor]) -> Tensor:
        gate, up = products if len(products) == 2 else products[0].chunk(2, -1)
        return activation(gate) * up

    def plain(products: Sequence[Tensor]) -> Tensor:
        (product,) = products
        return activation(product)

    return Wiring(family.inputs, family.output, gated if family.gated else plain)


Shape = tuple[int, int, int]
"""Experts, out, in."""


def expert_modules(model: Any) -> Iterator[tuple[str, Any, Shape, Shape]]:
    """Path and module of each layer's experts in transformers' model, and the shapes of what their
    inputs are multiplied with, gate and up in one, and of the output."""
    config = model.config
    for path, module in list(model.named_modules()):
        if hasattr(module, "is_concatenated"):
            yield (
                path,
                module,
                *(
                    _shape(parameter, module.is_transposed)
                    for parameter in (module.gate_up_proj, module.down_proj)
                ),
            )
        elif type(module).__name__ == "SwitchTransformersExperts":
            inputs = config.num_experts, config.d_ff, config.d_model
            yield path, module, inputs, (inputs[0], inputs[2], inputs[1])


def _shape(parameter: Any, transposed: bool) -> Shape:
    experts, rows, columns = parameter.shape
    return (experts, columns, rows) if transposed else (experts, rows, columns)


def check_experts(where: str, stacks: Mapping[str, Sequence[int]], expected: Shape) -> None:
    """That a parameter of ``expert_modules`` has the rows of ``stacks``, shapes by name, one after
    the other; raises ``QMoEError``: ``checkpoint``."""
    rows = sum(shape[1] for shape in stacks.values())
    for name, shape in stacks.items():
        if (shape[0], rows, shape[2]) != expected:
            raise QMoEError(
                "checkpoint",
                f"{where}: stack {name!r} is of shape {list(shape)}, but by config.json experts "
                f"are {list(expected)}; correct config.json and convert the checkpoint again",
            )
