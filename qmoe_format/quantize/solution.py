"""The matrices of some experts and a quantization of them, as the recipe ``rd`` works on them.

All matrices are in float32 and padded, see ``padding``; the columns may stand in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.hessian import Factored
from qmoe_format.quantize.level_weights import SCALE, LevelWeights, largest_magnitudes
from qmoe_format.quantize.padding import padded
from qmoe_format.quantize.refit import refit_rows
from qmoe_format.quantize.steps import steps_on

MAX_LENGTHEN = 0.8  # of what a row falls short
MAX_STRETCH = 1.3  # a row with hardly any non-zeros may have any length
_COLUMNS = 512  # of a triangular matrix, at a time


@dataclass(slots=True)
class Problem:
    """What is to be quantized.

    Attributes:
        shape: rows and columns without padding.
        largest: the largest magnitude of each W, float64 ``[experts]``.
        weights: W over that, ``[experts, rows, columns]``.
        hessian: H, ``[experts, columns, columns]``.
        exact: W H.
        seen: the part of W that inputs have seen, W (H' + d I)^-1 H' = W - d W (H' + d I)^-1, with
            H' the undamped Hessian and d GPTQ's damping.
        energy: E_j = w_j H w_j / columns, ``[experts, rows]``.
        square: w_j w_j, ``[experts, rows]``.
        lengthen: how much to lengthen Q where inputs are rare, see ``Solution``.
        order: the column of W at each place, int64 ``[columns]``.
    """

    shape: tuple[int, int]
    largest: Tensor
    weights: Tensor
    hessian: Tensor
    exact: Tensor
    seen: Tensor
    energy: Tensor
    square: Tensor
    lengthen: float
    order: Tensor

    @classmethod
    def of(cls, matrices: Tensor, ready: Factored, hessian: Tensor, lengthen: float) -> Problem:
        """The problem of W ``[experts, rows, columns]``; ``ready`` is H' + d I, padded as H."""
        _, rows, columns = matrices.shape
        largest = largest_magnitudes(matrices)
        weights = padded((matrices.double() / largest[:, None, None]).float())
        # One product per expert: the result of a batched one may depend on the batch.
        exact = torch.stack([w @ h for w, h in zip(weights, hessian, strict=True)])
        # A fallback has the identity for H' + d I: with d = 1, nothing was seen.
        damping = [1.0 if d is None else d for d in ready.damping]
        parts = zip(weights, ready.factor, damping, strict=True)
        return cls(
            shape=(rows, columns),
            largest=largest,
            weights=weights,
            hessian=hessian,
            exact=exact,
            seen=torch.stack([w - _over_hessian(w, u).mul_(d) for w, u, d in parts]),
            energy=(weights * exact).sum(2) / columns,
            square=weights.square().sum(2).clamp(min=1e-30),
            lengthen=lengthen,
            order=torch.arange(weights.shape[2], device=weights.device),
        )

    def reorder(self, order: Tensor) -> None:
        """Put the columns into another order."""
        steps = steps_on(order.device)
        self.weights = steps.take_columns(self.weights, order)
        self.exact = steps.take_columns(self.exact, order)
        self.seen = steps.take_columns(self.seen, order)
        self.hessian = steps.take_both(self.hessian, order)
        self.order = self.order[order]


class Solution:
    """A quantization of a problem.

    The least error for a number of bits makes Q too short (reverse water-filling, Cover and Thomas,
    Elements of Information Theory, 10.3.3): along an eigenvector of H with eigenvalue h, by a share
    of D / (h s^2), where D is the error of a column and s^2 the mean square of a weight. What a
    model has learned about rare inputs lies where h is small; shortening that hardly shows in the
    error, but raises the loss in first order. Therefore the target is W H + k ``seen``, with k
    proportional to D / s^2, which leaves small errors alone, and limited by the share 1 - w.q / w.w
    that the row falls short.

    Attributes:
        levels: T, int8 ``[experts, rows, columns]``.
        scale: ``[experts, rows]``.
        column_scale: ``[experts, columns]``.
        target: W H + k ``seen``, ``[experts, rows, columns]``.
        gradient: target - Q H, the same shape, but for ``ratio``.
        ratio: by which target - gradient is yet to be multiplied, ``[experts, rows]``; None for 1.
    """

    def __init__(
        self, problem: Problem, levels: Tensor, scale: Tensor, column_scale: Tensor
    ) -> None:
        """Refit the scales of rows to levels and column scales."""
        self.levels, self.scale, self.column_scale = levels, scale, column_scale
        self.ratio: Tensor | None = None
        self.target = problem.exact.clone()
        self.gradient = problem.exact.clone()
        for expert, hessian in enumerate(problem.hessian):
            quantized = (levels[expert] * scale[expert, :, None]).mul_(column_scale[expert])
            self.gradient[expert].addmm_(quantized, hessian, alpha=-1)
        self.fit(problem)

    def fit(self, problem: Problem) -> None:
        """Refit the scales of rows for a target that fits the rest."""
        steps = steps_on(self.levels.device)
        own, aim, seen, along = (
            steps.row_sums(
                self.levels,
                self.scale,
                self.column_scale,
                self.target,
                self.gradient,
                problem.exact,
                problem.seen,
                problem.weights,
            )
            .float()
            .unbind(2)
        )
        error = problem.energy * problem.shape[1] - 2 * aim + own
        short = 1 - along / problem.square
        longer = torch.minimum(problem.lengthen * error / problem.square, MAX_LENGTHEN * short)
        longer = longer.clamp(min=0)
        ratio = refit_rows(own, aim + longer * seen)
        steps.aim_at(problem.exact, problem.seen, longer, ratio, self.target, self.gradient)
        self.scale = self.scale * ratio
        self.ratio = None

    def refit_rows(self, aim: Tensor, rest: Tensor) -> None:
        """Least-squares scales of rows, for the same target.

        Args:
            aim, rest: q.target and q.gradient of each row, ``[experts, rows]``.
        """
        self.ratio = refit_rows(aim - rest, aim)
        self.scale = self.scale * self.ratio

    def refit_columns(self, problem: Problem, most: int) -> None:
        """Better scales of at most so many columns, then of all rows.

        The steps that are best one by one go together, as far as their sum lowers the error.
        """
        ratio = torch.ones_like(self.scale) if self.ratio is None else self.ratio
        steps_on(self.levels.device).refit_columns(
            self.levels, self.scale, self.column_scale, self.target, self.gradient, ratio,
            problem.hessian, most,
        )  # fmt: skip
        self.fit(problem)

    def reorder(self, order: Tensor) -> None:
        """Put the columns into another order."""
        steps = steps_on(order.device)
        self.levels = steps.take_columns(self.levels, order)
        self.target = steps.take_columns(self.target, order)
        self.gradient = steps.take_columns(self.gradient, order)
        self.column_scale = self.column_scale.index_select(1, order)


def finished(problem: Problem, solution: Solution) -> LevelWeights:
    """Round the column scales, refit the row scales to them, and round those.

    Row scales are stretched so that q.Hw = w.Hw. Least squares leaves q.Hw = q.Hq = (1 - e) w.Hw,
    where e is the row's relative error: its output is too small by that share, and what later
    layers compute from several such outputs by more. The correction adds only about e^2 to the
    error.

    Raises:
        QMoEError: ``value`` if a scale is out of range.
    """
    order = problem.order.argsort()
    problem.reorder(order)
    solution.reorder(order)
    # What this changes in Q H is far below what levels leave.
    columns = solution.column_scale = solution.column_scale.to(SCALE).float()
    solution.fit(problem)
    aim = problem.energy * problem.shape[1]
    found = (problem.weights * (solution.target - solution.gradient)).sum(2)
    stretch = torch.nan_to_num(aim / torch.where(found > 0, found, aim), nan=1.0)
    scale = solution.scale * stretch.clamp(1 / MAX_STRETCH, MAX_STRETCH)
    used = solution.levels.any(2) & (scale > 0)
    rows = (torch.where(used, scale, 0.0).double() * problem.largest[:, None]).to(SCALE)
    most = solution.levels.abs().amax(2).clamp(min=1) * columns.amax(1, keepdim=True)
    bad = ~torch.isfinite(rows.float() * most.clamp(min=1.0))
    if bad.any():
        expert, row = bad.nonzero()[0].tolist()
        raise QMoEError(
            "value",
            f"expert {expert}, row {row}: weights up to {float(problem.largest[expert]):g} are "
            "beyond scales of bfloat16",
            "rescale the model",
        )
    alive = (rows > 0)[:, :, None] & (columns > 0)[:, None]
    height, width = problem.shape
    levels = torch.where(alive, solution.levels, 0)[:, :height, :width].contiguous()
    return LevelWeights(levels, rows[:, :height, None], columns[:, :width].to(SCALE))


def _over_hessian(weights: Tensor, factor: Tensor) -> Tensor:
    """W H^-1 = W U^T U of one expert, without the half of U that is 0."""
    middle, result = torch.empty_like(weights), torch.empty_like(weights)
    columns = weights.shape[1]
    for first in range(0, columns, _COLUMNS):
        here, end = slice(first, first + _COLUMNS), first + _COLUMNS
        middle[:, here] = weights[:, first:] @ factor[here, first:].T
        result[:, here] = middle[:, :end] @ factor[:end, here]
    return result
