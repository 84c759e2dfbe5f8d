"""Switch Transformers (arXiv 2101.03961): an encoder-decoder, top-1, ReLU.

``wi`` is [d_ff, d_model], ``wo`` [d_model, d_ff]. The experts are in ``layer.1`` of a block in the
encoder and in ``layer.2`` in the decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmoe_format.checkpoints.family import Family, Stage

if TYPE_CHECKING:
    from torch import Tensor


def _routing(selected: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``selected`` is one-hot [tokens, 1, experts], or zero beyond an expert's capacity."""
    import torch

    return torch.where(selected.any(-1), selected.argmax(-1), -1), weights


def _pass_through(block: Any, hidden: Tensor, *arguments: Any) -> Any:
    """The first block computes the position bias, which each block hands to the next."""
    bias = arguments[1]
    if bias is None:
        length = hidden.shape[1]
        attention = block.get_submodule("layer.0.SelfAttention")
        bias = attention.compute_bias(length, length, device=hidden.device)
    return hidden, bias, None


def _stage(stack: str, count: str) -> Stage:
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return Stage(stack, "block", count, shared_embedding="shared.weight", kept=(bias,))


FAMILY = Family(
    model_types=("switch_transformers",),
    experts="mlp.experts",
    router="mlp.router.classifier.weight",
    tensor="{prefix}.expert_{number}.{matrix}.weight",
    inputs=("wi",),
    output="wo",
    gated=False,
    activation=("dense_act_fn", "relu"),
    top_k=None,
    routing=_routing,
    stages=(_stage("encoder", "num_layers"), _stage("decoder", "num_decoder_layers")),
    pass_through=_pass_through,
    module_sizes=("num_experts", "d_ff", "d_model"),
    settings={"expert_capacity": 2**31 - 1},  # calibration drops no token
)
