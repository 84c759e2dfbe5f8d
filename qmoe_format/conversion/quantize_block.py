"""Quantise a block's experts, and write a file for each stack of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from qmoe_format.checkpoints import ExpertStack
from qmoe_format.codec import EncodedMatrix, Profile
from qmoe_format.container.writer import Writer
from qmoe_format.conversion.block_experts import Layer
from qmoe_format.conversion.encoding import dictionary_bytes, encode, grid_step, stored_bytes
from qmoe_format.conversion.parallel import batches, side_by_side
from qmoe_format.conversion.passthrough import begin_stack
from qmoe_format.conversion.report import ExpertQuality, StackQuality, rounded
from qmoe_format.errors import QMoEError
from qmoe_format.machine import release_memory
from qmoe_format.progress import Counter
from qmoe_format.quantize import Recipe
from qmoe_format.quantize.hessian import Statistics, relative_error
from qmoe_format.quantize.rd import Rate


class BlockRecord(TypedDict):
    """What is known of a finished block: reports and bytes by stack, dictionaries by number."""

    value: float | None
    stacks: dict[str, StackQuality]
    stored: dict[str, int]
    dictionaries: dict[str, int]


def quantize_block(
    layer: Layer,
    recipe: Recipe,
    profile: Profile,
    rate: Rate | None,
    staged: Callable[[str], Path],
    outputs: Tensor | None,
    counter: Counter,
) -> BlockRecord:
    """Quantise a block's experts, a group at a time.

    Args:
        layer: the block's experts.
        recipe, profile: how to quantise and to code.
        rate: for a recipe that takes one.
        staged: where to write the file of a matrix of ``layer.stacks``.
        outputs: float32 ``[tokens, d]``, what the quantised experts return is added to it; or None.
        counter: told of each matrix.

    Raises:
        QMoEError: as the recipe; ``value`` if an expert's error is not finite.
    """
    value = float(rate.lam) if rate else None
    record = BlockRecord(value=value, stacks={}, stored={}, dictionaries={})
    stage = counter.stage
    with ExitStack() as opened:
        writers = {}
        for matrix, stack in layer.stacks.items():
            writer = opened.enter_context(Writer(staged(matrix)))
            writers[matrix] = begin_stack(writer, stack)
            quality = StackQuality({"name": stack.name, "lambda": rounded(value), "experts": []})
            record["stacks"][stack.name] = quality
            record["stored"][stack.name] = 0
        for group in layer.groups():
            counter.enter(f"{stage}, expert {group.start + 1} of {layer.experts}")
            weights = layer.weights(group)
            statistics = layer.statistics(weights, group)
            for matrix, stack in layer.stacks.items():
                for coded, report in _quantize(
                    layer, stack, group, weights[matrix], statistics[matrix], recipe, profile, rate
                ):
                    writers[matrix].append(coded)
                    record["stacks"][stack.name]["experts"].append(report)
                    record["stored"][stack.name] += stored_bytes(coded)
                    size = dictionary_bytes(coded.dictionary)
                    record["dictionaries"][str(grid_step(coded))] = size
                    counter.add(stack.rows * stack.columns)
            if outputs is not None:
                layer.add_outputs(weights, group, outputs)
            del weights, statistics
            release_memory()
    return record


def _quantize(
    layer: Layer,
    stack: ExpertStack,
    group: range,
    weights: Tensor,
    statistics: Statistics,
    recipe: Recipe,
    profile: Profile,
    rate: Rate | None,
) -> Iterator[tuple[EncodedMatrix, ExpertQuality]]:
    """Quantise some experts of a stack; ``weights`` become what a reader will get."""
    scale_dtype = recipe.scale_dtype(stack.dtype)
    within = max(1, layer.threads // layer.abreast)

    def work(batch: range) -> list[tuple[EncodedMatrix, ExpertQuality]]:
        part = slice(batch.start, batch.stop)
        own = statistics.of(part)
        numbers = group[part]
        try:
            quantized = recipe.quantize(weights[part], scale_dtype, own, rate)
        except QMoEError as error:
            where = f"{stack.name!r}, with experts counted from {numbers.start}"
            raise QMoEError(error.code, f"{where}: {error}") from error
        values = quantized.weights.dequantize()
        errors = relative_error(weights[part], values, own.sums).tolist()
        weights[part] = values
        # Where nothing reached an expert, there is nothing that could have gone wrong.
        reached = (own.sums.diagonal(dim1=1, dim2=2).sum(1) != 0).tolist()
        done = []
        for place, expert in enumerate(numbers):
            if reached[place] and not math.isfinite(errors[place]):
                raise QMoEError(
                    "value",
                    f"tensor {stack.member(expert)!r}: its error on the calibration text is "
                    f"{errors[place]}; look for huge weights in the checkpoint, or take the "
                    "recipe rtn",
                )
            coded = encode(quantized.weights, place, scale_dtype, profile, within)
            report = ExpertQuality(
                tokens=int(own.tokens[place]),
                damping=rounded(quantized.damping[place]),
                fallback=quantized.fallback[place],
                relative_error=rounded(errors[place]) if reached[place] else None,
                bits=8 * stored_bytes(coded) / (stack.rows * stack.columns),
            )
            done.append((coded, report))
        return done

    parts = batches(range(len(group)), stack.rows, stack.columns, layer.workers, layer.device)
    for done in side_by_side(work, parts, layer.elements, layer.workers):
        yield from done
