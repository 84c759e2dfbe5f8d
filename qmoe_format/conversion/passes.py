"""Two passes through a model's blocks: a survey of the original ones, then their quantization.

Each block is finished with a record in the work folder; a pass begins after the last record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from qmoe_format.calibration.activations import RoutedTokens, RowFile
from qmoe_format.calibration.sequences import Batch
from qmoe_format.calibration.walk import Walk
from qmoe_format.checkpoints import Checkpoint, LayerStacks
from qmoe_format.conversion.block_experts import BlockExperts, count_weights
from qmoe_format.conversion.options import ConvertOptions
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.quantize_block import BlockRecord, quantize_block
from qmoe_format.conversion.rate_control import RateControl
from qmoe_format.conversion.staging import Staging
from qmoe_format.conversion.survey import StackSurvey, survey_block
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
    outputs: Tensor | None = None  # of its experts, float32 [tokens, d]


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
    ) -> None:
        self.work = work
        self._checkpoint = checkpoint
        self._options = options
        self._resources = resources
        self._progress = progress
        self._walk = Walk(checkpoint, batches, work.folder, resources.device)
        # Nothing depends on the blocks after the last one with experts.
        last = max(number for number, block in enumerate(self._walk.blocks) if block.experts)
        self._blocks = self._walk.blocks[: last + 1]

    def survey(self) -> dict[str, StackSurvey]:
        """Run the original model; measure each stack and the norms of hidden states."""
        for step in self._steps("survey"):
            experts = self._experts(step)
            step.outputs = step.routed.outputs()
            for group in experts.groups():
                experts.add_outputs(experts.weights(group), group, step.outputs)
            norms = self._norms(step)
            _write_norms(norms, self._walk.hidden(), step.outputs)
            found = survey_block(self._experts(step, norms), self._options, step.counter)
            step.record = {name: asdict(survey) for name, survey in found.items()}
            release_memory()
        records = filter(None, self.work.records("survey"))
        return {name: StackSurvey(**each) for record in records for name, each in record.items()}

    def quantize(self, control: RateControl, staging: Staging) -> list[BlockRecord]:
        """Quantize each block for what the compressed blocks before it produce."""
        for record in filter(None, self.work.records("block")):
            control.finish(record)
        for step in self._steps("block"):
            norms = self._norms(step) if self._options.methods.rated else None
            attempt = partial(self._attempt, step, self._experts(step, norms), staging)
            step.record = control.quantize(attempt)
        return [record for record in self.work.records("block") if record]

    def _attempt(
        self, step: _Step, experts: BlockExperts, staging: Staging, rate: Rate | None
    ) -> BlockRecord:
        step.counter.back_to(step.begin)
        step.counter.enter(step.name)
        step.outputs = None if step.is_last else step.routed.outputs()
        return quantize_block(experts, self._options, rate, staging, step.outputs, step.counter)

    def _steps(self, kind: str) -> Iterator[_Step]:
        """Walk through the blocks that have no record of this kind, and write these records."""
        done = len(self.work.records(kind))
        left = [block.experts for block in self._blocks[done:] if block.experts]
        weights = count_weights(stack for layer in left for stack in layer.stacks)
        counter = Counter(self._progress, weights)
        if done < len(self._blocks):
            self._walk.start(done)
        for number, block in enumerate(self._blocks[done:], done):
            name = block.name if kind == "block" else f"{kind} {block.name}"
            is_last, record, outputs = number + 1 == len(self._blocks), None, None
            counter.enter(name)
            if routed := self._walk.collect():
                assert block.experts
                begin = counter.done
                step = _Step(number, name, block.experts, is_last, routed, counter, begin)
                yield step
                record, outputs = step.record, step.outputs
            if not is_last:
                self._walk.advance(outputs)
            self.work.record(kind, number, record)

    def _experts(self, step: _Step, norms: RowFile | None = None) -> BlockExperts:
        calibration = self._options.calibration
        assert calibration
        return BlockExperts(
            self._checkpoint,
            step.experts,
            step.routed,
            self._resources,
            token_cap=calibration.token_cap,
            all_experts=calibration.all_experts,
            norms=norms.mapped() if norms else None,
        )

    def _norms(self, step: _Step) -> RowFile:
        """Of the hidden states after a block of the original model."""
        return RowFile(self.work.path(f"block-{step.number:04}.norms"), len(step.routed.inputs), 1)


def _write_norms(norms: RowFile, hidden: Tensor, outputs: Tensor) -> None:
    """Norms of residual + expert output, assuming that the two are orthogonal."""
    with norms.writing() as append:
        for first in range(0, len(outputs), _ROWS):
            parts = [each[first : first + _ROWS] for each in (hidden, outputs)]
            squares = [part.square().sum(1, keepdim=True) for part in parts]
            append((squares[0] + squares[1]).sqrt())
