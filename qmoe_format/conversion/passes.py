"""Two passes through a model's blocks: a survey of the original ones, then their quantization.

Each block is finished with a record in the work folder; a pass begins after the last record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from qmoe_format.calibration.activations import RoutedTokens, RowFile
from qmoe_format.calibration.model_part import Block
from qmoe_format.calibration.sequences import Batch
from qmoe_format.calibration.walk import Walk
from qmoe_format.checkpoints import Checkpoint
from qmoe_format.checkpoints.wiring import wiring
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
Record = TypeVar("Record")
Visit: TypeAlias = Callable[[int, Block, RoutedTokens, Counter], tuple[Record, Tensor | None]]
"""Gives a block's record and the outputs of its experts, which are not needed of the last."""


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
        self._wiring = wiring(checkpoint.config)
        self._walk = Walk(checkpoint, batches, work.folder, resources.device)
        # Nothing depends on the blocks after the last one with experts.
        last = max(number for number, block in enumerate(self._walk.blocks) if block.prefix)
        self._blocks = self._walk.blocks[: last + 1]

    def survey(self) -> dict[str, StackSurvey]:
        """Run the original model; measure each stack and the norms of hidden states."""

        def visit(
            number: int, block: Block, routed: RoutedTokens, counter: Counter
        ) -> tuple[dict[str, Any], Tensor]:
            experts = self._experts(block, routed)
            outputs = routed.outputs()
            for group in experts.groups():
                experts.add_outputs(experts.weights(group), group, outputs)
            norms = self._norms(number, routed)
            _write_norms(norms, self._walk.hidden(), outputs)
            surveys = survey_block(self._experts(block, routed, norms), self._options, counter)
            release_memory()
            return {name: asdict(survey) for name, survey in surveys.items()}, outputs

        records = self._each_block("survey", visit)
        return {name: StackSurvey(**each) for record in records for name, each in record.items()}

    def quantize(self, control: RateControl, staging: Staging) -> list[BlockRecord]:
        """Run the model that compressed blocks make, and quantize each block."""
        for record in filter(None, self.work.records("block")):
            control.finish(record)

        def visit(
            number: int, block: Block, routed: RoutedTokens, counter: Counter
        ) -> tuple[BlockRecord, Tensor | None]:
            norms = self._norms(number, routed) if self._options.chosen_recipe.rated else None
            experts = self._experts(block, routed, norms)
            before, stage = counter.done, counter.stage
            outputs: Tensor | None = None

            def attempt(rate: Rate | None) -> BlockRecord:
                nonlocal outputs
                counter.back_to(before)
                counter.enter(stage)
                outputs = None if block is self._blocks[-1] else routed.outputs()
                return quantize_block(experts, self._options, rate, staging, outputs, counter)

            return control.quantize(attempt), outputs

        return self._each_block("block", visit)

    def _each_block(self, kind: str, visit: Visit[Record]) -> list[Record]:
        """Visit the blocks that have no record of this kind.

        Returns:
            The records of all blocks with experts.
        """
        records: list[Record | None] = self.work.records(kind)
        done = len(records)
        prefixes = {block.prefix for block in self._blocks[done:]}
        stacks = [stack for stack in self._checkpoint.stacks if stack.prefix in prefixes]
        counter = Counter(self._progress, count_weights(stacks))
        if done < len(self._blocks):
            self._walk.start(done)
        for number, block in enumerate(self._blocks[done:], done):
            counter.enter(block.name if kind == "block" else f"{kind} {block.name}")
            record, outputs = None, None
            if routed := self._walk.collect():
                record, outputs = visit(number, block, routed, counter)
            if block is not self._blocks[-1]:
                self._walk.advance(outputs)
            self.work.record(kind, number, record)
            records.append(record)
        return [record for record in records if record is not None]

    def _experts(
        self, block: Block, routed: RoutedTokens, norms: RowFile | None = None
    ) -> BlockExperts:
        assert self._options.calibration
        return BlockExperts(
            self._checkpoint,
            str(block.prefix),
            self._wiring,
            routed,
            self._resources,
            token_cap=self._options.calibration.token_cap,
            norms=norms.mapped() if norms else None,
        )

    def _norms(self, number: int, routed: RoutedTokens) -> RowFile:
        """Of the hidden states after a block of the original model."""
        return RowFile(self.work.path(f"block-{number:04}.norms"), len(routed.inputs), 1)


def _write_norms(norms: RowFile, hidden: Tensor, outputs: Tensor) -> None:
    """Norms of residual + expert output, assuming that the two are orthogonal."""
    with norms.writing() as append:
        for first in range(0, len(outputs), _ROWS):
            parts = [each[first : first + _ROWS] for each in (hidden, outputs)]
            squares = [part.square().sum(1, keepdim=True) for part in parts]
            append((squares[0] + squares[1]).sqrt())
