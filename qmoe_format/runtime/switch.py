"""Switch Transformers, the one family for which transformers makes a module of every expert.

In the others the experts of a layer are two parameters, which take no memory before weights are
loaded, and transformers can be told which function to call for them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, where
from transformers.activations import ACT2FN

from qmoe_format.export.compressed_folder import QUANT_METHOD
from qmoe_format.runtime.experts import CompressedExperts


def build_without_experts(config: Any) -> None:
    """If this is a Switch Transformer's, let compressed models be built without expert modules."""
    if config.model_type != "switch_transformers":
        return
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling

    experts = modeling.SwitchTransformersExperts
    if hasattr(experts, "init_with_experts"):
        return

    def init(self: Any, config: Any) -> None:
        quantization = getattr(config, "quantization_config", None)
        if getattr(quantization, "quant_method", None) == QUANT_METHOD:
            nn.ModuleDict.__init__(self)
        else:
            experts.init_with_experts(self, config)

    experts.init_with_experts = experts.__init__
    experts.__init__ = init


class SwitchExperts(nn.Module):
    """Takes the place of ``SwitchTransformersExperts``."""

    def __init__(self, config: Any, compressed: CompressedExperts) -> None:
        super().__init__()
        self.act = ACT2FN[config.dense_act_fn]
        self.dropout = nn.Dropout(config.dropout_rate)
        self.compressed = compressed

    def forward(
        self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """As transformers calls it, with ``selected_experts`` one-hot [tokens, 1, experts].

        For a token beyond its expert's capacity it is all zero, and so is the result.
        """
        chosen, index = selected_experts.max(dim=-1)
        index = where(chosen > 0, index, selected_experts.shape[-1])
        return self.compressed.forward(
            hidden_states, index, routing_weights, lambda y: self.dropout(self.act(y))
        )


def replace_experts(model: Any, path: str, compressed: CompressedExperts) -> SwitchExperts:
    """Replace the experts at ``path``."""
    parent = model.get_submodule(path.rpartition(".")[0])
    parent.experts = experts = SwitchExperts(model.config, compressed)
    parent._is_hf_initialized = True  # initialization would look for the weights of experts
    return experts
