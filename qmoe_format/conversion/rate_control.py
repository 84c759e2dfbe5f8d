"""Which lambda makes the experts as large as asked for.

One lambda is meant to hold for the whole model; see ``quantize.rd.Rate`` for what it is. A walk
over the original model finds the reference that it is relative to, and how large experts get: a few
of each stack, some of their rows, are quantised at a few prices of a bit, each relative to the
expert's own energy, so that the sizes of the others follow from their energies. What the finished
blocks have really become corrects that: lambda is chosen again for those that remain, and a block
from which it would differ by more than ``DRIFT`` is done again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_format.checkpoints import ExpertStack
from qmoe_format.codec import EncodedMatrix, Profile
from qmoe_format.codec.dictionary import on_grid
from qmoe_format.conversion.block_experts import Layer
from qmoe_format.conversion.encoding import dictionary_bytes, encode, expected_bytes
from qmoe_format.conversion.options import Target
from qmoe_format.conversion.parallel import batches, side_by_side
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter
from qmoe_format.quantize import Recipe
from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.rd import ABSOLUTE, TRUST, Rate

DEFAULT_LAMBDA = 0.05
LEAST_LAMBDA, MOST_LAMBDA = 1e-5, 1.0  # what can be asked for is in between
SLACK = 10.0  # so many times beyond may be needed to get it
PRICES = tuple(8e-6 * 5**step for step in range(9))
QUANTILES = 16
LEAST_SHARE = 1e-6  # of an expert's energy that a row is taken to have
SAMPLE_EXPERTS = 2
SAMPLE_ROWS = 64
CLOSE, TOLERANCE = 0.01, 0.02  # of the bits asked for: try again beyond; refuse beyond
ATTEMPTS = 5  # at a block
DRIFT = 2.0  # factor between the lambda of a block and that of the ones after it


class StackPlan(TypedDict):
    """What was measured of a stack.

    ``energies``: of each expert, 0 without tokens. ``spread``: quantiles of the logarithm of a
    row's energy over its expert's, the mean of the experts that have tokens. ``bytes`` and
    ``places``: of an expert, and of its dictionary on their grid, where lambda is each of
    ``PRICES`` and the reference the expert's own energy. ``dictionary``: bytes of one. The last
    three are empty if no number of bits was asked for.
    """

    energies: list[float]
    spread: list[float]
    bytes: list[float]
    places: list[float]
    dictionary: float


class RateControl:
    """Chooses lambda for each block, in order.

    Attributes:
        reference: the typical energy that lambda is relative to.
    """

    def __init__(
        self, target: Target, stacks: Iterable[ExpertStack], plans: Mapping[str, StackPlan]
    ):
        """
        Args:
            target: what was asked for.
            stacks: all of them.
            plans: one for each stack, by name.

        Raises:
            QMoEError: ``argument`` if so many bits are out of reach.
        """
        logs = [math.log(each) for plan in plans.values() for each in plan["energies"] if each > 0]
        self.reference = math.exp(sum(logs) / len(logs)) if logs else 1.0
        self._plans = plans
        self._asked = target.bits
        self._fixed = target.lam or DEFAULT_LAMBDA
        self._weights = sum(stack.experts * stack.rows * stack.columns for stack in stacks)
        self._stored: dict[str, int] = {}
        self._dictionaries: dict[str, int] = {}
        self._measured = 0.0
        self._attempts: list[tuple[float, float]] = []  # log lambda, relative excess of bits
        if self._asked is not None:
            most, least = (self._bits(value, 1.0) for value in (LEAST_LAMBDA, MOST_LAMBDA))
            self._range = f"for this model, recipe and profile ask for {least:.3f} to {most:.3f}"
            if not least <= self._asked <= most:
                raise QMoEError(
                    "argument", f"{self._asked:g} bits per weight cannot be reached: {self._range}"
                )

    @property
    def bits(self) -> float:
        """Of the finished stacks and their dictionaries, for a weight of the whole model."""
        return 8 * self._total() / self._weights

    def choose(self) -> float:
        """Lambda for the stacks that remain."""
        return self._solve(self._total() / self._measured if self._measured else 1.0)

    def again(
        self, value: float, stored: Mapping[str, int], dictionaries: Mapping[str, int]
    ) -> float | None:
        """Lambda for another attempt at a block; None if it was good enough.

        Every block shows how much larger experts become than was measured. It is done again if the
        others would have to pay for that with a lambda more than ``DRIFT`` away from its own; the
        last one, until the whole is ``CLOSE`` to what was asked for; the last of ``ATTEMPTS`` at it
        is the best one once more.

        Args:
            value: lambda that was taken.
            stored: bytes of each stack of the block.
            dictionaries: bytes of its dictionaries by number.
        """
        if self._asked is None:
            return None
        after = copy(self)
        after.finish(value, stored, dictionaries)
        if self._plans.keys() - after._stored.keys():
            better = self._solve(after._total() / after._measured)
            drift = abs(math.log(after.choose() / value))
            return better if drift > math.log(DRIFT) and not _same(better, value) else None
        over = after.bits / self._asked - 1
        if abs(over) <= CLOSE or len(self._attempts) == ATTEMPTS - 1:
            return None
        better = self._solve((after._total() - self._total()) / self._expected(value, stored))
        self._attempts.append((math.log(value), over))
        if len(self._attempts) == ATTEMPTS - 1:
            best, least = min(self._attempts, key=lambda each: abs(each[1]))
            return None if abs(over) == abs(least) else math.exp(best)
        low = max((each for each in self._attempts if each[1] > 0), default=None)
        high = min((each for each in self._attempts if each[1] < 0), default=None)
        if low and high:
            part = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
            return math.exp(low[0] + part * (high[0] - low[0]))
        return None if _same(better, value) else better

    def finish(
        self, value: float, stored: Mapping[str, int], dictionaries: Mapping[str, int]
    ) -> None:
        """A block is done, see ``again``."""
        if self._asked is not None:
            self._measured += self._expected(value, stored)
        self._stored = {**self._stored, **stored}
        self._dictionaries = {**self._dictionaries, **dictionaries}

    def check(self) -> None:
        """Raise ``QMoEError("value")`` if the whole has not become as large as asked for."""
        if self._asked is not None and abs(self.bits / self._asked - 1) > TOLERANCE:
            raise QMoEError(
                "value",
                f"the experts have become {self.bits:.4f} bits per weight, {self._asked:g} were "
                f"asked for; {self._range}, or give a lambda",
            )

    def _solve(self, ratio: float) -> float:
        """Lambda that makes the whole as large as asked for, if the rest is so much larger than
        was measured."""
        if self._asked is None:
            return self._fixed
        low, high = math.log(LEAST_LAMBDA / SLACK), math.log(MOST_LAMBDA * SLACK)
        for _ in range(40):
            middle = (low + high) / 2
            if self._bits(math.exp(middle), ratio) > self._asked:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def _total(self) -> int:
        """Bytes of the finished stacks and their dictionaries."""
        return sum(self._stored.values()) + sum(self._dictionaries.values())

    def _bits(self, value: float, ratio: float) -> float:
        """A weight of the whole model at this lambda."""
        rest = [name for name in self._plans if name not in self._stored]
        return 8 * (self._total() + ratio * self._expected(value, rest)) / self._weights

    def _expected(self, value: float, names: Iterable[str]) -> float:
        """Bytes of some stacks and their new dictionaries by what was measured, between the prices
        a straight line in their logarithm."""
        total = 0.0
        there = {int(number) for number in self._dictionaries}
        for plan in (self._plans[name] for name in names):
            prices = self._own_prices(plan, value)
            total += float(np.interp(prices, np.log(PRICES), plan["bytes"]).sum())
            new = set(np.rint(np.interp(prices, np.log(PRICES), plan["places"])).tolist()) - there
            total += len(new) * plan["dictionary"]
            there |= new
        return total

    def _own_prices(self, plan: StackPlan, value: float) -> NDArray[np.float64]:
        """The lambda, in logarithms, that would be the same with each expert's own reference: the
        mean of its rows', which ``TRUST`` bounds."""
        energies = np.array([each if each > 0 else self.reference for each in plan["energies"]])
        shift = np.log(self.reference / energies)[:, None]
        rows = -np.array(plan["spread"])
        most = math.log(TRUST)
        own, measured = (np.clip(ABSOLUTE * each, -most, most) for each in (shift + rows, rows))
        logs: NDArray[np.float64] = math.log(value) + own.mean(1) - measured.mean()
        return logs


