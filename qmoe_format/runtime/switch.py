"""Switch Transformers, the one family for which transformers makes a module of every expert.

In the others the experts of a layer are two parameters, which take no memory before weights are
loaded. A Switch-C would be 300,000 modules, half a minute of work for nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qmoe_format.export.compressed_folder import QUANT_METHOD


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
