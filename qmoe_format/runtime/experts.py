"""What transformers calls for a layer's experts, with the experts compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from qmoe_format.errors import QMoEError
from qmoe_format.runtime.grouped_linear import Group, grouped_linear
from qmoe_format.runtime.lazy_stack import Stack

TOGETHER = 256  # (token, expert) pairs whose activations are held at a time, about
GPU_FEW = 64  # tokens that the GPU's kernel for pairs takes


@dataclass(frozen=True, eq=False)
class CompressedExperts:
    """The stacks of one layer: output(act(inputs(x))).

    ``inputs``: one stack of gate and up together, or two, gate first; or the only one that there
    is. It belongs to an open file, so it is not copied or pickled with a model.
    """

    inputs: tuple[Stack, ...]
    output: Stack

    @property
    def experts(self) -> int:
        """Their number."""
        return self.output.shape[0]

    def __post_init__(self) -> None:
        """Check that the stacks fit: ``QMoEError`` (``argument``) if not."""
        experts, hidden, inner = self.output.shape
        rows = sum(stack.shape[1] for stack in self.inputs)
        if rows not in (inner, 2 * inner) or any(
            (stack.shape[0], stack.shape[2]) != (experts, hidden) for stack in self.inputs
        ):
            raise QMoEError(
                "argument",
                f"{[*self.inputs, self.output]} are not the inputs and the output of a layer",
            )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise QMoEError(
            "argument",
            "compressed experts are views of an open file and cannot be copied or pickled: "
            "load the model again, or save_pretrained it",
        )


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function of transformers for modules with an attribute ``compressed``.

    ``hidden_states`` [tokens, hidden], ``top_k_index`` and ``top_k_weights`` [tokens, k]; returns
    [tokens, hidden] of the type of ``hidden_states``. Pairs whose index is not below the number of
    experts are left out.
    """
    biases = (self.gate_up_proj_bias, self.down_proj_bias) if self.has_bias else None
    gate = self._apply_gate if self.has_gate else self.act_fn
    return _forward(self.compressed, hidden_states, top_k_index, top_k_weights, gate, biases)


class SwitchExperts(nn.Module):
    """In place of ``SwitchTransformersExperts``; ``compressed`` is set by who builds it."""

    compressed: CompressedExperts

    def __init__(self, config: Any) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.num_experts = int(config.num_experts)
        self.act = ACT2FN[config.dense_act_fn]
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """``hidden_states`` [tokens, hidden], ``selected_experts`` one-hot [tokens, 1, experts],
        all zero for a token beyond its expert's capacity, whose result is zero;
        ``routing_weights`` [tokens, 1].
        """
        chosen, index = selected_experts.max(dim=-1)
        index = torch.where(chosen > 0, index, self.num_experts)

        def gate(y: torch.Tensor) -> torch.Tensor:
            activated: torch.Tensor = self.dropout(self.act(y))
            return activated

        return _forward(self.compressed, hidden_states, index, routing_weights, gate)


def _forward(
    compressed: CompressedExperts,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    recording = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    if x.is_cuda and len(x) <= GPU_FEW and not recording:
        return _few_on_gpu(compressed, x, index, weights, gate, biases)
    k = index.shape[1]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    flat_weights = weights.reshape(-1)
    for numbers, groups in _in_turn(index, compressed.experts):
        pairs = torch.from_numpy(numbers).to(x.device)
        tokens = pairs // k
        y = grouped_linear(compressed.inputs, x[tokens], groups)
        if biases:
            experts = index.reshape(-1)[pairs]
            y = y + biases[0][experts]
        y = grouped_linear((compressed.output,), gate(y), groups)
        if biases:
            y = y + biases[1][experts]
        y = y * flat_weights[pairs, None]
        total = total.index_add(0, tokens, y.to(torch.float32))
    return total.to(x.dtype)


def _in_turn(index: torch.Tensor, experts: int) -> Iterator[tuple[np.ndarray, list[Group]]]:
    """(Token, expert) pairs, expert by expert: numbers in ``index``, flat, and their groups.

    About ``TOGETHER`` at a time, so that activations of long texts stay small.
    """
    flat = index.reshape(-1).cpu().numpy()
    order = np.argsort(flat, kind="stable")
    ranked = flat[order]
    cuts = [0, *(np.flatnonzero(np.diff(ranked)) + 1).tolist(), len(flat)]
    begin = 0
    groups: list[Group] = []
    for first, last in pairwise(cuts):
        if first == last or ranked[first] >= experts:
            break
        if groups and last - begin > TOGETHER:
            yield order[begin:first], groups
            begin, groups = first, []
        groups.append(Group(int(ranked[first]), first - begin, last - begin))
    if groups:
        yield order[begin : begin + groups[-1].last], groups


def _few_on_gpu(
    compressed: CompressedExperts,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """All pairs in one launch a stack; nothing waits for the GPU."""
    from qmoe_format.gpu import expert_matvec

    device = x.get_device()
    known = index < compressed.experts
    index = torch.where(known, index, 0)
    weights = torch.where(known, weights, 0)
    chosen = index.to(torch.int32).contiguous()
    x = x.contiguous()
    parts = [expert_matvec(stack.upload(device), x, chosen) for stack in compressed.inputs]
    y = torch.cat(parts, dim=-1)
    if biases:
        y = y + biases[0][index]
    y = gate(y.flatten(0, 1)).view(*index.shape, -1)
    y = expert_matvec(compressed.output.upload(device), y.contiguous(), chosen)
    if biases:
        y = y + biases[1][index]
    total: torch.Tensor = (y * weights[..., None]).sum(dim=1, dtype=torch.float32)
    return total.to(x.dtype)
