"""Conversion with calibration text: layer by layer, each sees what the compressed ones before it
make of the text.

Memory holds one block without its experts, and one group of experts with their Hessians, whatever
the size of the model and the text. Every finished block is on disk, see ``work``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from qmoe_format import container
from qmoe_format._version import __version__
from qmoe_format.calibration.activations import Routed, Rows
from qmoe_format.calibration.sequences import Batch, default_sequence_length, read_batches
from qmoe_format.calibration.text import text_sha256
from qmoe_format.calibration.walk import Block, Walk
from qmoe_format.checkpoints import Checkpoint, ExpertStack
from qmoe_format.checkpoints.wiring import wiring
from qmoe_format.codec import PROFILES
from qmoe_format.container.writer import Writer
from qmoe_format.conversion.block_experts import Layer
from qmoe_format.conversion.options import Calibration, Target
from qmoe_format.conversion.parallel import torch_threads
from qmoe_format.conversion.passthrough import begin_stack, check_rest, write_rest
from qmoe_format.conversion.quantize_block import BlockRecord, quantize_block
from qmoe_format.conversion.rate_control import ATTEMPTS, RateControl, StackPlan, plan_layer
from qmoe_format.conversion.report import (
    REPORT_NAME,
    Quality,
    StackQuality,
    dump_report,
    report_path,
    rounded,
    write_report,
)
from qmoe_format.conversion.work import Work, describe_checkpoint, describe_code
from qmoe_format.errors import QMoEError
from qmoe_format.machine import check_device, release_memory
from qmoe_format.progress import Counter, Progress
from qmoe_format.quantize import Recipe
from qmoe_format.quantize.rd import Rate


class CalibratedConversion:
    """One conversion; ``run`` does it, or goes on with it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        destination: Path,
        recipe: Recipe,
        profile: str,
        calibration: Calibration,
        target: Target,
        *,
        shard_bytes: int | None,
        threads: int,
        progress: Progress | None,
    ) -> None:
        """The arguments are those of ``convert``.

        Raises:
            QMoEError: what is wrong with text, tokenizer or device.
        """
        check_device(calibration.device)
        self._checkpoint = checkpoint
        self._destination = destination
        self._recipe = recipe
        self._profile_name = profile
        self._profile = PROFILES[profile]
        self._calibration = calibration
        self._target = target
        self._shard_bytes = shard_bytes
        self._threads = threads
        self._progress = progress
        self._wiring = wiring(checkpoint.config)
        self._text_sha256 = text_sha256(calibration.text)
        counter = Counter(progress, _weights(checkpoint.stacks))
        self._batches = _batches(
            checkpoint,
            calibration,
            lambda number: counter.enter(f"read text, document {number:,}"),
        )

    def run(self, *, resume: bool, overwrite: bool) -> None:
        """Convert; ``resume``, ``overwrite`` and errors are those of ``convert``."""
        check_rest(self._checkpoint)
        with (
            Work(
                self._destination, self._fingerprint(), resume=resume, overwrite=overwrite
            ) as work,
            torch_threads(self._threads),
        ):
            walk = Walk(self._checkpoint, self._batches, work.folder, self._calibration.device)
            # After the last block with experts there is nothing to be learnt.
            last = max(number for number, block in enumerate(walk.blocks) if block.head)
            blocks = walk.blocks[: last + 1]
            control = None
            if self._recipe.rated:
                control = RateControl(
                    self._target, self._checkpoint.stacks, self._plan(work, walk, blocks)
                )
            records = self._quantize(work, walk, blocks, control)
            if control:
                control.check()
            self._assemble(work, records)

    def _settings(self) -> dict[str, Any]:
        """What was asked for; the text by its hash."""
        asked = asdict(self._calibration) | {
            "sequence_length": self._calibration.sequence_length
            or default_sequence_length(self._checkpoint.config)
        }
        del asked["text"], asked["device"]
        return {
            "recipe": self._recipe.name,
            "profile": self._profile_name,
            "text_sha256": self._text_sha256,
            **asked,
            "bits_per_weight": self._target.bits,
            "lambda": self._target.lam,
        }

    def _fingerprint(self) -> dict[str, Any]:
        """All that decides the bytes."""
        return {
            **self._settings(),
            "device": self._calibration.device,
            "shard_bytes": self._shard_bytes,
            "threads": self._threads,
            "version of qmoe-format": __version__,
            "code of qmoe-format": describe_code(),
            **{
                f"version of {name}": version(name)
                for name in ("numba", "numpy", "tokenizers", "torch", "transformers", "zstandard")
            },
            **{
                f"file {name}": digest
                for name, digest in describe_checkpoint(self._checkpoint).items()
            },
        }

    def _plan(self, work: Work, walk: Walk, blocks: Sequence[Block]) -> dict[str, StackPlan]:
        """Let the text go through the original model, and measure each stack."""
        records: list[dict[str, StackPlan]] = work.records("plan")
        counter = self._counter(blocks[len(records) :])
        if len(records) < len(blocks):
            walk.start(len(records))
        for number in range(len(records), len(blocks)):
            block = blocks[number]
            counter.enter(f"plan {block.name}")
            record: dict[str, StackPlan] = {}
            outputs: Tensor | None = None
            if routed := walk.collect():
                layer = self._layer(block, routed)
                outputs = routed.outputs()
                for group in layer.groups():
                    layer.add_outputs(layer.weights(group), group, outputs)
                norms = _norms(work, number, len(outputs))
                _write_norms(norms, walk.hidden(), outputs)
                layer = self._layer(block, routed, norms)
                measure = self._target.bits is not None
                record = plan_layer(layer, self._recipe, self._profile, counter, measure=measure)
                release_memory()
            if number + 1 < len(blocks):
                walk.advance(outputs)
            work.record("plan", number, record)
            records.append(record)
        return {name: plan for record in records for name, plan in record.items()}

    def _quantize(
        self, work: Work, walk: Walk, blocks: Sequence[Block], control: RateControl | None
    ) -> list[BlockRecord]:
        records: list[BlockRecord] = work.records("block")
        for record in records:
            _finish(control, record)
        counter = self._counter(blocks[len(records) :])
        if len(records) < len(blocks):
            walk.start(len(records))
        for number in range(len(records), len(blocks)):
            block, is_last = blocks[number], number + 1 == len(blocks)
            outputs: Tensor | None = None
            counter.enter(block.name)
            record = BlockRecord(value=None, stacks={}, stored={}, dictionaries={})
            if routed := walk.collect():
                norms = _norms(work, number, len(routed.inputs)) if control else None
                layer = self._layer(block, routed, norms)
                value, before = control.choose() if control else None, counter.done
                for _ in range(ATTEMPTS):
                    counter.back_to(before)
                    counter.enter(block.name)
                    outputs = None if is_last else routed.outputs()
                    rate = Rate(value, control.reference) if control and value else None
                    staged = partial(_staged, work, number)
                    record = quantize_block(
                        layer, self._recipe, self._profile, rate, staged, outputs, counter
                    )
                    value = _again(control, record)
                    if value is None:
                        break
            if not is_last:
                walk.advance(outputs)
            work.record("block", number, record)
            records.append(record)
            _finish(control, record)
        return records

    def _layer(self, block: Block, routed: Routed, norms: Rows | None = None) -> Layer:
        return Layer(
            self._checkpoint,
            str(block.head),
            self._wiring,
            routed,
            token_cap=self._calibration.token_cap,
            norms=norms.mapped() if norms else None,
            device=self._calibration.device,
            threads=self._threads,
        )

    def _assemble(self, work: Work, records: Sequence[BlockRecord]) -> None:
        """Write report and file."""
        stacks = self._checkpoint.stacks
        found = {name: each for record in records for name, each in record["stacks"].items()}
        matrices = {stack.name: stack.matrix for stack in stacks}
        staged = {
            name: _staged(work, number, matrices[name])
            for number, record in enumerate(records)
            for name in record["stacks"]
        }
        for stack in stacks:
            if stack.name not in found or len(found[stack.name]["experts"]) != stack.experts:
                raise AssertionError(f"{stack.name}: not all experts are quantised")
        report = dump_report(self._quality([found[stack.name] for stack in stacks], records))
        counter = Counter(self._progress, self._total())
        counter.enter("write")
        with Writer(self._destination, shard_bytes=self._shard_bytes) as writer:
            writer.add_attachment(REPORT_NAME, report)
            write_rest(self._checkpoint, writer, counter)
            for stack in stacks:
                with (
                    container.open(staged[stack.name], memory_map=False) as file,
                    begin_stack(writer, stack) as experts,
                ):
                    for expert in range(stack.experts):
                        experts.append(file.encoded(stack.name, expert))
                        counter.add(stack.rows * stack.columns)
            # Before the file: once that is there nothing is left to be resumed.
            write_report(report, report_path(self._destination))

    def _quality(self, stacks: Sequence[StackQuality], records: Iterable[BlockRecord]) -> Quality:
        stored = sum(size for record in records for size in record["stored"].values())
        dictionaries: dict[str, int] = {}
        for record in records:
            dictionaries |= record["dictionaries"]
        bits = 8 * (stored + sum(dictionaries.values())) / _weights(self._checkpoint.stacks)
        parts = [
            tokens
            for batch in self._batches
            for tokens in (batch.inputs, batch.targets)
            if tokens is not None
        ]
        return Quality(
            settings=self._settings(),
            totals={
                "sequences": sum(len(batch.inputs.ids) for batch in self._batches),
                "tokens": sum(int(part.attended.sum()) for part in parts),
                "counted_tokens": sum(int(part.counted.sum()) for part in parts),
                "total_bits_per_weight": rounded(bits),
            },
            stacks=list(stacks),
        )

    def _counter(self, blocks: Sequence[Block]) -> Counter:
        """Of the experts in some blocks."""
        heads = {block.head for block in blocks}
        stacks = (stack for stack in self._checkpoint.stacks if stack.head in heads)
        return Counter(self._progress, _weights(stacks))

    def _total(self) -> int:
        return sum(info.elements for info in self._checkpoint.tensors.values())


