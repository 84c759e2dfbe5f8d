"""One stage of a Hugging Face model, encoder or decoder, of which one block at a time is run.

First the stage's own forward runs with blocks that pass the hidden states through, so that masks,
rotary embeddings and position biases are the model's own. Then the wanted block runs with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_format.calibration.sequences import Tokens
from qmoe_format.checkpoints import Checkpoint, LayerStacks
from qmoe_format.checkpoints.families import family_for
from qmoe_format.checkpoints.family import Family
from qmoe_format.checkpoints.model import fill_buffers
from qmoe_format.errors import QMoEError
from qmoe_format.machine import out_of_memory

NO_CALIBRATION = "convert the model without calibration text"


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the model.

    Attributes:
        name: in transformers' model, such as ``encoder.block.1``.
        experts: those in it; None for a dense block.
    """

    name: str
    experts: LayerStacks | None


class ModelPart:
    """The encoder, the decoder or the only stage of a model, and the tokens it reads.

    Attributes:
        tokens: of each batch, on the device.
        counts: how many of each batch's tokens are not padding; ``count`` in all.
        counted: bool [count], of those that are not padding.
        width: of the hidden states between blocks, all elements of a token.
        blocks: in order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: str,
        tokens: Sequence[Tokens],
        device: str,
    ) -> None:
        """Take the stage with the list of ``blocks`` of this name out of the checkpoint's model.

        Raises:
            QMoEError: ``checkpoint`` if a tensor is missing or of another shape, or the blocks need
                more than hidden states; ``argument`` for tokens that the model does not have.
        """
        self.counts = [int(batch.attended.sum()) for batch in tokens]
        self.count = sum(self.counts)
        self.counted = torch.cat([batch.counted[batch.attended] for batch in tokens])
        self.tokens = [
            Tokens(batch.ids.to(device), batch.attended.to(device), batch.counted)
            for batch in tokens
        ]
        self._checkpoint = checkpoint
        self._device = device
        self._model = checkpoint.model
        self._name = blocks.rpartition(".")[0]
        self._module = self._model.get_submodule(self._name)
        self._family = family_for(self._module.config)
        self._blocks: list[Any] = list(self._model.get_submodule(blocks))
        layers = {layer.path: layer for layer in checkpoint.layers}
        self._experts: list[list[LayerStacks]] = []  # none or one of each block
        self.blocks: list[Block] = []
        for number, block in enumerate(self._blocks):
            name = f"{blocks}.{number}"
            paths = [f"{name}.{path}" for path, _ in block.named_modules()]
            own = [layers[path] for path in paths if path in layers]
            for each in own:
                self._model.set_submodule(each.path, nn.Identity())
            self._experts.append(own)
            self.blocks.append(Block(name, own[0] if own else None))
            if len(own) > 1:
                raise QMoEError(
                    "checkpoint",
                    f"{name}: has more than one set of experts, so it cannot be calibrated",
                    NO_CALIBRATION,
                )
        self._embedding = self._module.get_input_embeddings()
        self.embedding_name = next(
            name
            for name, each in self._model.named_parameters(remove_duplicate=False)
            if name.startswith(f"{self._name}.") and each is self._embedding.weight
        )
        fill_buffers(self._model, self._module, device)
        self._set_embedding(0)
        self._check_tokens()
        kept = [
            name
            for name in self._model.state_dict()
            if name.startswith(f"{self._name}.")
            and name != self.embedding_name
            and (not name.startswith(f"{blocks}.") or name.endswith(self._family.kept or "/"))
        ]
        self._kept = self._read(kept)
        self._restore_kept()
        self._shape: torch.Size = self._calls(None)[0].args[0].shape[2:]
        self.width = self._shape.numel()
        self._check_blocks()

    def rows(self, batches: slice) -> slice:
        """The tokens of some batches among all that are not padding."""
        first = sum(self.counts[: batches.start])
        return slice(first, first + sum(self.counts[batches]))

    def holds(self, path: str) -> bool:
        """Whether a module is part of this stage."""
        return path.startswith(f"{self._name}.")

    def parents(self) -> list[str]:
        """The names of the modules that this stage is in, the nearest first."""
        parts = self._name.split(".")
        return [".".join(parts[:number]) for number in range(len(parts) - 1, 0, -1)]

    @torch.no_grad()
    def _calls(self, states: Tensor | None) -> list[partial[Any]]:
        """Of the blocks, with tokens of the first batch."""
        with _run_by_itself(self._name):
            return self._pass_through(self.tokens[0], states, {})[0]

    def _check_blocks(self) -> None:
        """Refuse blocks that are given what other blocks have computed, beside hidden states."""
        found = []
        for value in (1.0, 0.0):
            self._set_embedding(value)
            shape = (*self.tokens[0].ids.shape, self.width)
            found.append(self._calls(torch.full(shape, value, device=self._device)))
        for block, *calls in zip(self.blocks, *found, strict=True):
            first, second = ([*each.args[1:], *each.keywords.values()] for each in calls)
            for one, other in zip(_tensors(first), _tensors(second), strict=True):
                if not one.equal(other):
                    raise self._hands_on(block)

    def _hands_on(self, block: Block) -> QMoEError:
        return QMoEError(
            "checkpoint",
            f"{block.name}: blocks hand more than hidden states to other blocks, so the model "
            "cannot be calibrated",
            NO_CALIBRATION,
        )

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Have a block's weights in memory."""
        block, name = self._blocks[number], self.blocks[number].name
        names = list(block.state_dict())
        weights = self._read([f"{name}.{each}" for each in names])
        block.load_state_dict(
            {n.removeprefix(f"{name}."): w for n, w in weights.items()}, assign=True
        )
        del weights
        try:
            yield
        finally:
            _to_meta(block, names)
            self._restore_kept()

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Have the token embedding in memory."""
        (weight,) = self._read([self.embedding_name]).values()
        self._embedding.weight = nn.Parameter(weight, False)
        try:
            yield
        finally:
            self._set_embedding(0)

    def _set_embedding(self, value: float) -> None:
        """Let it return one value: when hidden states are given, only their shape matters."""
        one = torch.tensor(float(value), device=self._device)
        self._embedding.weight = nn.Parameter(one.expand(self._embedding.weight.shape), False)

    def embed(self, tokens: Tokens) -> Tensor:
        """The hidden states before the first block, whose ``embedding`` is in memory.

        Returns:
            float32 [sequences, length, width].
        """
        calls, _ = self._pass_through(tokens, None, {})
        hidden: Tensor = calls[0].args[0]
        return hidden.flatten(2)

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
            rows: float32 [tokens, width], the hidden states before the block, without padding.
            outputs: float32 [tokens, d], what the experts return; None: zeros.
            further: arguments of the stage's forward.

        Returns:
            What ``ExpertLayer.routing`` returns for the experts' arguments, () for a dense block;
            and the hidden states after the block: float32 [sequences, length, width].
        """
        given: tuple[Tensor, ...] = ()
        own = self._experts[number]

        def experts(_: nn.Module, *arguments: Tensor, **named: Tensor) -> Tensor:
            nonlocal given
            arguments = (*arguments, *named.values())
            given = own[0].layer.routing(*arguments)
            if len(given[0]) != tokens.ids.numel():
                raise QMoEError(
                    "checkpoint",
                    f"{own[0].path}: its experts are given {len(given[0])} rows for "
                    f"{tokens.ids.numel()} tokens, so they cannot be calibrated",
                    NO_CALIBRATION,
                )
            sums = torch.zeros_like(given[0])
            if outputs is not None:
                sums = padded(outputs, tokens.attended).flatten(0, 1)
            return own[0].layer.returned(sums, *arguments)

        states = padded(rows, tokens.attended)
        call = self._pass_through(tokens, states, further)[0][number]
        modules = [self._model.get_submodule(each.path) for each in own]
        mappings = [each for each in call.keywords.values() if isinstance(each, Mapping)]
        before = [set(each) for each in mappings]
        with _forward(modules, experts), _run_by_itself(self.blocks[number].name):
            result = call()
        if [set(each) for each in mappings] != before:
            raise self._hands_on(self.blocks[number])
        if isinstance(result, tuple):
            if len(result) > 1 and self._family.pass_through is Family.pass_through:
                raise self._hands_on(self.blocks[number])
            result = result[0]
        hidden: Tensor = result
        return given, hidden.flatten(2)

    def output(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """What the stage returns after its last block: float32 [sequences, length, d]."""
        return self._pass_through(tokens, padded(rows, tokens.attended), {})[1]

    def _pass_through(
        self, tokens: Tokens, states: Tensor | None, further: Mapping[str, Tensor]
    ) -> tuple[list[partial[Any]], Tensor]:
        """Run the stage without its blocks.

        Args:
            states: the hidden states that every block is given; None: those of the embedding.

        Returns:
            A call of each block, with the hidden states as the first argument; the stage's output.
        """
        calls = []
        if states is not None:
            states = states.view(*states.shape[:2], *self._shape)

        def forward(block: Any, *arguments: Any, **options: Any) -> Any:
            hidden, *others = arguments or (options.pop("hidden_states"),)
            if states is not None:  # the stage changes what the embedding returns
                hidden = states
            calls.append(partial(block, hidden, *others, **options))
            return self._family.pass_through(block, hidden, *others, **options)

        with _forward(self._blocks, forward):
            output = self._module(
                input_ids=tokens.ids,
                **further,
                attention_mask=tokens.attended.long(),
                use_cache=False,
                return_dict=True,
            )
        return calls, output.last_hidden_state

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by the model's names: float32, on the device, copies."""
        return {
            name: tensor.to(
                self._device, torch.float32 if tensor.is_floating_point() else None, copy=True
            )
            for name, tensor in self._checkpoint.parameters(names).items()
        }

    def _restore_kept(self) -> None:
        for name, tensor in self._kept.items():
            owner, _, own = name.rpartition(".")
            module = self._model.get_submodule(owner)
            setattr(module, own, tensor if own in module._buffers else nn.Parameter(tensor, False))

    def _check_tokens(self) -> None:
        """Refuse tokens that the model does not have."""
        highest = max(int(batch.ids.max()) for batch in self.tokens)
        vocabulary = self._embedding.weight.shape[0]
        if highest >= vocabulary:
            raise QMoEError(
                "argument",
                f"token {highest} is not one of the model's {vocabulary}",
                "use the tokenizer that belongs to the model",
            )


def _tensors(value: Any) -> list[Tensor]:
    """Those in lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for each in value for tensor in _tensors(each)]


def _to_meta(module: nn.Module, names: Iterable[str]) -> None:
    """Drop parameters and buffers; tables that no checkpoint has stay."""
    for name in names:
        owner, _, own = name.rpartition(".")
        part = module.get_submodule(owner)
        if own in part._buffers:
            part._buffers[own] = getattr(part, own).to("meta")
        else:
            setattr(part, own, nn.Parameter(getattr(part, own).to("meta"), False))


@contextmanager
def _run_by_itself(where: str) -> Iterator[None]:
    """Say so if transformers cannot run a stage without its blocks, or a block of it."""
    try:
        yield
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, QMoEError) or out_of_memory(error):
            raise
        raise QMoEError(
            "checkpoint",
            f"{where}: transformers cannot run it by itself ({error})",
            f"correct config.json, or {NO_CALIBRATION}",
        ) from error


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
