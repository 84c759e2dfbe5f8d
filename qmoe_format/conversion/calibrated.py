"""Conversion with calibration text: each block sees what the compressed blocks before it produce.

Memory holds one block without its experts, and one group of experts with their Hessians, whatever
the size of the model and the text. Every finished block is on disk, see ``work``. Of several ranks,
each runs some of the text and quantizes some of the experts; rank 0 writes the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from qmoe_format._version import __version__
from qmoe_format.atomic_file import atomic_write
from qmoe_format.calibration.ranks import ALONE, Ranks
from qmoe_format.calibration.sequences import Batch, default_sequence_length, read_batches
from qmoe_format.calibration.text import text_sha256
from qmoe_format.checkpoints import Checkpoint
from qmoe_format.checkpoints.tokenizers import load_tokenizer
from qmoe_format.container.writer import Writer
from qmoe_format.conversion.block_experts import count_weights
from qmoe_format.conversion.options import Calibration, ConvertOptions
from qmoe_format.conversion.parallel import Resources, torch_threads
from qmoe_format.conversion.passes import BlockPasses
from qmoe_format.conversion.passthrough import check_passthrough, write_passthrough
from qmoe_format.conversion.quantize_block import BlockRecord
from qmoe_format.conversion.rate_control import FixedRate, RateControl, TargetRate
from qmoe_format.conversion.report import REPORT_NAME, Quality, dump_report, report_path, rounded
from qmoe_format.conversion.staging import Parts, Staging
from qmoe_format.conversion.survey import reference_energy
from qmoe_format.conversion.work import Work, describe_checkpoint, describe_code
from qmoe_format.machine import check_device
from qmoe_format.progress import Counter, Progress
from qmoe_format.quantize.rate import Rate
from qmoe_format.remote import Location

DEFAULT_LAMBDA = 0.05
_LIBRARIES = ("numba", "numpy", "tokenizers", "torch", "transformers", "zstandard")


def convert_calibrated(
    checkpoint: Checkpoint,
    destination: Location,
    options: ConvertOptions,
    resources: Resources,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Convert a checkpoint; see ``convert``."""
    calibration = options.calibration
    assert calibration
    ranks.settle(lambda: check_device(resources.device))
    if not ranks.leads:
        progress = None
    settings = _settings(checkpoint, options, calibration)
    counter = Counter(progress, count_weights(checkpoint.stacks))
    batches = _read_batches(
        checkpoint, options, lambda number: counter.enter(f"read text, document {number:,}")
    )
    ranks.share(lambda: check_passthrough(checkpoint, options.keep_native))
    fingerprint = settings | _environment(checkpoint, options, resources)
    with (
        Work(
            destination,
            fingerprint,
            resume=options.resume,
            overwrite=options.overwrite,
            ranks=ranks,
        ) as work,
        torch_threads(resources.threads),
    ):
        passes = BlockPasses(checkpoint, batches, options, resources, work, progress, ranks)
        staging = Staging(work.folder, checkpoint.stacks, options.methods, ranks)
        done = _staged([record for record in work.records("block") if record])
        ranks.share(lambda: staging.clean(done))
        control = _rate_control(checkpoint, options, passes)
        records = passes.quantize(control, staging)

        def finish() -> None:
            control.check()
            report = dump_report(_quality(checkpoint, settings, batches, records))
            _write(checkpoint, destination, options, report, staging, records, progress)

        ranks.share(finish)


def _write(
    checkpoint: Checkpoint,
    destination: Location,
    options: ConvertOptions,
    report: bytes,
    staging: Staging,
    records: Sequence[BlockRecord],
    progress: Progress | None,
) -> None:
    """Write the file and, beside it, the report."""
    staged = _staged(records)
    counter = Counter(progress, sum(info.elements for info in checkpoint.tensors.values()))
    counter.enter("write")
    with Writer(destination, shard_bytes=options.shard_bytes) as writer:
        writer.add_attachment(REPORT_NAME, report)
        write_passthrough(checkpoint, writer, counter, options.keep_native)
        for stack in checkpoint.stacks:
            staging.copy(stack, staged[stack.name], writer, counter)
        # Before the file: once that is there, nothing is left to be resumed.
        with atomic_write(report_path(destination)) as file:
            file.write(report)


