"""Two passes through a model's blocks: a survey of the original ones, then their quantization.

Each block is finished with a record in the work folder; a pass begins after the last record. All
ranks take the same steps, each with its batches and its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qmoe_format.calibration.activations import PairOutputs, RoutedTokens, RowFile
from qmoe_format.calibration.model_part import Block
from qmoe_format.calibration.ranks import ALONE, Ranks
from qmoe_format.calibration.sequences import Batch
from qmoe_format.calibration.walk import Walk
from qmoe_format.checkpoints import Checkpoint, LayerStacks
from qmoe_format.conversion.block_experts import BlockExperts, count_weights
from qmoe_format.conversion.options import ConvertOptions
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.quantize_block import BlockRecord, merged, quantize_block
from qmoe_format.conversion.rate_control import Attempt, RateControl
from qmoe_format.conversion.sensitivity import Probes
from qmoe_format.conversion.staging import Staging
from qmoe_format.conversion.survey import StackSurvey, survey_block, text_to_survey, with_prices
from qmoe_format.conversion.work import Work
from qmoe_format.machine import release_memory
from qmoe_format.progress import Counter, Progress
from qmoe_format.quantize.rate import Rate

_ROWS = 1 << 16  # of norms computed at a time


@dataclass(slots=True)
class _Step:
    """A block with experts; the pass fills in the last two attributes."""

    number: int
    name: str  # the stage that users see
    experts: LayerStacks
    is_last: bool  # nothing depends on its outputs
    routed: RoutedTokens
    counter: Counter
    begin: int  # of the counter
    record: Any = None  # JSON, for the work folder
    outputs: Tensor | None = None  # of its experts for this rank's tokens, float32 [tokens, d]


class BlockPasses:
    """The passes; see ``convert_calibrated`` for the arguments."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        options: ConvertOptions,
        resources: Resources,
        work: Work,
        progress: Progress | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.work = work
        self._ranks = ranks
        self._checkpoint = checkpoint
        self._options = options
        self._resources = resources
        self._progress = progress
        self._batches = batches
        self._prices: dict[str, float] = {}  # by stack, see ``survey.with_prices``

    def survey(self) -> dict[str, StackSurvey]:
        """Run the original model; measure each stack, the norms of hidden states, and what an error
        in each block does."""
        layers = [layer for layer in self._checkpoint.layers if layer.runs]
        most = max(layer.output.experts for layer in layers) if layers else 1
        part, share = text_to_survey(self._batches, most)
        probes = Probes(part, len(layers), sum(len(batch.inputs.ids) for batch in self._batches))
        walk = self._walk(probes.batches)
        for step in self._steps("survey", walk, walk.blocks):
            step.outputs = self._summed(step, walk, partial(self._original, step))
            parts = self._ranks.gather(_norms(walk.hidden()[walk.own], step.outputs))
            norms = torch.cat(parts)
            if step.experts.runs:
                block = layers.index(step.experts)
                probes.disturb(step.outputs, norms, walk.counts, block, walk.own.start)
            experts = self._experts(step, quantizes=False)
            found = survey_block(experts, norms, self._options, step.counter, self._ranks, share)
            self._ranks.share(partial(self._write_importance, step, experts))
            step.record = {name: asdict(survey) for name, survey in found.items()}
            release_memory()
        if not self.work.records("probe"):
            walk.start(len(walk.blocks))
            measured = zip(layers, probes.sensitivities(walk, self._ranks), strict=True)
            self.work.record("probe", 0, {layer.path: each for layer, each in measured})
        records = filter(None, self.work.records("survey"))
        found = {n: StackSurvey(**each) for record in records for n, each in record.items()}
        priced = with_prices(found, self._checkpoint.layers, self.work.records("probe")[0])
        # Those of rank 0, should another processor round differently.
        priced = self._ranks.share(lambda: priced)
        self._prices = {name: survey.price for name, survey in priced.items()}
        return priced

    def _original(self, step: _Step, outputs: Tensor | PairOutputs) -> None:
        """Add what a block's experts return, not quantized."""
        experts = self._experts(step, quantizes=False)
        for group in experts.groups():
            experts.add_outputs(experts.weights(group), group, outputs)

    def _write_importance(self, step: _Step, experts: BlockExperts) -> None:
        assert experts.importance is not None
        with self._importance(step, experts).writing() as append:
            append(experts.importance)

    def quantize(self, control: RateControl, staging: Staging) -> list[BlockRecord]:
        """Quantize each block for what the compressed blocks before it produce."""
        for record in filter(None, self.work.records("block")):
            control.finish(record)
        walk = self._walk(self._batches)
        # Nothing depends on the blocks after the last one with experts.
        last = max(number for number, block in enumerate(walk.blocks) if block.experts)
        for step in self._steps("block", walk, walk.blocks[: last + 1]):
            experts = self._experts(step)
            if self._options.methods.rated:
                experts.importance = self._importance(step, experts).mapped()
            attempt = partial(self._attempt, step, walk, experts, staging)
            step.record = self._controlled(control, attempt)
        return [record for record in self.work.records("block") if record]

    def _controlled(self, control: RateControl, attempt: Attempt) -> BlockRecord | None:
        """Quantize a block as rank 0 controls it; only rank 0 gets the record."""
        share = self._ranks.share
        if self._ranks.leads:
            record = control.quantize(lambda rate: attempt(share(lambda: (rate,))[0]))
            share(lambda: None)
            return record
        while asked := share(lambda: None):
            attempt(*asked)
        return None

    def _attempt(
        self,
        step: _Step,
        walk: Walk,
        experts: BlockExperts,
        staging: Staging,
        rate: Rate | None,
    ) -> BlockRecord:
        records: list[BlockRecord] = []

        def quantize(outputs: Tensor | PairOutputs | None) -> None:
            own = quantize_block(
                experts, self._options, rate, self._prices, staging, outputs, step.counter
            )
            records.extend(self._ranks.gather(own))

        step.counter.back_to(step.begin)
        step.counter.enter(step.name)
        if step.is_last:
            quantize(None)
        else:
            step.outputs = self._summed(step, walk, quantize)
        return merged(records)

    def _summed(
        self, step: _Step, walk: Walk, add: Callable[[Tensor | PairOutputs], None]
    ) -> Tensor:
        """Outputs for this rank's tokens, of all experts; ``add`` adds those of its own."""
        if self._ranks.count == 1:
            outputs = step.routed.outputs()
            add(outputs)
            return outputs
        with step.routed.pairs(self._ranks) as pairs:
            add(pairs)
        return step.routed.summed(self._ranks, walk.own)

    def _walk(self, batches: Sequence[Batch]) -> Walk:
        folder, device = self.work.folder, self._resources.device
        return Walk(self._checkpoint, batches, folder, device, self._ranks)

    def _steps(self, kind: str, walk: Walk, blocks: Sequence[Block]) -> Iterator[_Step]:
        """Walk through the blocks that have no record of this kind, and write these records."""
        done = len(self.work.records(kind))
        left = [block.experts for block in blocks[done:] if block.experts]
        weights = count_weights(stack for layer in left for stack in layer.stacks)
        counter = Counter(self._progress, weights)
        if done < len(blocks):
            walk.start(done)
        for number, block in enumerate(blocks[done:], done):
            name = block.name if kind == "block" else f"{kind} {block.name}"
            is_last = kind == "block" and number + 1 == len(blocks)
            record, outputs = None, None
            counter.enter(name)
            if routed := walk.collect():
                assert block.experts
                begin = counter.done
                step = _Step(number, name, block.experts, is_last, routed, counter, begin)
                yield step
                record, outputs = step.record, step.outputs
                counter.back_to(begin + count_weights(block.experts.stacks))
            if not is_last:
                walk.advance(outputs)
            self.work.record(kind, number, record)

    def _experts(self, step: _Step, *, quantizes: bool = True) -> BlockExperts:
        calibration = self._options.calibration
        assert calibration
        return BlockExperts(
            self._checkpoint,
            step.experts,
            step.routed,
            self._resources,
            token_cap=calibration.token_cap,
            all_experts=calibration.all_experts,
            ranks=self._ranks,
            quantizes=quantizes,
        )

    def _importance(self, step: _Step, experts: BlockExperts) -> RowFile:
        """Of the rows of a block's experts, see ``BlockExperts``."""
        path = self.work.path(f"block-{step.number:04}.importance")
        return RowFile(path, experts.count, experts.importance_columns)


def _norms(hidden: Tensor, outputs: Tensor) -> Tensor:
    """Norms of residual + expert output ``[tokens, 1]``, assuming that the two are orthogonal."""
    norms = torch.empty(len(outputs), 1)
    for first in range(0, len(outputs), _ROWS):
        part = slice(first, first + _ROWS)
        squares = [each[part].square().sum(1, keepdim=True) for each in (hidden, outputs)]
        norms[part] = (squares[0] + squares[1]).sqrt()
    return norms
