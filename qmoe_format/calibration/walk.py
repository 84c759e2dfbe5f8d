"""A Hugging Face model run block by block, with the weights of one block in memory.

The model is built without weights. For each block its own forward runs again, and ``model_part``
makes it skip the blocks before and stop after that one. In between, ``Walk`` keeps the hidden
states on disk, of the tokens that are not padding: the others get zeros, which no token attends to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qmoe_format.calibration.activations import SUFFIX, Routed, Rows, sweep
from qmoe_format.calibration.model_part import ModelPart, padded
from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.checkpoints import Checkpoint
from qmoe_format.checkpoints.wiring import Family, check_experts, expert_modules, family_for
from qmoe_format.errors import QMoEError


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
        _check_experts(checkpoint, family, model)
        self._folder = folder
        self._experts = {stack.head: stack.experts for stack in checkpoint.stacks}
        self._parts = [
            ModelPart(model, family, stage, checkpoint, tokens, device)
            for stage, tokens in zip(family.stages, _tokens(family, batches), strict=True)
        ]
        self._places = [
            (index, number)
            for index, part in enumerate(self._parts)
            for number in range(len(part.blocks))
        ]
        self.blocks = [_block(self._parts[index], number) for index, number in self._places]
        self.position = 0
        end = len(self._parts[-1].blocks)
        for number in range(end, end + (getattr(model.config, "num_mtp_layers", None) or 0)):
            block = _block(self._parts[-1], number)
            if block.head in self._experts:
                self.blocks.append(block)
        if heads := {block.head for block in self.blocks if block.head} ^ set(self._experts):
            raise QMoEError(
                "checkpoint",
                f"{checkpoint.folder}: by config.json or by the tensors, but not by both, there "
                f"are experts at {', '.join(sorted(heads))}; correct the numbers of layers and of "
                "sparse layers in config.json",
            )
        fewest = min(self._experts.values())
        if not 1 <= self._parts[-1].top_k <= fewest:
            raise QMoEError(
                "checkpoint",
                f"{checkpoint.folder / 'config.json'}: {family.top_k!r} is "
                f"{self._parts[-1].top_k}, of {fewest} experts; fetch it again",
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
        index, number = self._places[self.position]
        part = self._parts[index]
        files = self._routed(part, part.count)
        with ExitStack() as opened, part.loaded(number):
            appends = [opened.enter_context(rows.writing()) for rows in files]
            for tokens, (inputs, *routing) in self._run(index, number):
                real = tokens.attended.view(-1)
                found = [rows[real] for rows in (inputs, *part.family.routing(*routing))]
                _check_finite(found[0], block.name)
                for append, rows in zip(appends, found, strict=True):
                    append(rows)
        return Routed(*files, counted=part.counted, number=self._experts[block.head])

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
        index, number = self._places[self.position]
        part = self._parts[index]
        block = self.blocks[self.position]
        shape = None if outputs is None else tuple(outputs.shape)
        if shape != (None if block.head is None else (part.count, part.width)):
            raise QMoEError("argument", f"{shape} is no shape of {block.name}'s experts' outputs")
        crosses = number + 1 == len(part.blocks) and index + 1 < len(self._parts)
        following = self._encoded() if crosses else self._hidden(index, number + 1)
        with part.loaded(number), following.writing() as append:
            for tokens, states in self._run(index, number, outputs):
                rows = states[tokens.attended]
                _check_finite(rows, block.name)
                append(part.output(tokens, rows)[tokens.attended] if crosses else rows)
        if crosses:
            self._embed(index + 1)
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

    def _routed(self, part: ModelPart, count: int) -> tuple[Rows, Rows, Rows]:
        """The files of what experts are given."""
        return (
            self._rows("inputs", count, part.width),
            self._rows("experts", count, part.top_k, torch.int64),
            self._rows("weights", count, part.top_k),
        )

    def _nothing(self, head: str) -> Routed:
        """What experts are given that no token goes to."""
        files = self._routed(self._parts[-1], 0)
        for rows in files:
            with rows.writing():
                pass
        counted = torch.zeros(0, dtype=torch.bool)
        return Routed(*files, counted=counted, number=self._experts[head])

    def _hidden(self, index: int, number: int) -> Rows:
        """The hidden states before a block, or after a part's last."""
        part = self._parts[index]
        return self._rows(f"hidden-{index}-{number:05}", part.count, part.width)

    def _encoded(self) -> Rows:
        """What the encoder gives to the decoder."""
        return self._rows("encoded", self._parts[0].count, self._parts[0].width)

    def _needed(self, done: int) -> list[Rows]:
        """What has to be on disk when so many blocks are done; the hidden states first."""
        if done < len(self._places):
            index, number = self._places[done]
        else:
            index, number = len(self._parts) - 1, len(self._parts[-1].blocks)
        return [self._hidden(index, number), *([self._encoded()] if index else [])]

    def _embed(self, index: int) -> None:
        """Write the hidden states before a part's first block."""
        part = self._parts[index]
        with part.embedding(), self._hidden(index, 0).writing() as append:
            for tokens in part.tokens:
                rows = part.forward(0, tokens)[tokens.attended]
                _check_finite(rows, part.embedding_name)
                append(rows)

    def _run(
        self, index: int, number: int, outputs: Tensor | None = None
    ) -> Iterator[tuple[Tokens, Any]]:
        """Each batch's tokens and what a block, whose weights are loaded, makes of them."""
        part = self._parts[index]
        encoded: Iterable[Mapping[str, Tensor]] = repeat({})
        if index:
            encoder = self._parts[0]
            encoded = (
                {
                    "encoder_hidden_states": padded(rows, tokens.attended),
                    "encoder_attention_mask": tokens.attended.long(),
                }
                for tokens, rows in zip(
                    encoder.tokens, self._encoded().read(encoder.counts), strict=True
                )
            )
        answers = repeat(None) if outputs is None else iter(outputs.split_with_sizes(part.counts))
        hidden = self._hidden(index, number).read(part.counts)
        for tokens, rows, answer, more in zip(part.tokens, hidden, answers, encoded, strict=False):
            yield tokens, part.forward(number, tokens, rows, answer, more)


def _block(part: ModelPart, number: int) -> Block:
    return Block(part.name(number), part.head(number))


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


def _check_experts(checkpoint: Checkpoint, family: Family, model: Any) -> None:
    """That those of the checkpoint are of the model's shapes."""
    shapes = {
        (stack.head, stack.matrix): (stack.name, (stack.experts, stack.rows, stack.columns))
        for stack in checkpoint.stacks
    }
    for path, _, inputs, output in expert_modules(model):
        head = family.on_disk(path)
        for matrices, expected in ((family.inputs, inputs), ((family.output,), output)):
            found = dict(shapes[head, each] for each in matrices if (head, each) in shapes)
            check_experts(str(checkpoint.folder), found, expected)


def _tokens(family: Family, batches: Sequence[Batch]) -> list[list[Tokens]]:
    """What each part of a model reads."""
    parts = [[batch.inputs for batch in batches]]
    if len(family.stages) > 1:
        parts.append([batch.targets for batch in batches if batch.targets])
    if not all(len(part) == len(batches) and any(t.attended.any() for t in part) for part in parts):
        raise QMoEError("argument", "batches without tokens, or without the decoder's tokens")
    return parts


def _check_finite(rows: Tensor, where: str) -> None:
    if not torch.isfinite(rows).all():
        raise QMoEError(
            "value",
            f"{where}: hidden states are NaN or infinite; look for such weights in the checkpoint, "
            "or quantise with another recipe",
        )
