"""Llama 4: every expert is given all tokens, times the router's scores, most of which are zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qmoe_format.checkpoints.expert_layers import ExpertLayer
from qmoe_format.checkpoints.family import Family


class Llama4Layer(ExpertLayer):
    """``gate_up_proj`` [experts, hidden, 2 × inner]; forward takes [experts × tokens, hidden]."""

    transposed = True

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextExperts"

    def hidden(self, products: Sequence[Tensor]) -> Tensor:
        gate, up = torch.cat(list(products), -1).chunk(2, -1)
        hidden: Tensor = self.module.act_fn(gate) * up
        return hidden

    def routing(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A row for each token that goes to one expert, as in all published models; otherwise
        for each token and expert."""
        (rows,) = arguments
        experts = self.shapes[self.inputs][0]
        by_expert = rows.view(experts, -1, rows.shape[-1])
        chosen = by_expert.ne(0).any(-1)  # [experts, tokens]
        if (chosen.sum(0) > 1).any():
            numbers = torch.arange(experts, device=rows.device)[:, None]
            index = torch.where(chosen, numbers, experts).view(-1, 1)
        else:
            rows = by_expert.sum(0)
            index = torch.where(chosen.any(0), chosen.int().argmax(0), experts)[:, None]
        return rows, index, torch.ones_like(index, dtype=rows.dtype)

    def returned(self, outputs: Tensor, *arguments: Tensor) -> Tensor:
        """The model adds up what all experts return for a token."""
        (rows,) = arguments
        missing = rows.shape[0] - outputs.shape[0]
        return torch.cat([outputs, outputs.new_zeros(missing, outputs.shape[1])])


FAMILY = Family(model_types=("llama4", "llama4_text"), layer=Llama4Layer)
