"""A Hugging Face model run block by block, with the weights of one block in memory.

The model is built without weights; ``model_part`` runs one block of it at a time. In between,
``Walk`` keeps the hidden states on disk, of the tokens that are not padding: the others get zeros,
which no token attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qmoe_format.calibration.activations import SUFFIX, RoutedTokens, RowFile, delete_row_files
from qmoe_format.calibration.model_part import NO_CALIBRATION, Block, ModelPart, padded
from qmoe_format.calibration.ranks import ALONE, Ranks
from qmoe_format.calibration.sequences import Batch, Tokens
from qmoe_format.checkpoints import Checkpoint
from qmoe_format.checkpoints.families import family_for
from qmoe_format.checkpoints.registry import check_calibrated
from qmoe_format.errors import QMoEError
from qmoe_format.machine import flushing_thread

T = TypeVar("T")


class Walk:
    """Takes batches of tokens through a model, in float32.

    ``start`` it, then for each block ``collect`` what its experts are given and ``advance`` with
    what they return. Of several ranks that walk together, each runs some batches, ``own``; all of
    them call these three, which write what one rank would write.

    Attributes:
        blocks: in order of execution, an encoder's before the decoder's. Last come those that text
            does not reach, of multi-token prediction or a vision tower: no token goes to their
            experts.
        position: how many of them are done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        folder: Path,
        device: str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            checkpoint: has to stay open.
            batches: what the model reads; those of an encoder-decoder have ``targets``.
            folder: for the hidden states, in files whose names end in ``.rows``.
            device: where the blocks run.
            ranks: that walk together, with the same batches and folder.

        Raises:
            QMoEError: ``checkpoint`` if the model cannot be calibrated, or if a tensor is missing
                or has another shape than by ``config.json``; ``argument`` for batches without
                tokens or with tokens that the model does not have.
        """
        check_calibrated(checkpoint.model.config.model_type)
        for key, value in family_for(checkpoint.model.config).settings.items():
            _set_everywhere(checkpoint.model, key, value)
        self._checkpoint = checkpoint
        self._folder = folder
        self._ranks = ranks
        self._thread = flushing_thread()
        lists = _block_lists(checkpoint)
        self._parts = [
            ModelPart(checkpoint, blocks, tokens, device)
            for blocks, tokens in zip(lists, _tokens(len(lists), batches), strict=True)
        ]
        counts = zip(*(part.counts for part in self._parts), strict=True)
        self._batches = ranks.slice(list(map(sum, counts)))
        self.blocks = [block for part in self._parts for block in part.blocks]
        self.position = 0
        self._residual: RowFile | None = None
        # The index of each block's part and its number there; then the end.
        self._places = [
            (i, n) for i, part in enumerate(self._parts) for n in range(len(part.blocks))
        ]
        self._places.append((len(self._parts) - 1, len(self._parts[-1].blocks)))
        found = {block.experts.path for block in self.blocks if block.experts}
        for layer in checkpoint.layers:
            if layer.path in found:
                continue
            if layer.runs and any(part.holds(layer.path) for part in self._parts):
                raise QMoEError(
                    "checkpoint",
                    f"{checkpoint.where}: the experts {layer.path!r} are not in the list of "
                    "blocks, so the model cannot be calibrated",
                    NO_CALIBRATION,
                )
            self.blocks.append(Block(layer.path, replace(layer, runs=False)))

    def start(self, done: int = 0) -> None:
        """Begin before block ``done``, as after ``done`` calls of ``advance``.

        A walk in the same folder that came this far, or one block further, left what is needed.

        Raises:
            QMoEError: ``not-found`` if it is missing; ``argument``; ``io``.
        """
        if not 0 <= done <= len(self.blocks):
            raise QMoEError("argument", f"{done} of {len(self.blocks)} blocks cannot be done")
        if done == 0:
            self._delete()
            self._embed(0)
        for file in self._needed(done):
            file.check()
        self.position = done
        self._delete(*self._needed(done))

    def collect(self) -> RoutedTokens | None:
        """Run the current block for what its experts are given; None for a dense block.

        Most blocks add what the experts return to something that does not depend on it, their
        residual stream. That is kept, so that such a block runs once.

        Raises:
            QMoEError: ``value`` for hidden states that are NaN or infinite; ``io``.
        """
        block = self.blocks[self.position]
        self._residual = None
        self._delete(*self._needed(self.position))
        if block.experts is None:
            return None
        index, number = self._place(self.position)
        part = self._parts[index]
        runs = block.experts.runs
        count, width = part.count if runs else 0, block.experts.layer.width
        inputs = self._file("inputs", count, width)
        experts = self._file("experts", count, 1, torch.int64)
        weights = self._file("weights", count, 1)
        with ExitStack() as opened:
            if runs:
                opened.enter_context(part.loaded(number))
                if self._ranks.share(lambda: self._adds(index, number)):
                    self._residual = self._file("residual", count, part.width)
            found = self._given(index, number) if runs else iter(())
            first = next(found, None)
            # The first rows tell how many experts a token goes to; a rank may have none.
            k = max(self._ranks.gather(first[1].shape[1] if first else 1))
            experts, weights = replace(experts, columns=k), replace(weights, columns=k)
            files = [inputs, experts, weights, *([self._residual] if self._residual else [])]
            appends = [
                opened.enter_context(file.writing(self._ranks, self.own.start)) for file in files
            ]
            for given in chain([first] if first else [], found):
                for append, rows in zip(appends, given, strict=False):  # perhaps no residual
                    append(rows)
        return RoutedTokens(
            inputs, experts, weights, part.counted[:count], block.experts.output.experts
        )

    def _given(self, index: int, number: int) -> Iterator[list[Tensor]]:
        """What the experts of a block are given, without padding: of each batch, the rows of
        ``RoutedTokens.inputs``, ``experts`` and ``weights``, and of the residual stream."""
        block = self._parts[index].blocks[number]
        assert block.experts
        for tokens, (given, states) in self._run(index, number):
            found = [rows[tokens.attended.view(-1)] for rows in (*given, states.flatten(0, 1))]
            found[1] = found[1].where(found[1] < block.experts.output.experts, -1)
            _check_finite(found[0], block.name)
            yield found

    def _adds(self, index: int, number: int) -> bool:
        """Whether a block does nothing with what its experts return but add it."""
        part = self._parts[index]
        experts = part.blocks[number].experts
        if experts is None or experts.layer.width != part.width:
            return False
        tokens, (_, states) = next(self._run(index, number, batches=slice(0, 1)))
        rows = states[tokens.attended].cpu()
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        noise *= rows.square().mean().sqrt()
        _, (_, states) = next(self._run(index, number, noise, batches=slice(0, 1)))
        difference = (states[tokens.attended].cpu() - rows - noise).abs()
        return bool((difference <= 1e-5 * (rows.abs() + noise.abs())).all())

    def advance(self, outputs: Tensor | None) -> None:
        """Run the current block and go to the next.

        Args:
            outputs: float32 [tokens, d], for each of this rank's tokens the sum of its experts'
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
        own = part.rows(self._batches)
        count = own.stop - own.start
        expected = None if block.experts is None else (count, block.experts.layer.width)
        if shape != expected:
            raise QMoEError(
                "argument", f"{block.name}: the experts' outputs have shape {shape}, not {expected}"
            )
        crosses = number + 1 == len(part.blocks) and index + 1 < len(self._parts)
        following = self._encoded() if crosses else self._hidden(index, number + 1)
        with following.writing(self._ranks, own.start) as append:
            for tokens, rows in self._after(index, number, outputs):
                _check_finite(rows, block.name)
                if crosses:
                    rows = self._compute(part.output, tokens, rows)[tokens.attended]
                append(rows)
        if crosses:
            self._embed(index + 1)
        kept = self._needed(self.position)
        self.position += 1
        self._residual = None
        self._delete(*kept, *self._needed(self.position))

    def _after(
        self, index: int, number: int, outputs: Tensor | None
    ) -> Iterator[tuple[Tokens, Tensor]]:
        """Each batch and, without padding, the hidden states after a block."""
        part = self._parts[index]
        if outputs is not None and self._residual:
            counts, first = part.counts[self._batches], part.rows(self._batches).start
            sums = map(torch.add, self._residual.read(counts, first), torch.split(outputs, counts))
            yield from zip(part.tokens[self._batches], sums, strict=True)
            return
        with part.loaded(number):
            for tokens, (_, states) in self._run(index, number, outputs):
                yield tokens, states[tokens.attended]

    @property
    def counts(self) -> list[int]:
        """How many tokens of each batch the current block is given."""
        runs = self.blocks[self.position].experts
        index, _ = self._place(self.position)
        return self._parts[index].counts if runs is None or runs.runs else []

    @property
    def own(self) -> slice:
        """This rank's tokens among those."""
        index, _ = self._place(self.position)
        return self._parts[index].rows(self._batches) if self.counts else slice(0, 0)

    def hidden(self) -> Tensor:
        """The hidden states before the current block, or after the last.

        Returns:
            float32 [tokens, d], a memory map to read.
        """
        return self._needed(self.position)[0].mapped()

    def output(self, number: int) -> Tensor:
        """What the model's last stage returns for batch ``number``, after all blocks.

        Returns:
            float32 [tokens, d], without padding.
        """
        part = self._parts[-1]
        hidden = self._hidden(len(self._parts) - 1, len(part.blocks)).mapped()
        tokens = part.tokens[number]
        rows = hidden[part.rows(slice(number, number + 1))]
        returned: Tensor = self._compute(part.output, tokens, rows)
        return returned[tokens.attended]

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The function from what the last stage returns to logits, with its weights in memory.

        Factors and caps that some models apply to logits are left out. Without a head, what the
        stage returns stands for them.
        """
        model, last = self._checkpoint.model, self._parts[-1]
        module = model.get_output_embeddings()
        heads = [n for n, each in model.named_modules() if each is module and module is not None]
        # A model of several models may not tell which of their heads it uses.
        heads += [
            f"{n}.lm_head" for n in last.parents() if hasattr(model.get_submodule(n), "lm_head")
        ]
        if not heads:
            yield lambda rows: rows.cpu()
            return
        names = [f"{heads[0]}.{n}" for n, _ in model.get_submodule(heads[0]).named_parameters()]
        weights = [each.float() for each in self._checkpoint.parameters(names).values()]
        yield lambda rows: torch.nn.functional.linear(rows.cpu(), *weights)

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

    def _delete(self, *kept: RowFile) -> None:
        """Delete all other row files; all ranks are done with them."""
        if self._ranks.leads:
            delete_row_files(self._folder, kept)

    def _embed(self, index: int) -> None:
        """Write the hidden states before a part's first block."""
        part = self._parts[index]
        first = part.rows(self._batches).start
        with part.embedding(), self._hidden(index, 0).writing(self._ranks, first) as append:
            for tokens in part.tokens[self._batches]:
                rows = self._compute(part.embed, tokens)[tokens.attended]
                _check_finite(rows, part.embedding_name)
                append(rows)

    def _run(
        self,
        index: int,
        number: int,
        outputs: Tensor | None = None,
        batches: slice | None = None,
    ) -> Iterator[tuple[Tokens, tuple[tuple[Tensor, ...], Tensor]]]:
        """The tokens of some batches, this rank's own by default, and what ``run_block`` returns
        for them."""
        part, own = self._parts[index], batches or self._batches
        encoded: Iterable[Mapping[str, Tensor]] = repeat({})
        if index:
            encoder = self._parts[0]
            begin = encoder.rows(own).start
            encoded = (
                {
                    "encoder_hidden_states": padded(rows, tokens.attended),
                    "encoder_attention_mask": tokens.attended.long(),
                }
                for tokens, rows in zip(
                    encoder.tokens[own],
                    self._encoded().read(encoder.counts[own], begin),
                    strict=True,
                )
            )
        counts = part.counts[own]
        returns = repeat(None) if outputs is None else iter(outputs.split_with_sizes(counts))
        hidden = self._hidden(index, number).read(counts, part.rows(own).start)
        for tokens, *arguments in zip(part.tokens[own], hidden, returns, encoded, strict=False):
            yield tokens, self._compute(part.run_block, number, tokens, *arguments)

    def _compute(self, function: Callable[..., T], *arguments: Any) -> T:
        return self._thread.submit(torch.no_grad()(function), *arguments).result()


