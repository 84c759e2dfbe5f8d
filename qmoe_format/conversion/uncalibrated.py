"""Conversion with a recipe that needs no text: one pass over the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmoe_format.codec import EncodedMatrix, Profile
from qmoe_format.container.writer import Writer
from qmoe_format.conversion.encoding import encode
from qmoe_format.conversion.parallel import side_by_side, threads_within
from qmoe_format.conversion.passthrough import begin_stack, check_rest, write_rest
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.checkpoints import Checkpoint, ExpertStack
    from qmoe_format.quantize import Recipe


def convert_data_free(
    checkpoint: Checkpoint,
    writer: Writer,
    recipe: Recipe,
    profile: Profile,
    threads: int,
    counter: Counter,
) -> None:
    """Write everything of a checkpoint."""
    check_rest(checkpoint)
    write_rest(checkpoint, writer, counter)
    for stack in checkpoint.stacks:
        with begin_stack(writer, stack) as experts:
            for matrix in _encoded(checkpoint, stack, recipe, profile, threads):
                experts.append(matrix)
                counter.add(stack.rows * stack.columns)


def _encoded(
    checkpoint: Checkpoint, stack: ExpertStack, recipe: Recipe, profile: Profile, threads: int
) -> Iterator[EncodedMatrix]:
    """The experts of a stack in order; few are in memory at a time."""
    elements = stack.rows * stack.columns
    within = threads_within(elements, threads)
    scale_dtype = recipe.scale_dtype(stack.dtype)

    def work(item: tuple[int, Tensor]) -> EncodedMatrix:
        expert, weights = item
        try:
            ternary = recipe.quantize(weights[None], scale_dtype).weights
            return encode(ternary, 0, scale_dtype, profile, within)
        except QMoEError as error:
            raise QMoEError(error.code, f"tensor {stack.member(expert)!r}: {error}") from error

    experts = ((e, checkpoint.read_expert(stack, e)) for e in range(stack.experts))
    yield from side_by_side(work, experts, elements, threads)
