"""Switch Transformers (arXiv 2101.03961): every expert is a module; top-1, ReLU, no gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qmoe_format.checkpoints.expert_layers import ExpertLayer
from qmoe_format.checkpoints.family import Family


class SwitchLayer(ExpertLayer):
    """``experts.expert_E.wi.weight`` is [d_ff, d_model], ``wo`` [d_model, d_ff]."""

    def __init__(self, path: str, module: Any, config: Any) -> None:
        self.path = path
        self.module = module
        self.inputs = f"{path}.wi"
        self.output = f"{path}.wo"
        self.interleaved = False
        self.biases = ()
        shape = (config.num_experts, config.d_ff, config.d_model)
        self.shapes = {self.inputs: shape, self.output: (shape[0], shape[2], shape[1])}
        self._act = ACT2FN[config.dense_act_fn]
        self._dropout = nn.Dropout(config.dropout_rate)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return type(module).__name__ == "SwitchTransformersExperts"

    def members(self, matrix: str) -> Sequence[str]:
        name = matrix.rpartition(".")[2]
        count = self.shapes[matrix][0]
        return [f"{self.path}.expert_{expert}.{name}.weight" for expert in range(count)]

    def hidden(self, products: Sequence[Tensor]) -> Tensor:
        (product,) = products
        hidden: Tensor = self._act(product)
        return self._dropout(hidden) if self.module.training else hidden

    def routing(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The second argument is one-hot [tokens, 1, experts], or zero beyond the capacity."""
        tokens, selected, weights = arguments
        none = selected.shape[-1]
        return tokens, torch.where(selected.any(-1), selected.argmax(-1), none), weights

    def remove_weights(self) -> None:
        self.module.clear()


@contextmanager
def _empty_modules() -> Iterator[None]:
    """Spare the experts' modules: a Switch-C has 300,000 of them, half a minute of work."""
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling

    experts: Any = modeling.SwitchTransformersExperts
    original = experts.__init__
    experts.__init__ = lambda self, config: nn.ModuleDict.__init__(self)
    try:
        yield
    finally:
        experts.__init__ = original


def _pass_through(block: Any, hidden: Tensor, *arguments: Any, **_: Any) -> Any:
    """The first block computes the position bias, which each block hands to the next."""
    bias = arguments[1]
    if bias is None:
        length = hidden.shape[1]
        attention = block.get_submodule("layer.0.SelfAttention")
        bias = attention.compute_bias(length, length, device=hidden.device)
    return hidden, bias, None


FAMILY = Family(
    model_types=("switch_transformers",),
    layer=SwitchLayer,
    building=_empty_modules,
    pass_through=_pass_through,
    kept=("block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
    settings={"expert_capacity": 2**31 - 1},  # calibration drops no token
)
