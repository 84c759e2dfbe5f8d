"""The experts of a layer: what transformers calls, with weights that stay compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qmoe_format import codec
from qmoe_format.errors import QMoEError
from qmoe_format.runtime.grouped_linear import Group, grouped_linear
from qmoe_format.runtime.lazy_stack import LazyStack
from qmoe_format.runtime.tuning import Tuning

Activation = Callable[[Tensor], Tensor]
Product = Callable[[Sequence[LazyStack], Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class CompressedExperts:
    """The experts of one layer; an expert returns ``output(activation(inputs(x)))``.

    Attributes:
        inputs: gate and up in one stack, or in two, gate first; or the only input.
        output: the stack whose product is the experts' output.
        tuning: of their products.
        silu_gate: whether the activation is silu(gate) * up.

    Raises:
        QMoEError: ``argument`` if the shapes do not fit each other.
    """

    inputs: tuple[LazyStack, ...]
    output: LazyStack
    tuning: Tuning = field(default_factory=Tuning)
    silu_gate: bool = False

    def __post_init__(self) -> None:
        experts, hidden, inner = self.output.shape
        rows = sum(stack.shape[1] for stack in self.inputs)
        if rows not in (inner, 2 * inner) or any(
            (stack.shape[0], stack.shape[2]) != (experts, hidden) for stack in self.inputs
        ):
            raise QMoEError(
                "argument",
                f"{[*self.stacks]} are not the inputs and the output of one layer",
                "convert the checkpoint again",
            )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise QMoEError(
            "argument",
            "compressed experts are views of an open file and cannot be copied or pickled",
            "load the model again, or save it with save_pretrained",
        )

    @property
    def stacks(self) -> tuple[LazyStack, ...]:
        """Inputs and output."""
        return *self.inputs, self.output

    def forward(
        self, x: Tensor, index: Tensor, weights: Tensor, activation: Activation, *biases: Tensor
    ) -> Tensor:
        """The weighted sum of each token's experts, added up in float32, in the dtype of ``x``.

        Args:
            x: hidden states, floating [tokens, hidden].
            index: experts, integers [tokens, k]; numbers that are too large are left out.
            weights: floating [tokens, k].
            activation: maps products with ``inputs`` to what ``output`` is multiplied by.
            biases: none, or those of the inputs [experts, rows] and the output [experts, hidden].

        Raises:
            QMoEError: the codes of ``LazyStack``'s methods.
        """
        differentiable = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        if x.is_cuda and len(x) <= self.tuning.gpu_layer_tokens and not differentiable:
            return self._forward_fused(x, index, weights, activation, *biases)
        if len(x) == 1 and self.silu_gate and not (x.is_cuda or differentiable or biases):
            y = self._forward_packed(x, index[0], weights[0])
            if y is not None:
                return y
        k = index.shape[1]
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        scales = weights.reshape(-1)
        cached = None if x.is_cuda else self.output.cached
        most = cached.most if cached else self.output.shape[0]
        parts = list(_by_expert(index, self.output.shape[0], self.tuning.pairs, most))
        for part, (numbers, groups) in enumerate(parts):
            pairs = torch.from_numpy(numbers).to(x.device)
            tokens = torch.from_numpy(numbers // k).to(x.device)
            product = partial(grouped_linear, groups=groups, tuning=self.tuning)
            chosen_biases = [bias[index.reshape(-1)[pairs]] for bias in biases]
            with cached.using(_experts(groups)) if cached else nullcontext():
                if cached and part + 1 < len(parts):
                    cached.prefetch(_experts(parts[part + 1][1]))
                y = self._run(product, x[tokens], activation, *chosen_biases)
            y = (y * scales[pairs, None]).to(torch.float32)
            # For one token there is nothing to sort, but index_add would wake torch's threads.
            total = total + y.sum(0) if len(x) == 1 else total.index_add(0, tokens, y)
        return total.to(x.dtype)

    def _forward_packed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """One token, by one kernel; None if an expert is not packed."""
        chosen = index.tolist()
        places = [i for i, expert in enumerate(chosen) if expert < self.output.shape[0]]
        experts = [chosen[i] for i in places]
        if not (experts and self.output.hot):
            return None
        inputs = [(stack.name, expert) for expert in experts for stack in self.inputs]
        outputs = [(self.output.name, expert) for expert in experts]
        found = self.output.hot.kept(inputs + outputs)
        if found is None:
            return None
        size = sum(matrix.rows * matrix.columns for matrix in found)
        threads = min(self.tuning.threads, 1 + size // self.tuning.packed_per_thread)
        values, scales = (
            each.detach().to(torch.float32).contiguous().numpy() for each in (x[0], weights)
        )
        y = codec.multiply_gated(found[: len(inputs)], found[len(inputs) :], values, threads)
        return torch.from_numpy(scales[places] @ y).to(x.dtype)[None]

    def _forward_fused(
        self, x: Tensor, index: Tensor, weights: Tensor, activation: Activation, *biases: Tensor
    ) -> Tensor:
        """All pairs in one call, or in one per stack, without waiting for the GPU."""
        from qmoe_format.gpu import expert_matvec, gated_experts

        if self.silu_gate and not biases:
            *inputs, output = (stack.upload(x.get_device()) for stack in self.stacks)
            given = (each.contiguous() for each in (x, index, weights))
            return cast(Tensor, gated_experts(inputs, output, *given))
        known = index < self.output.shape[0]
        index = torch.where(known, index, 0)
        chosen = index.to(torch.int32).contiguous()

        def product(stacks: Sequence[LazyStack], x: Tensor) -> Tensor:
            x, device = x.contiguous(), x.get_device()
            parts = [expert_matvec(stack.upload(device), x, chosen) for stack in stacks]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

        def activate(y: Tensor) -> Tensor:
            return activation(y.flatten(0, 1)).view(*index.shape, -1)

        y = self._run(product, x, activate, *(bias[index] for bias in biases))
        weighted = y * torch.where(known, weights, 0)[..., None]
        return weighted.sum(dim=1, dtype=torch.float32).to(x.dtype)

    def _run(self, product: Product, x: Tensor, activation: Activation, *biases: Tensor) -> Tensor:
        y = product(self.inputs, x)
        if biases:
            y = y + biases[0]
        y = product((self.output,), activation(y))
        return y + biases[1] if biases else y


def _experts(groups: Sequence[Group]) -> list[int]:
    return [group.expert for group in groups]


def _by_expert(
    index: Tensor, experts: int, pairs: int, most: int
) -> Iterator[tuple[npt.NDArray[np.int64], list[Group]]]:
    """(token, expert) pairs by expert: places in ``index``, groups.

    About ``pairs`` at a time, and those of at most ``most`` experts.
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
        if groups and (last - begin > pairs or len(groups) == most):
            yield order[begin:first], groups
            begin, groups = first, []
        groups.append(Group(int(ranked[first]), first - begin, last - begin))
    if groups:
        yield order[begin : begin + groups[-1].last], groups


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each layer's compressed experts."""
    return ((name, each) for name, each in model.named_modules() if hasattr(each, "compressed"))
