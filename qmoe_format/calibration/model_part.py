"""One part of a Hugging Face model, encoder or decoder, of which one block at a time is run.

The model's own forward runs, so masks, rotary embeddings and position biases are made by the model
itself. The blocks before the wanted one only hand on hidden states, and the forward ends with the
wanted one. In place of each block's experts there is a module that takes down what they are given,
or returns what it was told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_format.calibration.sequences import Tokens
from qmoe_format.checkpoints import Checkpoint
from qmoe_format.checkpoints.wiring import Family, Stage
from qmoe_format.errors import QMoEError
from qmoe_format.machine import flushing_thread


class _Reached(Exception):
    """Ends the forward of a part, with what was wanted of it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _Experts(nn.Module):
    """Stands for a block's experts: returns ``answer``, or ends the forward with its arguments."""

    answer: Tensor | None = None

    def forward(self, *arguments: Tensor) -> Tensor:
        if self.answer is None:
            raise _Reached(arguments)
        return self.answer


class ModelPart:
    """The encoder, the decoder or the only stack of blocks of a model, and the tokens it reads.

    Attributes:
        tokens: of each batch, on the device.
        counts: how many of each batch's are not padding; ``count`` of all.
        counted: bool [count], of those that are not padding.
        width: of the hidden states.
        embedding_name: the checkpoint's name of the token embedding.
        blocks: the model's blocks, without experts and, unless ``loaded``, without weights.
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
        self.family = family
        self.stage = stage
        self.counts = [int(batch.attended.sum()) for batch in tokens]
        self.count = sum(self.counts)
        self.counted = torch.cat([batch.counted[batch.attended] for batch in tokens])
        self.tokens = [
            Tokens(batch.ids.to(device), batch.attended.to(device), batch.counted)
            for batch in tokens
        ]
        self.top_k: int = getattr(model.config, family.top_k) if family.top_k else 1
        self.width: int = model.config.hidden_size
        self._checkpoint = checkpoint
        self._device = device
        self._thread = flushing_thread()
        self._module = model.get_submodule(stage.stack)
        if stage.rotary:
            made = type(self._module.get_submodule(stage.rotary))(config=self._module.config)
            self._module.set_submodule(stage.rotary, made.to(device))
        self.blocks: list[Any] = list(self._module.get_submodule(stage.blocks))
        self._experts: list[_Experts | None] = []
        for number, block in enumerate(self.blocks):
            sparse = any(name == stage.experts for name, _ in block.named_modules())
            self._experts.append(_Experts() if sparse else None)
            if sparse:
                block.set_submodule(stage.experts, self._experts[number])
            block.forward = partial(self._step, number, block.forward)
        there = [name for name in stage.embedding if name in checkpoint.tensors]
        self.embedding_name = (there or stage.embedding)[0]
        self._check()
        self._kept = {name: self._read(f"{stage.stack}.{name}") for name in stage.kept}
        self._keep()

    def name(self, number: int) -> str:
        """The checkpoint's name of a block; one beyond the last may be in the checkpoint only."""
        return f"{self.stage.stack}.{self.stage.blocks}.{number}"

    def head(self, number: int) -> str | None:
        """What the names of a block's expert stacks begin with; None for a dense block.

        A block beyond the last counts as sparse.
        """
        if number < len(self.blocks) and self._experts[number] is None:
            return None
        return self.family.on_disk(f"{self.name(number)}.{self.stage.experts}")

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Have a block's weights in memory."""
        block = self.blocks[number]
        weights = {name: self._read(f"{self.name(number)}.{name}") for name in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        del weights
        try:
            yield
        finally:
            block.to("meta")
            self._keep()

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Have the token embedding in memory."""
        module = self._module.get_input_embeddings()
        module.load_state_dict({"weight": self._read(self.embedding_name)}, assign=True)
        try:
            yield
        finally:
            module.to("meta")

    def forward(
        self,
        number: int,
        tokens: Tokens,
        rows: Tensor | None = None,
        answer: Tensor | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The arguments of a block's experts, or with their ``answer`` the block's hidden states.

        Without ``rows``: the hidden states before the block. After the last block: the part's
        output.
        """
        states = None if rows is None else padded(rows, tokens.attended)
        experts = self._experts[number] if number < len(self.blocks) else None
        if experts and answer is not None:
            experts.answer = padded(answer, tokens.attended).flatten(0, 1)
        self._current, self._states = number, states
        inputs = {"input_ids": tokens.ids} if states is None else {"inputs_embeds": states}
        mask = tokens.attended.long()
        try:
            return self._thread.submit(
                self._call, **inputs, **(more or {}), attention_mask=mask
            ).result()
        finally:  # or each block would keep a batch
            self._states = None
            if experts:
                experts.answer = None

    @torch.no_grad()
    def _call(self, **inputs: Tensor) -> Any:
        try:
            return self._module(**inputs, use_cache=False, return_dict=True).last_hidden_state
        except _Reached as reached:
            return reached.value

    def output(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """What the part returns after its last block: float32 [sequences, length, d]."""
        states: Tensor = self.forward(len(self.blocks), tokens, rows)
        return states

    def _step(self, number: int, real: Any, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """In place of a block's forward."""
        if self._states is None:
            raise _Reached(hidden)
        if number < self._current:
            return self.family.skip(self.blocks[number], self._states, *arguments)
        result = real(self._states, *arguments, **options)
        raise _Reached(result[0] if isinstance(result, tuple) else result)

    def _read(self, name: str) -> Tensor:
        """A parameter by its module's name, or on disk: float32, on the device, a copy."""
        tensor = self._checkpoint.read(self.family.on_disk(name))
        return tensor.to(self._device, torch.float32, copy=True)

    def _keep(self) -> None:
        for name, tensor in self._kept.items():
            owner, _, parameter = name.rpartition(".")
            setattr(self._module.get_submodule(owner), parameter, nn.Parameter(tensor, False))

    def _check(self) -> None:
        """That what will be read is there, and as large as the model's."""
        embedding = self._module.get_input_embeddings().weight
        expected = {self.embedding_name: embedding.shape}
        parameters = self._module.state_dict()
        for name, tensor in parameters.items():
            if name in self.stage.kept or name.startswith(f"{self.stage.blocks}."):
                expected[f"{self.stage.stack}.{name}"] = tensor.shape
        for name, shape in expected.items():
            info = self._checkpoint.tensors.get(self.family.on_disk(name))
            if info is None or info.shape != tuple(shape):
                found = f"is of shape {list(info.shape)}" if info else "is missing"
                raise QMoEError(
                    "checkpoint",
                    f"{self._checkpoint.folder}: tensor {self.family.on_disk(name)!r} {found}, but "
                    f"config.json makes a model with one of shape {list(shape)}; fetch the "
                    "checkpoint again or correct config.json",
                )
        highest = max(int(batch.ids.max()) for batch in self.tokens)
        if highest >= embedding.shape[0]:
            raise QMoEError(
                "argument",
                f"token {highest} is none of the model's {embedding.shape[0]}; the tokenizer is "
                "not the one that belongs to it",
            )


def padded(rows: Tensor, attended: Tensor) -> Tensor:
    """[tokens, d] to [sequences, length, d], with zeros where nothing is attended to."""
    states = torch.zeros(*attended.shape, rows.shape[-1], device=attended.device)
    states[attended] = rows.to(attended.device)
    return states
