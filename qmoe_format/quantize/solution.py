"""The matrices of some experts and a quantization of them, as the recipe ``rd`` works on them.

All matrices are transposed and in float32; the columns of both may stand in another order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.hessian import Factored
from qmoe_format.quantize.level_weights import SCALE, LevelWeights, normalized
from qmoe_format.quantize.refit import refit_columns, refit_rows

MAX_LENGTHEN = 0.8  # of what a row falls short
MAX_STRETCH = 1.3  # a row with hardly any non-zeros may have any length


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be quantized.

    Attributes:
        largest: the largest magnitude of each W, float64 ``[experts]``.
        weights: W^T over that, ``[experts, columns, rows]``.
        hessian: H, ``[experts, columns, columns]``.
        exact: H W^T.
        seen: the part of W^T that inputs have seen, H' (H' + d I)^-1 W^T
            = W^T - d (H' + d I)^-1 W^T, with H' the undamped Hessian and d GPTQ's damping.
        energy: E_j = w_j H w_j / columns, ``[experts, rows]``.
        square: w_j w_j, ``[experts, rows]``.
        lengthen: how much to lengthen Q where inputs are rare, see ``Solution.fit``.
        order: the column of W at each place, int64 ``[columns]``.
    """

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
        """The problem of W ``[experts, rows, columns]``; ``ready`` is H' + d I."""
        columns = matrices.shape[2]
        weights, largest = normalized(matrices)
        exact = _products(hessian, weights)
        unseen = _products(ready.factor.mT, _products(ready.factor, weights))
        # A fallback has the identity for H' + d I: with d = 1, nothing was seen.
        damping = torch.tensor([1.0 if d is None else d for d in ready.damping])
        return cls(
            largest=largest,
            weights=weights,
            hessian=hessian,
            exact=exact,
            seen=weights - damping.to(unseen)[:, None, None] * unseen,
            energy=_dots(weights, exact) / columns,
            square=_dots(weights, weights).clamp(min=1e-30),
            lengthen=lengthen,
            order=torch.arange(columns, device=hessian.device),
        )

    def reordered(self, order: Tensor) -> Problem:
        """With the columns in another order."""
        hessian = torch.empty_like(self.hessian)
        for before, after in zip(self.hessian, hessian, strict=True):
            # Twice as fast as indexing both dimensions at once.
            torch.index_select(before.index_select(0, order), 1, order, out=after)
        return replace(
            self,
            weights=self.weights.index_select(1, order),
            hessian=hessian,
            exact=self.exact.index_select(1, order),
            seen=self.seen.index_select(1, order),
            order=self.order[order],
        )


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantization of a problem, with the columns in the same order.

    Attributes:
        levels: T^T, ``[experts, columns, rows]``.
        scale: ``[experts, rows]``.
        column_scale: ``[experts, columns]``.
        target: H W^T and a little of ``Problem.seen``, see ``fit``.
        gradient: target - H Q^T.
    """

    levels: Tensor
    scale: Tensor
    column_scale: Tensor
    target: Tensor
    gradient: Tensor

    @classmethod
    def fit(cls, problem: Problem, levels: Tensor, scale: Tensor, column_scale: Tensor) -> Solution:
        """Refit the scales of the rows to levels and column scales, for a target that fits these.

        The least error for a number of bits makes Q too short (reverse water-filling, Cover and
        Thomas, Elements of Information Theory, 10.3.3): along an eigenvector of H with eigenvalue
        h, by a share of D / (h s^2), where D is the error of a column and s^2 the mean square of a
        weight. What a model has learned about rare inputs lies where h is small; shortening that
        hardly shows in the error, but raises the loss in first order. Therefore the target is
        H W^T + k ``seen``, with k proportional to D / s^2, which leaves small errors alone, and
        limited by the share 1 - w.q / w.w that the row falls short.
        """
        quantized = _values(levels, scale, column_scale)
        product = _products(problem.hessian, quantized)
        own, aim = _dots(quantized, product), _dots(quantized, problem.exact)
        error = problem.energy * levels.shape[1] - 2 * aim + own
        short = 1 - _dots(quantized, problem.weights) / problem.square
        longer = torch.minimum(problem.lengthen * error / problem.square, MAX_LENGTHEN * short)
        longer = longer.clamp(min=0)
        ratio = refit_rows(own, aim + longer * _dots(quantized, problem.seen))
        target = (longer[:, None] * problem.seen).add_(problem.exact)
        gradient = torch.sub(target, product.mul_(ratio[:, None]), out=product)
        return cls(levels, scale * ratio, column_scale, target, gradient)

    def reordered(self, order: Tensor) -> Solution:
        """A copy with the columns in another order."""
        return Solution(
            self.levels.index_select(1, order),
            self.scale,
            self.column_scale.index_select(1, order),
            self.target.index_select(1, order),
            self.gradient.index_select(1, order),
        )

    def rows_refitted(self) -> Solution:
        """With least-squares scales of rows, for the same target."""
        quantized = _values(self.levels, self.scale, self.column_scale)
        aim = _dots(quantized, self.target)
        ratio = refit_rows(aim - _dots(quantized, self.gradient), aim)
        # target - ratio (target - gradient)
        gradient = torch.mul(self.gradient, ratio[:, None], out=quantized)
        gradient.addcmul_(self.target, 1 - ratio[:, None])
        return replace(self, scale=self.scale * ratio, gradient=gradient)

    def columns_refitted(self, problem: Problem) -> Solution:
        """With least-squares scales of columns, then of rows."""
        parts = (self.levels, problem.hessian, self.target, self.scale, self.column_scale)
        columns = torch.stack([refit_columns(*each) for each in zip(*parts, strict=True)])
        return Solution.fit(problem, self.levels, self.scale, columns)


def finished(problem: Problem, solution: Solution) -> LevelWeights:
    """Round the column scales, refit the row scales to them, and round those.

    Row scales are stretched so that q.Hw = w.Hw. Least squares leaves q.Hw = q.Hq = (1 - e) w.Hw,
    where e is the row's relative error: its output is too small by that share, and what later
    layers compute from several such outputs by more. The correction adds only about e^2 to the
    error. The columns have to stand in W's order.

    Raises:
        QMoEError: ``value`` if a scale is out of range.
    """
    columns = solution.column_scale.to(SCALE).float()
    solution = Solution.fit(problem, solution.levels, solution.scale, columns)
    aim = problem.energy * solution.levels.shape[1]
    found = (problem.weights * (solution.target - solution.gradient)).sum(1)
    stretch = torch.nan_to_num(aim / torch.where(found > 0, found, aim), nan=1.0)
    scale = solution.scale * stretch.clamp(1 / MAX_STRETCH, MAX_STRETCH)
    used = solution.levels.any(1) & (scale > 0)
    rows = (torch.where(used, scale, 0.0).double() * problem.largest[:, None]).to(SCALE)
    most = solution.levels.abs().amax(1).clamp(min=1.0) * columns.amax(1, keepdim=True)
    bad = ~torch.isfinite(rows.float() * most.clamp(min=1.0))
    if bad.any():
        expert, row = bad.nonzero()[0].tolist()
        raise QMoEError(
            "value",
            f"expert {expert}, row {row}: weights up to {float(problem.largest[expert]):g} are "
            "beyond scales of bfloat16",
            "rescale the model",
        )
    alive = (rows > 0)[:, None] & (columns > 0)[:, :, None]
    levels = torch.where(alive, solution.levels, 0.0).transpose(1, 2).to(torch.int8)
    return LevelWeights(levels.contiguous(), rows[:, :, None], columns.to(SCALE))


def _values(levels: Tensor, scale: Tensor, column_scale: Tensor) -> Tensor:
    return levels * scale[:, None] * column_scale[:, :, None]


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Dot product of each row of two matrices, ``[experts, rows]``."""
    return torch.stack([(a * b).sum(0) for a, b in zip(one, other, strict=True)])


def _products(hessian: Tensor, matrices: Tensor) -> Tensor:
    """One product per expert: the result of a batched one may depend on the batch."""
    return torch.stack([h @ m for h, m in zip(hessian, matrices, strict=True)])
