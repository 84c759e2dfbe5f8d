"""Quantize a block's experts into staged stacks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

from torch import Tensor

from qmoe_format.calibration.activations import PairOutputs
from qmoe_format.calibration.ranks import in_order
from qmoe_format.checkpoints import ExpertStack
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.conversion.encoding import Matrix, dictionaries, encode, stored_bytes
from qmoe_format.conversion.options import ConvertOptions
from qmoe_format.conversion.report import ExpertQuality, StackQuality, rounded
from qmoe_format.conversion.staging import Parts, Staging
from qmoe_format.errors import QMoEError
from qmoe_format.machine import release_memory
from qmoe_format.progress import Counter
from qmoe_format.quantize.hessian import Statistics, relative_error
from qmoe_format.quantize.level_weights import kurtosis
from qmoe_format.quantize.rate import Rate


class BlockRecord(TypedDict):
    """What a finished block, or one rank's experts of it, has become.

    ``parts``: see ``staging``. ``lam``: its rate's, if it has one. ``quality``, ``stack_bytes``: by
    stack. ``dictionary_bytes``: as ``encoding.dictionaries``.
    """

    parts: Parts
    lam: float | None
    quality: dict[str, StackQuality]
    stack_bytes: dict[str, int]
    dictionary_bytes: dict[str, int]


def quantize_block(
    experts: BlockExperts,
    options: ConvertOptions,
    rate: Rate | None,
    prices: Mapping[str, float],
    staging: Staging,
    outputs: Tensor | PairOutputs | None,
    counter: Counter,
) -> BlockRecord:
    """Quantize this rank's experts of a block, a group at a time, into ``staging``.

    Args:
        prices: factors for the rate's lambda, by stack.
        outputs: see ``BlockExperts.add_outputs``; None if nothing depends on them.

    Raises:
        QMoEError: as ``Recipe.quantize``; ``value`` if an expert's error is not finite.
    """
    lam = float(rate.lam) if rate else None
    parts = staging.parts(experts.own)
    record = BlockRecord(parts=parts, lam=lam, quality={}, stack_bytes={}, dictionary_bytes={})
    rates: dict[str, Rate | None] = {}
    for stack in experts.stacks.values():
        rated = rate and options.methods.of(stack.name).recipe.rated
        own = rate.times(prices.get(stack.name, 1.0)) if rate and rated else None
        rates[stack.name] = own
        own_lam = rounded(float(own.lam)) if own else None
        record["quality"][stack.name] = {"name": stack.name, "lambda": own_lam, "experts": []}
        record["stack_bytes"][stack.name] = 0
    stage = counter.stage
    with staging.writing(experts.stacks, experts.own) as writers:
        for group in experts.groups():
            counter.enter(f"{stage}, expert {group[0] + 1} of {experts.count}")
            weights = experts.weights(group)
            statistics = experts.statistics(weights, group)
            for matrix, stack in experts.stacks.items():
                for coded, quality in _quantize(
                    experts, stack, group, weights[matrix], statistics.pop(matrix), options,
                    rates[stack.name],
                ):  # fmt: skip
                    writers[matrix].append(coded)
                    record["quality"][stack.name]["experts"].append(quality)
                    record["stack_bytes"][stack.name] += stored_bytes(coded)
                    record["dictionary_bytes"] |= dictionaries(coded)
                    counter.add(experts.share(stack.rows * stack.columns))
            if outputs is not None:
                experts.add_outputs(weights, group, outputs)
            del weights, statistics
            release_memory()
    return record


def merged(records: Sequence[BlockRecord]) -> BlockRecord:
    """The record of a block from those of all ranks."""
    whole = copy.deepcopy(records[0])
    for record in records[1:]:
        whole["parts"] |= record["parts"]
        whole["dictionary_bytes"] |= record["dictionary_bytes"]
        for name, size in record["stack_bytes"].items():
            whole["stack_bytes"][name] += size
    for name, quality in whole["quality"].items():
        found = [record["quality"][name]["experts"] for record in records]
        quality["experts"] = in_order(whole["parts"].values(), found)
    return whole


def _quantize(
    experts: BlockExperts,
    stack: ExpertStack,
    group: Sequence[int],
    weights: Tensor,
    statistics: Statistics,
    options: ConvertOptions,
    rate: Rate | None,
) -> Iterator[tuple[Matrix, ExpertQuality]]:
    """Quantize some experts of a stack; ``weights`` become what a reader will get."""
    method, resources = options.methods.of(stack.name), experts.resources
    threads = resources.threads // resources.concurrent_experts(experts.elements)

    def quantize(batch: range) -> list[tuple[Matrix, ExpertQuality]]:
        part = slice(batch.start, batch.stop)
        own = statistics.of(part)
        numbers = group[part]
        try:
            quantized = method.quantize(weights[part], own, rate)
        except QMoEError as error:
            raise error.at(f"tensor {stack.name!r}, experts from {numbers[0]}") from error
        values = quantized.weights.dequantize()
        errors = relative_error(weights[part], values, own.sums).tolist()
        # Where nothing reached an expert, its error means nothing, unless there is nothing to lose.
        reached = own.sums.diagonal(dim1=1, dim2=2).sum(1) != 0
        known = (reached | ~weights[part].flatten(1).any(1)).tolist()
        heavy = kurtosis(weights[part])
        levels, zeros = quantized.weights.counts(), (values == 0).double().mean((1, 2)).tolist()
        weights[part] = values
        done = []
        for place, expert in enumerate(numbers):
            if known[place] and not math.isfinite(errors[place]):
                raise QMoEError(
                    "value",
                    f"tensor {stack.member(expert)!r}: its error on the calibration text is "
                    f"{errors[place]}",
                    "look for huge weights in the checkpoint, or use the recipe 'rtn'",
                )
            coded = encode(quantized.weights, place, options.codec_profile, threads)
            quality = ExpertQuality(
                tokens=int(own.tokens[place]),
                damping=rounded(quantized.damping[place]),
                fallback=quantized.fallback[place],
                relative_error=rounded(errors[place]) if known[place] else None,
                bits=8 * stored_bytes(coded) / (stack.rows * stack.columns),
                kurtosis=rounded(heavy[place]),
                levels=levels[place],
                zeros=zeros[place],
            )
            done.append((coded, quality))
        return done

    batches = resources.batches(len(group), stack.rows, stack.columns)
    for done in resources.map(quantize, batches, experts.elements):
        yield from done