def _same(one: float, other: float) -> bool:
    """Whether another attempt with this lambda would be for nothing."""
    return math.isclose(one, other, rel_tol=0.02)


def plan_layer(
    layer: Layer, recipe: Recipe, profile: Profile, counter: Counter, *, measure: bool
) -> dict[str, StackPlan]:
    """Energies of a layer's experts and, if asked to ``measure``, sizes at each of ``PRICES``.

    Returns:
        A plan by name of stack.
    """
    stage = counter.stage
    energies: dict[str, list[float]] = {matrix: [] for matrix in layer.stacks}
    spreads: dict[str, list[Tensor]] = {matrix: [] for matrix in layer.stacks}
    wanted = sorted(_sample(layer)) if measure else []
    samples: dict[str, list[_Sample]] = {matrix: [] for matrix in layer.stacks}
    for group in layer.groups():
        counter.enter(f"{stage}, expert {group.start + 1} of {layer.experts}")
        weights = layer.weights(group)
        for matrix, rows in layer.energies(weights, group).items():
            own = rows.mean(1)
            if not torch.isfinite(own).all():
                raise QMoEError(
                    "value",
                    f"tensor {layer.stacks[matrix].member(group.start)!r} or one of the next: its "
                    "outputs on the calibration text are NaN or infinite; repair the model",
                )
            energies[matrix] += own.tolist()
            spreads[matrix].append(_spread(rows[own > 0]))
        for expert in (each for each in wanted if each in group):
            place = expert - group.start
            own_weights = {matrix: tensor[place : place + 1] for matrix, tensor in weights.items()}
            for matrix, statistics in layer.statistics(own_weights, [expert]).items():
                sample = _Sample(own_weights[matrix][0], statistics, energies[matrix][expert])
                samples[matrix].append(sample)
        counter.add(sum(tensor.numel() for tensor in weights.values()))
    plans = {}
    for matrix, stack in layer.stacks.items():
        spread = torch.cat(spreads[matrix]).mean(0).nan_to_num().tolist()
        plan = StackPlan(
            energies=energies[matrix], spread=spread, bytes=[], places=[], dictionary=0.0
        )
        if measure:
            counter.enter(f"{stage}, sizes of {matrix}")
            matrices = _encoded(layer, stack, samples[matrix], recipe, profile)
            for step in range(len(PRICES)):
                part = matrices[step * len(wanted) : (step + 1) * len(wanted)]
                size = _mean([expected_bytes(each, stack.rows, profile) for each in part])
                # Less for a greater price, whatever the sample says.
                plan["bytes"].append(min([size, *plan["bytes"]]))
                plan["places"].append(_mean([on_grid(each.trits.zero_fraction) for each in part]))
            plan["dictionary"] = _mean([dictionary_bytes(each.dictionary) for each in matrices])
        plans[stack.name] = plan
    return plans


