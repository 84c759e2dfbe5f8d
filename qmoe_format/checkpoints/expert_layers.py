"""The experts in transformers' model: where they are, and how they compute.

Transformers writes nearly all of them alike, a module with one parameter for a matrix of all
experts; ``families`` has the others.

    gate_up_proj [experts, 2 × inner, hidden]  gate above up, or rows in turns; up_proj if no gate
    down_proj    [experts, hidden, inner]      both the other way round if ``is_transposed``

    forward(hidden_states [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_format.errors import QMoEError

Shape = tuple[int, int, int]
"""Experts, rows (out), columns (in)."""


class ExpertLayer:
    """The experts of one layer; an expert returns ``output(hidden(inputs(token)))``.

    Attributes:
        path: the module's name in the model.
        module: transformers' module, perhaps without weights.
        inputs: the model's name of the matrices that a token is multiplied by.
        output: likewise, the matrix whose product is an expert's output.
        biases: their names, of inputs and output, or none.
        shapes: of both matrices, by the model's name.
        transposed: whether the parameters are [experts, in, out].
        interleaved: whether rows of gate and up take turns in what ``inputs`` returns.
    """

    transposed = False

    def __init__(self, path: str, module: Any, config: Any) -> None:
        self.path = path
        self.module = module
        gated = getattr(module, "has_gate", True)
        first = "gate_up_proj" if gated else "up_proj"
        self.inputs = f"{path}.{first}"
        self.output = f"{path}.down_proj"
        self.transposed = bool(getattr(module, "is_transposed", self.transposed))
        self.shapes = {name: self._shape(name) for name in (self.inputs, self.output)}
        self.interleaved = gated and not getattr(module, "is_concatenated", True)
        biased = getattr(module, "has_bias", False)
        self.biases = (f"{self.inputs}_bias", f"{self.output}_bias") if biased else ()

    def _shape(self, name: str) -> Shape:
        experts, rows, columns = getattr(self.module, name.rpartition(".")[2]).shape
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is one of those that the module's docstring describes."""
        own = dict(module.named_parameters(recurse=False))
        matrices = own.get("gate_up_proj", own.get("up_proj")), own.get("down_proj")
        return (
            hasattr(module, "_apply_gate")
            and all(each is not None and each.ndim == 3 for each in matrices)
            and not getattr(module, "has_post_expert_norm", False)
            and len(signature(module.forward).parameters) == 3
        )

    @property
    def width(self) -> int:
        """Of a token."""
        return self.shapes[self.inputs][2]

    def members(self, matrix: str) -> Sequence[str]:
        """The model's parameters that hold a matrix: one, or one for each expert."""
        return [matrix]

    def hidden(self, products: Sequence[Tensor]) -> Tensor:
        """From the products with the inputs to what ``output`` is multiplied by.

        Args:
            products: [tokens, rows] each, below one another in ``inputs``; with biases.
        """
        product = products[0] if len(products) == 1 else torch.cat(list(products), -1)
        if not getattr(self.module, "has_gate", True):
            activation: Callable[[Tensor], Tensor] = self.module.act_fn
            return activation(product)
        gate: Callable[[Tensor], Tensor] = self.module._apply_gate
        return gate(product)

    def routing(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the arguments of the module's forward.

        Returns:
            Tokens [tokens, hidden], experts int64 [tokens, k], a number that no expert has for
            none, and weights [tokens, k].
        """
        tokens, index, weights = arguments
        return tokens, index, weights

    def returned(self, outputs: Tensor, *arguments: Tensor) -> Tensor:
        """What forward returns if the weighted sums are ``outputs`` [tokens, hidden]."""
        return outputs

    def install(self, model: Any, compressed: Any, forward: Callable[..., Tensor]) -> None:
        """Let the module compute with ``compressed`` experts instead of its parameters.

        Args:
            forward: takes what ``routing`` returns, and biases; returns the weighted sums.
        """
        self.remove_weights()
        self.module.compressed = compressed

        def run(*arguments: Tensor, **named: Tensor) -> Tensor:
            arguments = (*arguments, *named.values())
            biases = [getattr(self.module, name.rpartition(".")[2]) for name in self.biases]
            return self.returned(forward(*self.routing(*arguments), *biases), *arguments)

        self.module.forward = run
        # Initialization, of it or of the module around it, would look for the weights.
        for path in (self.path, self.path.rpartition(".")[0]):
            model.get_submodule(path)._is_hf_initialized = True

    def remove_weights(self) -> None:
        """Remove the matrices from the module."""
        for name in (self.inputs, self.output):
            delattr(self.module, name.rpartition(".")[2])


def check_shape(where: str, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Check a tensor or a stack against the shape that the model has.

    Raises:
        QMoEError: ``checkpoint`` if they differ.
    """
    if tuple(found) != tuple(expected):
        raise QMoEError(
            "checkpoint",
            f"{where}: tensor {name!r} has shape {list(found)}, but by config.json its shape is "
            f"{list(expected)}",
            "download the checkpoint again or correct config.json",
        )
