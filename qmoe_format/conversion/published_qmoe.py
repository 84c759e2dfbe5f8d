"""Conversion of what QMoE's authors publish: the same levels and scales, in another code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_format.codec import EncodedMatrix, encode_matrix
from qmoe_format.container.encodings import INT_DICT
from qmoe_format.container.inspection import SOURCE_NAME, SourceSize
from qmoe_format.container.writer import Writer
from qmoe_format.conversion.encoding import begin_stack
from qmoe_format.conversion.options import ConvertOptions
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.passthrough import check_passthrough, write_passthrough
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.progress import Counter, Progress
from qmoe_format.remote import Location

if TYPE_CHECKING:
    from qmoe_format.checkpoints import ExpertStack
    from qmoe_format.checkpoints.published_qmoe import PublishedCheckpoint
    from qmoe_format.checkpoints.published_qmoe.matrix import PublishedMatrix

_CHOICES = (
    "calibration", "recipe", "rules", "bits", "bits_per_weight", "rate_lambda", "levels", "grid",
)  # fmt: skip


def convert_published(
    folder: Path,
    destination: Location,
    options: ConvertOptions,
    resources: Resources,
    progress: Progress | None = None,
) -> None:
    """Convert a checkpoint; see ``convert``. Nothing is rounded, and no text is needed.

    Raises:
        QMoEError: ``argument`` if ``options`` choose how to quantize; otherwise as ``convert``.
    """
    for name in _CHOICES:
        if getattr(options, name):
            raise QMoEError(
                "argument",
                f"{folder}: its experts are quantized already, so {name} has no effect",
                "leave it out; or convert the original model",
            )
    from qmoe_format.checkpoints.published_qmoe import open_published

    with (
        os_errors(f"cannot read {folder}"),
        open_published(folder, trust_remote_code=options.trust_remote_code) as checkpoint,
    ):
        checkpoint.check_complete()
        counter = Counter(progress, sum(info.elements for info in checkpoint.tensors.values()))
        with Writer(destination, shard_bytes=options.shard_bytes) as writer:
            check_passthrough(checkpoint)
            write_passthrough(checkpoint, writer, counter)
            writer.add_attachment(SOURCE_NAME, _source(checkpoint))
            for stack in checkpoint.stacks:
                with begin_stack(writer, stack, INT_DICT.name) as experts:
                    for matrix in _encoded(checkpoint, stack, options, resources):
                        experts.append(matrix)
                        counter.add(stack.rows * stack.columns)


def _encoded(
    checkpoint: PublishedCheckpoint,
    stack: ExpertStack,
    options: ConvertOptions,
    resources: Resources,
) -> Iterator[EncodedMatrix]:
    """Encode the experts of a stack in order; few are in memory at a time."""
    elements = stack.rows * stack.columns
    threads = resources.threads_per_expert(elements)
    profile = options.codec_profile

    def encode(published: PublishedMatrix) -> EncodedMatrix:
        try:
            return encode_matrix(
                published.levels(threads),
                published.scales,
                width=profile.width,
                rows_per_segment=profile.rows_per_segment(stack.columns),
                threads=threads,
            )
        except QMoEError as error:
            if error.code == "value":
                raise error.at(published.where) from error
            raise

    matrices = (checkpoint.matrix(stack, e) for e in range(stack.experts))
    yield from resources.map(encode, matrices, elements)


def _source(checkpoint: PublishedCheckpoint) -> bytes:
    """How large the checkpoint was, as JSON."""
    experts = [stack.member(e) for stack in checkpoint.stacks for e in range(stack.experts)]
    size = SourceSize(
        format="qmoe",
        expert_bytes=checkpoint.stored_bytes(experts),
        other_bytes=checkpoint.stored_bytes(checkpoint.others),
        other_weights=sum(checkpoint.tensors[name].elements for name in checkpoint.others),
    )
    return json.dumps(size, indent=1).encode() + b"\n"
