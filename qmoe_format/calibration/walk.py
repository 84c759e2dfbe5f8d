"""A Hugging Face model run block by block, with the weights of one block in memory.

The model is built without weights, and its own forward runs for every block again: the blocks
before the current one only hand on, and the forward ends with the current one. So masks, rotary
embeddings and position biases are made by the model itself. In place of each block's experts there
is a module that takes down what they are given, or returns what it was told. Hidden states lie on
disk, of the tokens that are not padding: the others get zeros, which no token attends to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qmoe_format.calibration.buffer import SUFFIX, Routed, Rows, sweep
from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.checkpoints import Checkpoint
from qmoe_format.errors import QMoEError
from qmoe_format.families import Family, Stage, family_for
from qmoe_format.machine import flushing_thread


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the model.

    Attributes:
        name: the checkpoint's name of it, such as ``encoder.block.1``.
        head: what the names of its expert stacks begin with, up to ``experts``; None for a dense
            block.
    """

    name: str
    head: str | None


class Walk:
    """A model on its way through batches of tokens, in float32.

    ``start`` it, then for each block ``collect`` what its experts are given and ``advance`` with
    what they return; after the last, ``finish``.

    Attributes:
        blocks: in order of execution, an encoder's before the decoder's. After them those that a
            checkpoint has for multi-token prediction and the model does not run: no token goes to
            their experts.
        position: how many of them are done.
    """

    def __init__(
        self, checkpoint: Checkpoint, batches: Sequence[Batch], folder: Path, device: str = "cpu"
    ) -> None:
        """
        Args:
            checkpoint: has to stay open.
            batches: what the model reads; those of an encoder-decoder have ``targets``.
            folder: where the hidden states go, in files whose names end in ``.rows``.
            device: where a block runs.

        Raises:
            QMoEError: ``checkpoint`` if the family is not known, or if a tensor is missing or of
                another shape than ``config.json`` says; ``argument`` for batches without tokens
                or with tokens that the model does not have.
        """
        family = family_for(checkpoint.config)
        model = _build(checkpoint, family)
        self._folder = folder
        self._experts = {stack.head: stack.experts for stack in checkpoint.stacks}
        self._stacks = [
            _Stack(model, family, stage, checkpoint, tokens, device)
            for stage, tokens in zip(family.stages, _tokens(family, batches), strict=True)
        ]
        self._places = [
            (part, number)
            for part, stack in enumerate(self._stacks)
            for number in range(len(stack.blocks))
        ]
        self.blocks = [self._stacks[part].described(number) for part, number in self._places]
        self.position = 0
        for number in range(getattr(model.config, "num_mtp_layers", None) or 0):
            block = self._stacks[-1].beyond(number)
            if block.head in self._experts:
                self.blocks.append(block)
        if heads := {block.head for block in self.blocks if block.head} ^ set(self._experts):
            raise QMoEError(
                "checkpoint",
                f"{checkpoint.folder}: by config.json or by the tensors, but not by both, there "
                f"are experts at {', '.join(sorted(heads))}; correct the numbers of layers and of "
                "sparse layers in config.json",
            )

    @torch.no_grad()
    def start(self, done: int = 0) -> None:
        """Stand before block ``done``, as after ``done`` calls of ``advance``.

        A walk in the same folder that went so far, or one block further, left what is needed.

        Raises:
            QMoEError: ``not-found`` if it is not there; ``argument``; ``io``.
        """
        if not 0 <= done <= len(self.blocks):
            raise QMoEError("argument", f"{done} of {len(self.blocks)} blocks cannot be done")
        if done == 0:
            sweep(self._folder)
            self._embed(0)
        for rows in self._needed(done):
            rows.check()
        self.position = done
        sweep(self._folder, self._needed(done))

    @torch.no_grad()
    def collect(self) -> Routed | None:
        """Run the current block up to its experts; None for a dense block.

        Raises:
            QMoEError: ``value`` for hidden states that are NaN or infinite; ``io``.
        """
        block = self.blocks[self.position]
        sweep(self._folder, self._needed(self.position))
        if block.head is None:
            return None
        if self.position >= len(self._places):
            return self._nothing(block.head)
        part, number = self._places[self.position]
        stack = self._stacks[part]
        files = self._routed(stack, stack.count)
        with ExitStack() as opened, stack.loaded(number):
            appends = [opened.enter_context(rows.writing()) for rows in files]
            for tokens, (inputs, *routing) in self._run(part, number):
                real = tokens.attended.view(-1)
                found = [rows[real] for rows in (inputs, *stack.family.routing(*routing))]
                _check_finite(found[0], block.name)
                for append, rows in zip(appends, found, strict=True):
                    append(rows)
        return Routed(*files, counted=stack.counted, number=self._experts[block.head])

    @torch.no_grad()
    def advance(self, outputs: Tensor | None) -> None:
        """Run the current block whole, and go to the next.

        Args:
            outputs: [tokens, d], for each token of ``collect`` the sum of its experts' outputs,
                each times its weight; None for a dense block.

        Raises:
            QMoEError: ``value`` for hidden states that are NaN or infinite; ``argument``; ``io``.
        """
        if self.position >= len(self._places):
            self.position += 1
            return
        part, number = self._places[self.position]
        stack = self._stacks[part]
        block = self.blocks[self.position]
        shape = None if outputs is None else tuple(outputs.shape)
        if shape != (None if block.head is None else (stack.count, stack.width)):
            raise QMoEError("argument", f"{shape} is no shape of {block.name}'s experts' outputs")
        crosses = number + 1 == len(stack.blocks) and part + 1 < len(self._stacks)
        following = self._encoded() if crosses else self._hidden(part, number + 1)
        with stack.loaded(number), following.writing() as append:
            for tokens, states in self._run(part, number, outputs):
                rows = states[tokens.attended]
                _check_finite(rows, block.name)
                append(stack.output(tokens, rows)[tokens.attended] if crosses else rows)
        if crosses:
            self._embed(part + 1)
        kept = self._needed(self.position)
        self.position += 1
        sweep(self._folder, [*kept, *self._needed(self.position)])

    def hidden(self) -> Tensor:
        """The hidden states before the current block, or after the last: float32 [tokens, d], a
        memory map to read."""
        return self._needed(self.position)[0].mapped()

    def finish(self) -> None:
        """Delete all files of hidden states."""
        sweep(self._folder)

    def _rows(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Rows:
        return Rows(self._folder / f"{name}{SUFFIX}", rows, columns, dtype)

    def _routed(self, stack: _Stack, count: int) -> tuple[Rows, Rows, Rows]:
        """The files of what experts are given."""
        return (
            self._rows("inputs", count, stack.width),
            self._rows("experts", count, stack.top_k, torch.int64),
            self._rows("weights", count, stack.top_k),
        )

    def _nothing(self, head: str) -> Routed:
        """What experts are given that no token goes to."""
        files = self._routed(self._stacks[-1], 0)
        for rows in files:
            with rows.writing():
                pass
        counted = torch.zeros(0, dtype=torch.bool)
        return Routed(*files, counted=counted, number=self._experts[head])

    def _hidden(self, part: int, number: int) -> Rows:
        """The hidden states before a block, or after a stack's last."""
        stack = self._stacks[part]
        return self._rows(f"hidden-{part}-{number:05}", stack.count, stack.width)

    def _encoded(self) -> Rows:
        """What the encoder gives to the decoder."""
        return self._rows("encoded", self._stacks[0].count, self._stacks[0].width)

    def _needed(self, done: int) -> list[Rows]:
        """What has to be on disk when so many blocks are done; the hidden states first."""
        if done < len(self._places):
            part, number = self._places[done]
        else:
            part, number = len(self._stacks) - 1, len(self._stacks[-1].blocks)
        return [self._hidden(part, number), *([self._encoded()] if part else [])]

    def _embed(self, part: int) -> None:
        """Write the hidden states before a stack's first block."""
        stack = self._stacks[part]
        with stack.embedding(), self._hidden(part, 0).writing() as append:
            for tokens in stack.tokens:
                rows = stack.forward(0, tokens)[tokens.attended]
                _check_finite(rows, stack.embedding_name)
                append(rows)

    def _run(
        self, part: int, number: int, outputs: Tensor | None = None
    ) -> Iterator[tuple[Tokens, Any]]:
        """Each batch's tokens and what a block, whose weights are loaded, makes of them."""
        stack = self._stacks[part]
        encoded: Iterable[Mapping[str, Tensor]] = repeat({})
        if part:
            encoder = self._stacks[0]
            encoded = (
                {
                    "encoder_hidden_states": _padded(rows, tokens.attended),
                    "encoder_attention_mask": tokens.attended.long(),
                }
                for tokens, rows in zip(
                    encoder.tokens, self._encoded().read(encoder.counts), strict=True
                )
            )
        answers = repeat(None) if outputs is None else iter(outputs.split_with_sizes(stack.counts))
        hidden = self._hidden(part, number).read(stack.counts)
        for tokens, rows, answer, more in zip(stack.tokens, hidden, answers, encoded, strict=False):
            yield tokens, stack.forward(number, tokens, rows, answer, more)


class _Reached(Exception):
    """Ends the forward of a stack, with what was wanted of it."""

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


class _Stack:
    """The encoder, the decoder or the only stack of a model, and the tokens it reads.

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

    def described(self, number: int) -> Block:
        name = f"{self.stage.stack}.{self.stage.blocks}.{number}"
        sparse = self._experts[number] is not None
        return Block(name, self._head(name) if sparse else None)

    def beyond(self, number: int) -> Block:
        """The block so many places after the last, if the checkpoint has it."""
        name = f"{self.stage.stack}.{self.stage.blocks}.{len(self.blocks) + number}"
        return Block(name, self._head(name))

    def _head(self, block: str) -> str:
        return self.family.on_disk(f"{block}.{self.stage.experts}")

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Have a block's weights in memory."""
        block = self.blocks[number]
        prefix = f"{self.stage.stack}.{self.stage.blocks}.{number}."
        weights = {name: self._read(prefix + name) for name in block.state_dict()}
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

        Without ``rows``: the hidden states before the block. After the last block: the stack's
        output.
        """
        states = None if rows is None else _padded(rows, tokens.attended)
        if number < len(self.blocks) and (experts := self._experts[number]):
            wanted = None if answer is None else _padded(answer, tokens.attended)
            experts.answer = None if wanted is None else wanted.flatten(0, 1)
        self._current, self._states = number, states
        inputs = {"input_ids": tokens.ids} if states is None else {"inputs_embeds": states}
        mask = tokens.attended.long()
        return self._thread.submit(
            self._call, **inputs, **(more or {}), attention_mask=mask
        ).result()

    @torch.no_grad()
    def _call(self, **inputs: Tensor) -> Any:
        try:
            return self._module(**inputs, use_cache=False, return_dict=True).last_hidden_state
        except _Reached as reached:
            return reached.value

    def output(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """What the stack returns after its last block: float32 [sequences, length, d]."""
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


def _build(checkpoint: Checkpoint, family: Family) -> Any:
    """The model without weights."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        for key, value in family.settings.items():
            setattr(config, key, value)
        kind = AutoModelForSeq2SeqLM if len(family.stages) > 1 else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a wrong config.json makes of transformers
        raise QMoEError(
            "checkpoint",
            f"{checkpoint.folder / 'config.json'}: transformers cannot build this model ({error}); "
            "fetch it again or update transformers",
        ) from error
    return model.eval()


def _tokens(family: Family, batches: Sequence[Batch]) -> list[list[Tokens]]:
    """What each of a model's stacks reads."""
    parts = [[batch.inputs for batch in batches]]
    if len(family.stages) > 1:
        parts.append([batch.targets for batch in batches if batch.targets])
    if not all(len(part) == len(batches) and any(t.attended.any() for t in part) for part in parts):
        raise QMoEError("argument", "batches without tokens, or without the decoder's tokens")
    return parts


def _padded(rows: Tensor, attended: Tensor) -> Tensor:
    """[tokens, d] to [sequences, length, d], with zeros where nothing is attended to."""
    states = torch.zeros(*attended.shape, rows.shape[-1], device=attended.device)
    states[attended] = rows.to(attended.device)
    return states


def _check_finite(rows: Tensor, where: str) -> None:
    if not torch.isfinite(rows).all():
        raise QMoEError(
            "value",
            f"{where}: hidden states are NaN or infinite; look for such weights in the checkpoint, "
            "or quantise with another recipe",
        )
