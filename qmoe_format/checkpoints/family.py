"""What the package knows about a model family: one record, importable without torch.

``expert_stacks`` finds a checkpoint's experts with it; ``wiring``, ``calibration`` and ``runtime``
run the model with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A stack of blocks: the whole model, or an encoder or a decoder.

    Attributes:
        stack: the module whose forward runs the blocks.
        blocks: the list of blocks in it.
        count: the configuration's key of how many blocks there are.
        shared_embedding: the checkpoint's name of the token embedding if it is not
            ``STACK.embed_tokens.weight``.
        kept: parameters of blocks that every forward of the stack needs.
    """

    stack: str = "model"
    blocks: str = "layers"
    count: str = "num_hidden_layers"
    shared_embedding: str | None = None
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Model types whose experts have the same names and the same arithmetic.

    An expert returns ``output(activation(gate(x)) * up(x))``, or ``output(activation(input(x)))``
    if it is not gated. The defaults are those of most decoders. Names are those of transformers'
    modules and parameters, which ``renamed`` turns into the checkpoint's.

    Attributes:
        model_types: of ``config.json``.
        experts: the module of a layer's experts, without the layer's name in front.
        router: the parameter whose first dimension counts a layer's experts, likewise.
        tensor: an expert tensor's name in the checkpoint, made of ``{prefix}`` (the layer's name
            and ``experts``), ``{number}`` (the expert's) and ``{matrix}``. Without ``{number}``
            one tensor holds a matrix of all experts of a layer.
        inputs: the matrices that the token is multiplied by: gate and up, both in one, or a single
            one.
        output: the matrix whose product is the expert's output.
        transposed: tensors are ``[..., in, out]``; in a ``.qmoe`` file all are ``[..., out, in]``.
        biases: names of further tensors beside the matrices, which are kept as they are.
        renamed: parts of transformers' names and what they are in the checkpoint, in order.
        gated: whether experts have a gate.
        activation: the configuration's key and its default; None: experts compute something else,
            so that the model cannot be calibrated.
        top_k: the configuration's key of how many experts a token goes to; None: one.
        routing: takes the arguments of the experts' forward after the hidden states; returns
            experts int64 [tokens, k], -1 for none, and weights [tokens, k].
        stages: one, or an encoder and a decoder.
        pass_through: takes a block and the positional arguments of its forward; returns what the
            block would if it left the hidden states alone.
        module_sizes: if transformers makes every expert a module: the configuration's keys of the
            number of experts and of the rows and columns of ``inputs``.
        settings: what to change in the configuration for calibration.
    """

    model_types: tuple[str, ...]
    experts: str
    router: str
    tensor: str
    inputs: tuple[str, ...]
    output: str
    transposed: bool = False
    biases: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    gated: bool = True
    activation: tuple[str, str] | None = ("hidden_act", "silu")
    top_k: str | None = "num_experts_per_tok"
    routing: Callable[..., tuple[Tensor, Tensor]] = lambda index, weights: (index, weights)
    stages: tuple[Stage, ...] = (Stage(),)
    pass_through: Callable[..., Any] = lambda block, hidden, *arguments: hidden
    module_sizes: tuple[str, str, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matrices(self) -> list[str]:
        """All matrices of an expert, in the order of a ``.qmoe`` file."""
        return sorted((*self.inputs, self.output))

    @property
    def fused(self) -> bool:
        """Whether one tensor holds a matrix of all experts of a layer."""
        return "{number}" not in self.tensor

    @property
    def prefix(self) -> str:
        """``experts`` in the checkpoint."""
        return self.in_checkpoint(f".{self.experts}")[1:]

    def is_experts(self, module: str) -> bool:
        """Whether this is the name of a layer's experts in transformers' model, or its end."""
        return f".{module}".endswith(f".{self.experts}")

    def in_checkpoint(self, name: str) -> str:
        """The checkpoint's name of a module or parameter."""
        for part, renamed in self.renamed:
            name = name.replace(part, renamed)
        return name

    def members(self, prefix: str, matrix: str) -> str:
        """The tensors of a stack, ``{}`` for the expert's number."""
        return self.tensor.format(prefix=prefix, number="{}", matrix=matrix)

    def stack_name(self, prefix: str, matrix: str) -> str:
        """The name of a stack in a ``.qmoe`` file."""
        return self.members(prefix, matrix) if self.fused else f"{prefix}.{matrix}"