def _staged(records: Sequence[BlockRecord]) -> dict[str, Parts]:
    """Where the stacks of finished blocks are, by name."""
    return {name: record["parts"] for record in records for name in record["stack_bytes"]}


def _settings(
    checkpoint: Checkpoint, options: ConvertOptions, calibration: Calibration
) -> dict[str, Any]:
    """What was asked for; the text by its hash."""
    asked = asdict(calibration)
    del asked["text"], asked["device"]
    length = calibration.sequence_length or default_sequence_length(checkpoint.config)
    return {
        "recipe": str(options.methods.default),
        "rules": list(options.rules),
        "profile": options.profile,
        "text_sha256": text_sha256(
            calibration.text, calibration.text_column, calibration.target_column
        ),
        **(asked | {"sequence_length": length}),
        "bits_per_weight": options.bits_per_weight,
        "lambda": options.rate_lambda,
    }


def _environment(
    checkpoint: Checkpoint, options: ConvertOptions, resources: Resources
) -> dict[str, Any]:
    """Everything else that the bytes of the result depend on."""
    assert options.calibration
    files = describe_checkpoint(checkpoint)
    return {
        "device": options.calibration.device,
        "shard_bytes": options.shard_bytes,
        "keep_native": options.keep_native,
        "threads": resources.threads,
        "version of qmoe-format": __version__,
        "code of qmoe-format": describe_code(),
        **{f"version of {name}": version(name) for name in _LIBRARIES},
        **{f"file {name}": digest for name, digest in files.items()},
    }


def _rate_control(
    checkpoint: Checkpoint, options: ConvertOptions, passes: BlockPasses
) -> RateControl:
    if not options.methods.rated:
        return FixedRate()
    surveys = passes.survey()
    if options.bits_per_weight is not None:
        return TargetRate(options.bits_per_weight, checkpoint.stacks, surveys)
    return FixedRate(Rate(options.rate_lambda or DEFAULT_LAMBDA, reference_energy(surveys)))


def _quality(
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    batches: Sequence[Batch],
    records: Sequence[BlockRecord],
) -> Quality:
    found = {name: each for record in records for name, each in record["quality"].items()}
    stored = sum(size for record in records for size in record["stack_bytes"].values())
    dictionaries: dict[str, int] = {}
    for record in records:
        dictionaries |= record["dictionary_bytes"]
    for stack in checkpoint.stacks:
        if stack.name not in found or len(found[stack.name]["experts"]) != stack.experts:
            raise AssertionError(f"{stack.name}: not all experts are quantized")
    bits = 8 * (stored + sum(dictionaries.values())) / count_weights(checkpoint.stacks)
    parts = [part for each in batches for part in (each.inputs, each.targets) if part is not None]
    return Quality(
        settings=settings,
        totals={
            "sequences": sum(len(batch.inputs.ids) for batch in batches),
            "tokens": sum(int(part.attended.sum()) for part in parts),
            "counted_tokens": sum(int(part.counted.sum()) for part in parts),
            "total_bits_per_weight": rounded(bits),
        },
        stacks=[found[stack.name] for stack in checkpoint.stacks],
    )


def _read_batches(
    checkpoint: Checkpoint, options: ConvertOptions, progress: Callable[[int], None]
) -> list[Batch]:
    calibration = options.calibration
    assert calibration
    return read_batches(
        load_tokenizer(
            checkpoint.folder,
            where=checkpoint.where,
            trust_remote_code=options.trust_remote_code,
        ),
        checkpoint.config,
        calibration.text,
        column=calibration.text_column,
        target_column=calibration.target_column,
        progress=progress,
        sequence_length=calibration.sequence_length,
        samples=calibration.samples,
        seed=calibration.seed,
        mask_special_tokens=calibration.mask_special_tokens,
        parse_special_tokens=calibration.parse_special_tokens,
    )
