"""Conversion with a recipe that needs no text: one pass over the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmoe_format.container.writer import Writer
from qmoe_format.conversion.encoding import Matrix, begin_stack, encode
from qmoe_format.conversion.options import ConvertOptions
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.passthrough import check_passthrough, write_passthrough
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter, Progress
from qmoe_format.remote import Location

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.checkpoints import Checkpoint, ExpertStack


def convert_uncalibrated(
    checkpoint: Checkpoint,
    destination: Location,
    options: ConvertOptions,
    resources: Resources,
    progress: Progress | None = None,
) -> None:
    """Convert a checkpoint; see ``convert``."""
    counter = Counter(progress, sum(info.elements for info in checkpoint.tensors.values()))
    with Writer(destination, shard_bytes=options.shard_bytes) as writer:
        check_passthrough(checkpoint, options.keep_native)
        write_passthrough(checkpoint, writer, counter, options.keep_native)
        for stack in checkpoint.stacks:
            encoding = options.methods.of(stack.name).recipe.encoding
            with begin_stack(writer, stack, encoding) as experts:
                for matrix in _encoded(checkpoint, stack, options, resources):
                    experts.append(matrix)
                    counter.add(stack.rows * stack.columns)


def _encoded(
    checkpoint: Checkpoint, stack: ExpertStack, options: ConvertOptions, resources: Resources
) -> Iterator[Matrix]:
    """Encode the experts of a stack in order; few are in memory at a time."""
    elements = stack.rows * stack.columns
    threads = resources.threads_per_expert(elements)
    method, profile = options.methods.of(stack.name), options.codec_profile

    def quantize(item: tuple[int, Tensor]) -> Matrix:
        expert, weights = item
        try:
            return encode(method.quantize(weights[None]).weights, 0, profile, threads)
        except QMoEError as error:
            raise error.at(f"tensor {stack.member(expert)!r}") from error

    experts = ((e, checkpoint.read_expert(stack, e)) for e in range(stack.experts))
    yield from resources.map(quantize, experts, elements)
