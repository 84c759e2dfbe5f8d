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
        by_expert, chosen = self._by_expert(rows)
        experts = len(chosen)
        if (chosen.sum(0) > 1).any():
            numbers = torch.arange(experts, device=rows.device)[:, None]
            index = torch.where(chosen, numbers, experts).view(-1, 1)
        else:
            rows = by_expert.sum(0)
            index = torch.where(chosen.any(0), chosen.int().argmax(0), experts)[:, None]
        return rows, index, torch.ones_like(index, dtype=rows.dtype)

    def returned(self, outputs: Tensor, *arguments: Tensor) -> Tensor:
        """A row for each expert and token, zero unless it is the token's expert."""
        (rows,) = arguments
        if len(outputs) == len(rows):
            return outputs
        _, chosen = self._by_expert(rows)
        return torch.where(chosen[..., None], outputs, 0).flatten(0, 1)

    def _by_expert(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [experts, tokens, hidden], and which are not zero, bool [experts, tokens]."""
        by_expert = rows.view(self.shapes[self.inputs][0], -1, rows.shape[-1])
        return by_expert, by_expert.ne(0).any(-1)


FAMILY = Family(model_types=("llama4", "llama4_text"), layer=Llama4Layer)
