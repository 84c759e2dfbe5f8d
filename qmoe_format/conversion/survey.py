"""Measure the original model: the energies of its experts, and how large these will become.

A part of the text is enough for that, see ``text_to_survey``.

A few experts of each stack, some of their rows, are quantized at a few values of lambda, each
relative to the expert's own energy. The sizes of the others follow from their energies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from qmoe_format.calibration.ranks import ALONE, Ranks, in_order
from qmoe_format.calibration.sequences import Batch
from qmoe_format.checkpoints import ExpertStack, LayerStacks
from qmoe_format.conversion.block_experts import BlockExperts, count_weights
from qmoe_format.conversion.encoding import Matrix, dictionaries, encode, expected_bytes
from qmoe_format.conversion.options import ConvertOptions
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.rate import ABSOLUTE, TRUST, Rate

LAMBDAS = tuple(8e-6 * 5**step for step in range(9))
POWER = 0.45  # of a block's estimated effect in its price
_PART = 1 / 8  # of the text, if that gives experts
_TOKENS = 2048  # each, or more than one where a token goes to several
_QUANTILES = 16
_LEAST_SHARE = 1e-6  # of an expert's energy that a row is taken to have
_SAMPLE_EXPERTS = 4
_SAMPLE_ROWS = 64


@dataclass(frozen=True, slots=True)
class StackSurvey:
    """What was measured of a stack. Sizes and dictionaries are empty if no size was asked for.

    Attributes:
        tokens: that reach the block and count, in all of the text.
        energies: of each expert, 0 without tokens, None if its weights are all zero; those of all
            of the text.
        spread: quantiles of the logarithm of a row's energy over its expert's, the mean of the
            experts that have tokens.
        sizes: bytes of an expert at each of ``LAMBDAS``, the reference being its own energy; the
            same for all if its recipe knows no rate.
        dictionaries: hashes of its dictionaries, at each.
        dictionary_bytes: of one.
        price: a factor for lambda, see ``with_prices``.
    """

    tokens: int
    energies: list[float | None]
    spread: list[float]
    sizes: list[float]
    dictionaries: list[list[str]]
    dictionary_bytes: float
    price: float = 1.0

    def expected(self, rate: Rate) -> tuple[float, set[str]]:
        """Bytes of the stack at a rate, and the hashes of its dictionaries.

        Interpolated at the lambda that is equivalent if an expert's own energy is the reference, on
        average over its rows; see ``Rate``, also for ``TRUST``. Below ``LAMBDAS`` sizes go on to
        grow as between the first two.
        """
        energies = np.array([each or rate.reference for each in self.energies])
        shift = np.log(rate.reference / energies)[:, None]
        rows = -np.array(self.spread)
        most = math.log(TRUST)
        own, measured = (np.clip(ABSOLUTE * each, -most, most) for each in (shift + rows, rows))
        lams = math.log(float(rate.lam) * self.price) + own.mean(1) - measured.mean()
        lams[[each is None for each in self.energies]] = np.inf
        grid = np.log(LAMBDAS)
        size = np.interp(lams, grid, self.sizes).sum()
        growth = max(self.sizes[0] - self.sizes[1], 0.0) / (grid[1] - grid[0])
        size += growth * (grid[0] - lams).clip(0).sum()
        nearest = np.abs(lams[:, None].clip(-1e9, 1e9) - grid).argmin(1)
        return float(size), {each for place in nearest for each in self.dictionaries[place]}


def text_to_survey(batches: Sequence[Batch], experts: int) -> tuple[list[Batch], float]:
    """Batches spread over the text that say enough of this many experts; their share of it."""
    tokens = np.array([_tokens(batch) for batch in batches])
    need = max(_PART, min(1.0, _TOKENS * experts / max(1, tokens.sum(0).min())))
    number = math.ceil(need * len(batches))
    chosen = [place * len(batches) // number for place in range(number)]
    return [batches[place] for place in chosen], float((tokens[chosen].sum(0) / tokens.sum(0))[0])


def _tokens(batch: Batch) -> list[int]:
    """That are not padding, in each stage of the model."""
    return [int(part.attended.sum()) for part in (batch.inputs, batch.targets) if part]


def reference_energy(surveys: Mapping[str, StackSurvey]) -> float:
    """The geometric mean over the experts that have tokens."""
    logs = [math.log(each) for s in surveys.values() for each in s.energies if each]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def with_prices(
    surveys: Mapping[str, StackSurvey],
    layers: Iterable[LayerStacks],
    sensitivities: Mapping[str, float],
) -> dict[str, StackSurvey]:
    """Give the stacks of each block a price by what its errors do to the model's predictions.

    At one lambda, a row accepts an error E_j rho_j (reference / (E_j rho_j))^ABSOLUTE (see
    ``Rate``). All errors of a block together do that, times its sensitivity. If errors are
    proportional to lambda, as they are with many levels, a bit does as much in every block when all
    blocks do as much, per weight. All of these are estimates, so that prices go only part of the
    way (``POWER``).

    Args:
        sensitivities: by the paths of layers; others have a price of 1.
    """
    reference = reference_energy(surveys)
    effects: dict[str, float] = {}
    for layer in layers:
        errors = 0.0
        for stack, survey in ((each, surveys[each.name]) for each in layer.stacks):
            energies = [each for each in survey.energies if each]
            rows = np.exp(np.log(energies)[:, None] + survey.spread)
            factor = ((reference / rows) ** ABSOLUTE).clip(1 / TRUST, TRUST)
            size = stack.rows * stack.columns
            errors += float((rows * factor).mean(1).sum()) * size / max(1, survey.tokens)
        effect = errors / count_weights(layer.stacks) * sensitivities.get(layer.path, 0.0)
        if effect > 0:
            effects |= {stack.name: effect for stack in layer.stacks}
    mean = math.exp(_mean(map(math.log, effects.values()))) if effects else 1.0
    prices = {n: min(max(mean / each, 1 / TRUST), TRUST) ** POWER for n, each in effects.items()}
    return {n: replace(survey, price=prices.get(n, 1.0)) for n, survey in surveys.items()}


def survey_block(
    experts: BlockExperts,
    norms: Tensor,
    options: ConvertOptions,
    counter: Counter,
    ranks: Ranks = ALONE,
    share: float = 1.0,
) -> dict[str, StackSurvey]:
    """Measure a block's stacks, by name: energies and, if bits were asked for, sizes.

    Each of the ``ranks`` measures its experts, and all of them get all results; ``experts`` get
    their importance.

    Args:
        norms: see ``BlockExperts.measure``.
        share: of the calibration text that is surveyed.

    Raises:
        QMoEError: ``value`` if outputs are NaN or infinite.
    """
    stage, stacks = counter.stage, experts.stacks
    # Of each expert its energy and, if that is not zero, how it spreads over the rows.
    found: dict[str, list[tuple[float | None, Tensor]]] = {matrix: [] for matrix in stacks}
    importance: list[Tensor] = []
    for group in experts.groups():
        counter.enter(f"{stage}, expert {group[0] + 1} of {experts.count}")
        weights = experts.weights(group)
        measured, rho = experts.measure(weights, group, norms)
        importance += rho
        for matrix, rows in measured.items():
            own = rows.mean(1) / share
            for place in (~own.isfinite()).nonzero().flatten().tolist():
                raise QMoEError(
                    "value",
                    f"tensor {stacks[matrix].member(group[place])!r}: its outputs on the "
                    "calibration text are NaN or infinite",
                    "repair the model",
                )
            nonzero = weights[matrix].flatten(1).any(1).tolist()
            for place, energy in enumerate(own.tolist()):
                spread = _spread(rows[place : place + 1][own[place : place + 1] > 0])
                found[matrix].append((energy if nonzero[place] else None, spread))
        counter.add(experts.share(sum(tensor.numel() for tensor in weights.values())))
    ranked = ranks.gather((list(experts.own), found, importance))
    numbers = [own for own, *_ in ranked]
    experts.importance = _filled(torch.stack(in_order(numbers, [each for *_, each in ranked])))
    surveys = {}
    for matrix, stack in stacks.items():
        every = in_order(numbers, [each[matrix] for _, each, _ in ranked])
        energies = [energy for energy, _ in every]
        mean = torch.cat([spread for _, spread in every]).mean(0).nan_to_num().tolist()
        tokens = round(experts.counted / share)
        surveys[stack.name] = StackSurvey(tokens, energies, mean, [], [], 0.0)
    if options.bits_per_weight is None:
        return surveys
    samples: dict[str, list[tuple[Tensor, Statistics]]] = {matrix: [] for matrix in stacks}
    # Every rank needs them all. They are few.
    for expert in sorted(_sampled_experts(experts)):
        weights = experts.weights([expert])
        for matrix, statistics in experts.statistics(weights, [expert]).items():
            energy = (surveys[stacks[matrix].name].energies[expert] or 1.0) * share
            samples[matrix].append(_sample(weights[matrix][0], statistics, energy))
    for matrix, stack in stacks.items():
        counter.enter(f"{stage}, sizes of {matrix}")
        survey = surveys[stack.name]
        surveys[stack.name] = _with_sizes(survey, experts, stack, samples[matrix], options, ranks)
    return surveys


def _filled(importance: Tensor) -> Tensor:
    """With the mean of the other experts for those that no token went to."""
    seen = importance.any(1)
    mean = importance[seen].mean(0) if seen.any() else importance[0]
    return torch.where(seen[:, None], importance, mean)


def _spread(rows: Tensor) -> Tensor:
    """``StackSurvey.spread``: float64 ``[experts, quantiles]`` from ``[experts, rows]``."""
    shares = (rows / rows.mean(1, keepdim=True)).clamp(min=_LEAST_SHARE).log().sort(dim=1).values
    middles = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES
    return shares[:, (middles * rows.shape[1]).long()]


def _sampled_experts(experts: BlockExperts) -> list[int]:
    """Experts with few and with many tokens, if there are some with tokens and weights."""
    tokens = [len(experts.tokens(expert)[0]) for expert in range(experts.count)]
    order = sorted(range(experts.count), key=lambda expert: (tokens[expert], expert))
    order = [expert for expert in order if tokens[expert]] or order
    while True:
        number = min(_SAMPLE_EXPERTS, len(order), experts.experts_in_memory)
        chosen = [order[(2 * i + 1) * len(order) // (2 * number)] for i in range(number)]
        empty = [expert for expert in chosen if not _has_weights(experts, expert)]
        if not empty or len(empty) == len(order):
            return chosen
        order = [expert for expert in order if expert not in empty]


def _has_weights(experts: BlockExperts, expert: int) -> bool:
    """Whether no matrix of the expert is all zero."""
    return all(map(torch.any, experts.weights(range(expert, expert + 1)).values()))


def _sample(weights: Tensor, statistics: Statistics, energy: float) -> tuple[Tensor, Statistics]:
    """Some rows; sums over the expert's energy, so that it is the reference 1."""
    number = min(_SAMPLE_ROWS, len(weights))
    rows = torch.arange(number, device=weights.device) * len(weights) // number
    importance = statistics.row_importance
    if importance.shape[1] > 1:
        importance = importance[:, rows.cpu()]
    sums = statistics.sums / energy
    return weights[rows], replace(statistics, sums=sums, row_importance=importance)


