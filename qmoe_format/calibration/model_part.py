"""One stage of a Hugging Face model, encoder or decoder, of which one block at a time is run.

First the stage's own forward runs with blocks that pass the hidden states through, so that masks,
rotary embeddings and position biases are the model's own. Then the wanted block runs with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_format.calibration.sequences import Tokens
from qmoe_format.checkpoints import Checkpoint, Family
from qmoe_format.checkpoints.family import Stage
from qmoe_format.errors import QMoEError

_ROTARY = "rotary_emb"  # transformers' name in every stack


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the model.

    Attributes:
        name: the checkpoint's name of it, such as ``encoder.block.1``.
        prefix: what the names of its expert stacks begin with; None for a dense block.
    """

    name: str
    prefix: str | None


class ModelPart:
    """The encoder, the decoder or the only stage of a model, and the tokens it reads.

    Attributes:
        tokens: of each batch, on the device.
        counts: how many of each batch's tokens are not padding; ``count`` in all.
        counted: bool [count], of those that are not padding.
        width: of the hidden states.
        top_k: how many experts a token goes to.
        embedding_name: the checkpoint's name of the token embedding.
        blocks: the names of its blocks, in order.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        stage: Stage,
        checkpoint: Checkpoint,
        tokens: Sequence[Tokens],
        device: str,
    ) -> None:
        """Take the stage out of a ``model`` without weights, and the experts out of the stage.

        Raises:
            QMoEError: ``checkpoint`` if a tensor is missing or of another shape; ``argument`` for
                tokens that the model does not have.
        """
        self.counts = [int(batch.attended.sum()) for batch in tokens]
        self.count = sum(self.counts)
        self.counted = torch.cat([batch.counted[batch.attended] for batch in tokens])
        self.tokens = [
            Tokens(batch.ids.to(device), batch.attended.to(device), batch.counted)
            for batch in tokens
        ]
        self.top_k: int = getattr(model.config, family.top_k) if family.top_k else 1
        self.width: int = model.config.hidden_size
        self._family = family
        self._stage = stage
        self._checkpoint = checkpoint
        self._device = device
        self._module = model.get_submodule(stage.stack)
        if rotary := getattr(self._module, _ROTARY, None):  # a table, not weights
            setattr(self._module, _ROTARY, type(rotary)(config=self._module.config).to(device))
        self._blocks: list[Any] = list(self._module.get_submodule(stage.blocks))
        self._experts: list[list[nn.Module]] = []  # none or one of each block
        self.blocks: list[Block] = []
        for number, block in enumerate(self._blocks):
            paths = [path for path, _ in block.named_modules() if family.is_experts(path)]
            for path in paths:
                block.set_submodule(path, nn.Identity())
            self._experts.append([block.get_submodule(path) for path in paths])
            self.blocks.append(self.block(number, *paths))
        self.embedding_name = f"{stage.stack}.embed_tokens.weight"
        if stage.shared_embedding and self.embedding_name not in checkpoint.tensors:
            self.embedding_name = stage.shared_embedding
        embedding = self._module.get_input_embeddings().weight
        kept = [
            name
            for name, parameter in self._module.named_parameters()
            if name in stage.kept
            or not (name.startswith(f"{stage.blocks}.") or parameter is embedding)
        ]
        self._check(embedding.shape, kept)
        self._kept = {name: self._read(f"{stage.stack}.{name}") for name in kept}
        self._restore_kept()

    def block(self, number: int, experts: str | None = None) -> Block:
        """A block by its number and the name of the experts in it."""
        name = f"{self._stage.stack}.{self._stage.blocks}.{number}"
        return Block(name, experts and self._family.in_checkpoint(f"{name}.{experts}"))

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Have a block's weights in memory."""
        block, name = self._blocks[number], self.blocks[number].name
        weights = {each: self._read(f"{name}.{each}") for each in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        del weights
        try:
            yield
        finally:
            block.to("meta")
            self._restore_kept()

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Have the token embedding in memory."""
        module = self._module.get_input_embeddings()
        module.load_state_dict({"weight": self._read(self.embedding_name)}, assign=True)
        try:
            yield
        finally:
            module.to("meta")

    def embed(self, tokens: Tokens) -> Tensor:
        """The hidden states before the first block, whose ``embedding`` is in memory.

        Returns:
            float32 [sequences, length, d].
        """
        calls, _ = self._pass_through(tokens, None, {})
        hidden: Tensor = calls[0].args[0]
        return hidden

    def run_block(
        self,
        number: int,
        tokens: Tokens,
        rows: Tensor,
        outputs: Tensor | None,
        further: Mapping[str, Tensor],
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run a block that is ``loaded``.

        Args:
            number: of the block.
            tokens: of a batch.
            rows: float32 [tokens, d], the hidden states before the block, without padding.
            outputs: float32 [tokens, d], what the experts return; None: zeros.
            further: arguments of the stage's forward.

        Returns:
            The arguments of the experts' forward, () for a dense block; and the hidden states after
            the block: float32 [sequences, length, d].
        """
        given: tuple[Tensor, ...] = ()

        def experts(module: nn.Module, *arguments: Tensor) -> Tensor:
            nonlocal given
            given = arguments
            if outputs is None:
                return torch.zeros_like(arguments[0])
            return padded(outputs, tokens.attended).flatten(0, 1)

        call = self._pass_through(tokens, padded(rows, tokens.attended), further)[0][number]
        with _forward(self._experts[number], experts):
            result = call()
        return given, result[0] if isinstance(result, tuple) else result

    def output(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """What the stage returns after its last block: float32 [sequences, length, d]."""
        return self._pass_through(tokens, padded(rows, tokens.attended), {})[1]

    def _pass_through(
        self, tokens: Tokens, states: Tensor | None, further: Mapping[str, Tensor]
    ) -> tuple[list[partial[Any]], Tensor]:
        """Run the stage without its blocks.

        Returns:
            A call of each block, with the hidden states as the first argument; the stage's output.
        """
        calls = []

        def forward(block: Any, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
            if states is not None:  # the stage may scale its inputs, which are no embeddings here
                hidden = states
            calls.append(partial(block, hidden, *arguments, **options))
            return self._family.pass_through(block, hidden, *arguments)

        inputs = {"input_ids": tokens.ids} if states is None else {"inputs_embeds": states}
        mask = tokens.attended.long()
        with _forward(self._blocks, forward):
            output = self._module(
                **inputs, **further, attention_mask=mask, use_cache=False, return_dict=True
            )
        return calls, output.last_hidden_state

    def _read(self, name: str) -> Tensor:
        """A parameter by transformers' name or the checkpoint's: float32, on the device, a copy."""
        tensor = self._checkpoint.read(self._family.in_checkpoint(name))
        return tensor.to(self._device, torch.float32, copy=True)

    def _restore_kept(self) -> None:
        for name, tensor in self._kept.items():
            owner, _, parameter = name.rpartition(".")
            setattr(self._module.get_submodule(owner), parameter, nn.Parameter(tensor, False))

    def _check(self, embedding: torch.Size, kept: Collection[str]) -> None:
        """Refuse a checkpoint whose tensors are not the model's, and tokens that are not."""
        stack, blocks = self._stage.stack, self._stage.blocks
        expected = {self.embedding_name: embedding} | {
            f"{stack}.{name}": tensor.shape
            for name, tensor in self._module.state_dict().items()
            if name in kept or name.startswith(f"{blocks}.")
        }
        for name, shape in expected.items():
            name = self._family.in_checkpoint(name)
            info = self._checkpoint.tensors.get(name)
            if info is None or info.shape != tuple(shape):
                found = f"has shape {list(info.shape)}" if info else "is missing"
                raise QMoEError(
                    "checkpoint",
                    f"{self._checkpoint.folder}: tensor {name!r} {found}, but by config.json its "
                    f"shape is {list(shape)}",
                    "download the checkpoint again or correct config.json",
                )
        highest = max(int(batch.ids.max()) for batch in self.tokens)
        if highest >= embedding[0]:
            raise QMoEError(
                "argument",
                f"token {highest} is not one of the model's {embedding[0]}",
                "use the tokenizer that belongs to the model",
            )


@contextmanager
def _forward(modules: Sequence[nn.Module], function: Callable[..., Any]) -> Iterator[None]:
    """Have ``function(module, ...)`` in place of each module's forward."""
    for module in modules:
        module.forward = partial(function, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def padded(rows: Tensor, attended: Tensor) -> Tensor:
    """[tokens, d] to [sequences, length, d], with zeros for padding: where not ``attended``."""
    states = torch.zeros(*attended.shape, rows.shape[-1], device=attended.device)
    states[attended] = rows.to(attended.device)
    return states