def _block_lists(checkpoint: Checkpoint) -> list[str]:
    """The names of the lists of blocks, in order of execution."""
    model = checkpoint.model
    if model.config.is_encoder_decoder:
        stages = {name: getattr(model, name) for name in ("encoder", "decoder")}
        return [
            f"{stage}.{name}"
            for stage, module in stages.items()
            for name, child in module.named_children()
            if isinstance(child, nn.ModuleList)
        ]
    found = dict.fromkeys(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(layer.runs and layer.path.startswith(f"{name}.") for layer in checkpoint.layers)
    )
    # The first are those of the language model, even if a model of images or sound has experts.
    return [name for name in found if not any(name.startswith(f"{each}.") for each in found)][:1]


def _set_everywhere(model: Any, key: str, value: Any) -> None:
    for module in model.modules():
        if hasattr(module, key):
            setattr(module, key, value)


def _tokens(parts: int, batches: Sequence[Batch]) -> list[list[Tokens]]:
    """What each part of a model reads."""
    found = [[batch.inputs for batch in batches]]
    if parts > 1:
        found.append([batch.targets for batch in batches if batch.targets])
    if not all(len(part) == len(batches) and any(t.attended.any() for t in part) for part in found):
        raise QMoEError("argument", "batches have no tokens, or none for the decoder")
    return found


def _check_finite(rows: Tensor, where: str) -> None:
    if not torch.isfinite(rows).all():
        raise QMoEError(
            "value",
            f"{where}: hidden states are NaN or infinite",
            "look for such weights in the checkpoint, or quantize with another recipe",
        )