def _with_sizes(
    survey: StackSurvey,
    experts: BlockExperts,
    stack: ExpertStack,
    samples: Sequence[tuple[Tensor, Statistics]],
    options: ConvertOptions,
    ranks: Ranks,
) -> StackSurvey:
    """Quantize all samples at each of ``LAMBDAS``, or once if the recipe knows no rate."""
    method, profile = options.methods.of(stack.name), options.codec_profile
    lambdas = LAMBDAS if method.recipe.rated else LAMBDAS[:1]
    number = len(samples)
    weights = torch.stack([rows for rows, _ in samples])
    sums, tokens, importance = (
        torch.cat([getattr(each, field) for _, each in samples])
        for field in ("sums", "tokens", "row_importance")
    )

    def quantize(batch: Sequence[int]) -> list[Matrix]:
        own = torch.tensor([each % number for each in batch])
        rate = Rate(torch.tensor([lambdas[each // number] for each in batch]), 1.0)
        statistics = Statistics(sums[own], tokens[own], importance[own])
        quantized = method.quantize(weights[own], statistics, rate).weights
        return [encode(quantized, place, profile, 1) for place in range(len(batch))]

    rows, columns = weights.shape[1:]
    every = range(number * len(lambdas))
    mine = every[ranks.rank :: ranks.count]
    batches = experts.resources.batches(len(mine), rows, columns)
    parts_of = (mine[batch.start : batch.stop] for batch in batches)
    done = experts.resources.map(quantize, parts_of, rows * columns + columns**2)
    matrices = [matrix for batch in done for matrix in batch]
    numbers = [every[rank :: ranks.count] for rank in range(ranks.count)]
    matrices = in_order(numbers, ranks.gather(matrices))
    parts = [matrices[first : first + number] for first in range(0, len(matrices), number)]
    sizes = [_mean(expected_bytes(each, stack.rows, profile) for each in part) for part in parts]
    used = [[name for each in part for name in dictionaries(each)] for part in parts]
    found = [size for each in matrices for size in dictionaries(each).values()]
    repeat = len(LAMBDAS) // len(lambdas)
    return replace(
        survey,
        sizes=list(accumulate(sizes * repeat, min)),  # less for a greater lambda, whatever they say
        dictionaries=used * repeat,
        dictionary_bytes=_mean(found) if found else 0.0,
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
