"""A Hugging Face model run block by block, with the weights of one block in memory.

The model is built without weights; ``model_part`` runs one block of it at a time. In between,
``Walk`` keeps the hidden states on disk, of the tokens that are not padding: the others get zeros,
which no token attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qmoe_format.calibration.activations import SUFFIX, RoutedTokens, RowFile, delete_row_files
from qmoe_format.calibration.model_part import ModelPart, padded
from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.checkpoints import Checkpoint, Family, family_for
from qmoe_format.checkpoints.wiring import check_experts, expert_modules
from qmoe_format.errors import QMoEError
from qmoe_format.machine import flushing_thread

T = TypeVar("T")


class Walk:
    """Takes batches of tokens through a model, in float32.

    ``start`` it, then for each block ``collect`` what its experts are given and ``advance`` with
    what they return.

    Attributes:
        blocks: in order of execution, an encoder's before the decoder's. Last come those that a
            checkpoint has for multi-token prediction, which transformers does not run: no token
            goes to their experts.
        position: how many of them are done.
    """

    def __init__(
        self, checkpoint: Checkpoint, batches: Sequence[Batch], folder: Path, device: str = "cpu"
    ) -> None:
        """
        Args:
            checkpoint: has to stay open.
            batches: what the model reads; those of an encoder-decoder have ``targets``.
            folder: for the hidden states, in files whose names end in ``.rows``.
            device: where the blocks run.

        Raises:
            QMoEError: ``checkpoint`` if the family is not known, or if a tensor is missing or has
                another shape than by ``config.json``; ``argument`` for batches without tokens or
                with tokens that the model does not have.
        """
        family = self._family = family_for(checkpoint.config)
        model = _build(checkpoint, family)
        _check_experts(checkpoint, family, model)
        self._folder = folder
        self._thread = flushing_thread()
        self._experts = {stack.prefix: stack.experts for stack in checkpoint.stacks}
        self._parts = [
            ModelPart(model, family, stage, checkpoint, tokens, device)
            for stage, tokens in zip(family.stages, _tokens(family, batches), strict=True)
        ]
        self.blocks = [block for part in self._parts for block in part.blocks]
        self.position = 0
        last = self._parts[-1]
        # The index of each block's part and its number there; then the end.
        self._places = [
            (i, n) for i, part in enumerate(self._parts) for n in range(len(part.blocks))
        ]
        self._places.append((len(self._parts) - 1, len(last.blocks)))
        for number in range(getattr(model.config, "num_mtp_layers", None) or 0):
            block = last.block(len(last.blocks) + number, family.experts)
            if block.prefix in self._experts:
                self.blocks.append(block)
        if differ := {b.prefix for b in self.blocks if b.prefix} ^ set(self._experts):
            raise QMoEError(
                "checkpoint",
                f"{checkpoint.folder}: config.json and the tensors disagree on whether there are "
                f"experts at {', '.join(sorted(differ))}",
                "correct the numbers of layers and of sparse layers in config.json",
            )
        fewest = min(self._experts.values())
        if not 1 <= last.top_k <= fewest:
            raise QMoEError(
                "checkpoint",
                f"{checkpoint.folder / 'config.json'}: {family.top_k!r} is {last.top_k}, of "
                f"{fewest} experts",
                "download it again",
            )

    def start(self, done: int = 0) -> None:
        """Begin before block ``done``, as after ``done`` calls of ``advance``.

        A walk in the same folder that came this far, or one block further, left what is needed.

        Raises:
            QMoEError: ``not-found`` if it is missing; ``argument``; ``io``.
        """
        if not 0 <= done <= len(self.blocks):
            raise QMoEError("argument", f"{done} of {len(self.blocks)} blocks cannot be done")
        if done == 0:
            delete_row_files(self._folder)
            self._embed(0)
        for file in self._needed(done):
            file.check()
        self.position = done
        delete_row_files(self._folder, self._needed(done))

    def collect(self) -> RoutedTokens | None:
        """Run the current block for what its experts are given; None for a dense block.

        Raises:
            QMoEError: ``value`` for hidden states that are NaN or infinite; ``io``.
        """
        block = self.blocks[self.position]
        delete_row_files(self._folder, self._needed(self.position))
        if block.prefix is None:
            return None
        index, number = self._place(self.position)
        part = self._parts[index]
        runs = number < len(part.blocks)
        count = part.count if runs else 0
        files = (
            self._file("inputs", count, part.width),
            self._file("experts", count, part.top_k, torch.int64),
            self._file("weights", count, part.top_k),
        )
        with ExitStack() as opened:
            appends = [opened.enter_context(file.writing()) for file in files]
            if runs:
                opened.enter_context(part.loaded(number))
            for tokens, ((inputs, *routing), _) in self._run(index, number) if runs else ():
                real = tokens.attended.view(-1)
                found = [rows[real] for rows in (inputs, *self._family.routing(*routing))]
                _check_finite(found[0], block.name)
                for append, rows in zip(appends, found, strict=True):
                    append(rows)
        return RoutedTokens(*files, part.counted[:count], self._experts[block.prefix])

    def advance(self, outputs: Tensor | None) -> None:
        """Run the current block and go to the next.

        Args:
            outputs: float32 [tokens, d], for each token of ``collect`` the sum of its experts'
                outputs, each times its weight; None for a dense block.

        Raises:
            QMoEError: ``value`` for hidden states that are NaN or infinite; ``argument``; ``io``.
        """
        block = self.blocks[self.position]
        index, number = self._place(self.position)
        part = self._parts[index]
        if number == len(part.blocks):
            self.position += 1
            return
        shape = None if outputs is None else tuple(outputs.shape)
        expected = None if block.prefix is None else (part.count, part.width)
        if shape != expected:
            raise QMoEError(
                "argument", f"{block.name}: the experts' outputs have shape {shape}, not {expected}"
            )
        crosses = number + 1 == len(part.blocks) and index + 1 < len(self._parts)
        following = self._encoded() if crosses else self._hidden(index, number + 1)
        with part.loaded(number), following.writing() as append:
            for tokens, (_, states) in self._run(index, number, outputs):
                rows = states[tokens.attended]
                _check_finite(rows, block.name)
                if crosses:
                    rows = self._compute(part.output, tokens, rows)[tokens.attended]
                append(rows)
        if crosses:
            self._embed(index + 1)
        kept = self._needed(self.position)
        self.position += 1
        delete_row_files(self._folder, [*kept, *self._needed(self.position)])

    def hidden(self) -> Tensor:
        """The hidden states before the current block, or after the last.

        Returns:
            float32 [tokens, d], a memory map to read.
        """
        return self._needed(self.position)[0].mapped()

    def _file(
        self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> RowFile:
        return RowFile(self._folder / f"{name}{SUFFIX}", rows, columns, dtype)

    def _hidden(self, index: int, number: int) -> RowFile:
        """The hidden states before a block, or after a part's last."""
        part = self._parts[index]
        return self._file(f"hidden-{index}-{number:05}", part.count, part.width)

    def _encoded(self) -> RowFile:
        """What the encoder gives to the decoder."""
        return self._file("encoded", self._parts[0].count, self._parts[0].width)

    def _place(self, position: int) -> tuple[int, int]:
        """The index of a block's part and its number there; the end for blocks that do not run."""
        return self._places[min(position, len(self._places) - 1)]

    def _needed(self, done: int) -> list[RowFile]:
        """What has to be on disk when ``done`` blocks are; the hidden states first."""
        index, number = self._place(done)
        return [self._hidden(index, number), *([self._encoded()] if index else [])]

    def _embed(self, index: int) -> None:
        """Write the hidden states before a part's first block."""
        part = self._parts[index]
        with part.embedding(), self._hidden(index, 0).writing() as append:
            for tokens in part.tokens:
                rows = self._compute(part.embed, tokens)[tokens.attended]
                _check_finite(rows, part.embedding_name)
                append(rows)

    def _run(
        self, index: int, number: int, outputs: Tensor | None = None
    ) -> Iterator[tuple[Tokens, tuple[tuple[Tensor, ...], Tensor]]]:
        """Each batch's tokens and what ``run_block`` returns for them."""
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
        returns = repeat(None) if outputs is None else iter(outputs.split_with_sizes(part.counts))
        hidden = self._hidden(index, number).read(part.counts)
        for tokens, *arguments in zip(part.tokens, hidden, returns, encoded, strict=False):
            yield tokens, self._compute(part.run_block, number, tokens, *arguments)

    def _compute(self, function: Callable[..., T], *arguments: Any) -> T:
        return self._thread.submit(torch.no_grad()(function), *arguments).result()