def _weights(stacks: Iterable[ExpertStack]) -> int:
    return sum(stack.experts * stack.rows * stack.columns for stack in stacks)


def _staged(work: Work, number: int, matrix: str) -> Path:
    return work.path(f"block-{number:04}-{matrix}.qmoe")


def _norms(work: Work, number: int, tokens: int) -> Rows:
    """How long the hidden states after a block of the original model are."""
    return Rows(work.path(f"block-{number:04}.norms"), tokens, 1)


def _write_norms(norms: Rows, hidden: Tensor, outputs: Tensor) -> None:
    """Of what went past the experts and what they return, as if at right angles."""
    with norms.writing() as append:
        for first in range(0, len(outputs), 1 << 16):
            parts = [each[first : first + (1 << 16)] for each in (hidden, outputs)]
            squares = [part.square().sum(1, keepdim=True) for part in parts]
            append((squares[0] + squares[1]).sqrt())


def _finish(control: RateControl | None, record: BlockRecord) -> None:
    if control and record["value"] is not None:
        control.finish(record["value"], record["stored"], record["dictionaries"])


def _again(control: RateControl | None, record: BlockRecord) -> float | None:
    if control is None or record["value"] is None:
        return None
    return control.again(record["value"], record["stored"], record["dictionaries"])


def _batches(
    checkpoint: Checkpoint, calibration: Calibration, progress: Callable[[int], None]
) -> list[Batch]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # whatever wrong files make of transformers
        raise QMoEError(
            "checkpoint",
            f"{checkpoint.folder}: transformers cannot load its tokenizer ({error}); fetch the "
            "tokenizer's files again",
        ) from error
    return read_batches(
        tokenizer,
        checkpoint.config,
        calibration.text,
        column=calibration.text_column,
        target_column=calibration.target_column,
        progress=progress,
        sequence_length=calibration.sequence_length,
        samples=calibration.samples,
        seed=calibration.seed,
        mask_special_tokens=calibration.mask_special_tokens,
    )