def _spread(rows: Tensor) -> Tensor:
    """See ``StackPlan``: float64 ``[experts, QUANTILES]`` from ``[experts, rows]``."""
    shares = (rows / rows.mean(1, keepdim=True)).clamp(min=LEAST_SHARE).log().sort(dim=1).values
    middles = (torch.arange(QUANTILES) + 0.5) / QUANTILES
    return shares[:, (middles * rows.shape[1]).long()]


class _Sample:
    """Some rows of an expert, and what the tokens say about them.

    Attributes:
        weights: ``[rows, columns]``.
        statistics: of a batch of one; the sums are over the expert's energy, so that a reference
            of 1 is the expert's own.
    """

    def __init__(self, weights: Tensor, statistics: Statistics, energy: float) -> None:
        number = min(SAMPLE_ROWS, len(weights))
        rows = torch.arange(number, device=weights.device) * len(weights) // number
        self.weights = weights[rows]
        importance = statistics.row_importance
        self.statistics = replace(
            statistics,
            sums=statistics.sums / (energy or 1.0),
            row_importance=importance[:, rows.cpu()] if importance.shape[1] > 1 else importance,
        )


def _sample(layer: Layer) -> list[int]:
    """Experts with few and with many tokens, if there are some with tokens."""
    tokens = [len(layer.tokens(expert)[0]) for expert in range(layer.experts)]
    order = sorted(range(layer.experts), key=lambda expert: (tokens[expert], expert))
    order = [expert for expert in order if tokens[expert]] or order
    number = min(SAMPLE_EXPERTS, len(order), layer.fitting)
    return [order[(2 * i + 1) * len(order) // (2 * number)] for i in range(number)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _encoded(
    layer: Layer,
    stack: ExpertStack,
    samples: Sequence[_Sample],
    recipe: Recipe,
    profile: Profile,
) -> list[EncodedMatrix]:
    """The samples at the first of ``PRICES``, then at the next, and so on."""
    scale_dtype = recipe.scale_dtype(stack.dtype)
    number = len(samples)

    def work(batch: range) -> list[EncodedMatrix]:
        own = [samples[each % number] for each in batch]
        statistics = Statistics(
            torch.cat([each.statistics.sums for each in own]),
            torch.cat([each.statistics.tokens for each in own]),
            torch.cat([each.statistics.row_importance for each in own]),
        )
        weights = torch.stack([each.weights for each in own])
        rate = Rate(torch.tensor([PRICES[each // number] for each in batch]), 1.0)
        ternary = recipe.quantize(weights, scale_dtype, statistics, rate).weights
        return [encode(ternary, place, scale_dtype, profile, 1) for place in range(len(batch))]

    rows, columns = samples[0].weights.shape
    every = range(number * len(PRICES))
    items = batches(every, rows, columns, layer.workers, layer.device)
    done = side_by_side(work, items, rows * columns + columns**2, layer.workers)
    return [each for batch in done for each in batch]