def _build(checkpoint: Checkpoint, family: Family) -> Any:
    """Transformers' model, without weights."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        for key, value in family.settings.items():
            setattr(config, key, value)
        kind = AutoModelForSeq2SeqLM if len(family.stages) > 1 else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.float32)
    except Exception as error:  # a wrong config.json can raise anything in transformers
        raise QMoEError(
            "checkpoint",
            f"{checkpoint.folder / 'config.json'}: transformers cannot build this model ({error})",
            "download it again or update transformers",
        ) from error
    return model.eval()


def _check_experts(checkpoint: Checkpoint, family: Family, model: Any) -> None:
    """Refuse experts that do not have the model's shapes."""
    shapes = {
        (stack.prefix, stack.matrix): (stack.name, (stack.experts, stack.rows, stack.columns))
        for stack in checkpoint.stacks
    }
    for path, _, inputs, output in expert_modules(model):
        prefix = family.in_checkpoint(path)
        for matrices, expected in ((family.inputs, inputs), ((family.output,), output)):
            found = dict(shapes[prefix, each] for each in matrices if (prefix, each) in shapes)
            check_experts(str(checkpoint.folder), found, expected)


def _tokens(family: Family, batches: Sequence[Batch]) -> list[list[Tokens]]:
    """What each part of a model reads."""
    parts = [[batch.inputs for batch in batches]]
    if len(family.stages) > 1:
        parts.append([batch.targets for batch in batches if batch.targets])
    if not all(len(part) == len(batches) and any(t.attended.any() for t in part) for part in parts):
        raise QMoEError("argument", "batches have no tokens, or none for the decoder")
    return parts


def _check_finite(rows: Tensor, where: str) -> None:
    if not torch.isfinite(rows).all():
        raise QMoEError(
            "value",
            f"{where}: hidden states are NaN or infinite",
            "look for such weights in the checkpoint, or quantize with another recipe",
        )
