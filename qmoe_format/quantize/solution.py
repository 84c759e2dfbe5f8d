"""The matrices of some experts and a quantization of them, as the recipe ``rd`` works on them.

All matrices are in float32, padded with zeros to whole tiles of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.hessian import Factored
from qmoe_format.quantize.level_weights import SCALE, LevelWeights
from qmoe_format.quantize.refit import Normal, refit_rows

MAX_LENGTHEN = 0.8  # of what a row falls short
MAX_STRETCH = 1.3  # a row with hardly any non-zeros may have any length


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
        lengthen: how much to lengthen Q where inputs are rare, see ``Solution.fit``.
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

    @classmethod
    def of(cls, matrices: Tensor, ready: Factored, hessian: Tensor, lengthen: float) -> Problem:
        """The problem of W ``[experts, rows, columns]``; ``ready`` is H' + d I."""
        _, rows, columns = matrices.shape
        weights, largest = normalized(matrices)
        exact = _products(weights, hessian)
        unseen = _products(_products(weights, ready.factor.mT), ready.factor)
        # A fallback has the identity for H' + d I: with d = 1, nothing was seen.
        damping = torch.tensor([1.0 if d is None else d for d in ready.damping])
        return cls(
            shape=(rows, columns),
            largest=largest,
            weights=weights,
            hessian=hessian,
            exact=exact,
            seen=torch.addcmul(weights, damping.to(unseen)[:, None, None], unseen, value=-1),
            energy=_dots(weights, exact) / columns,
            square=_dots(weights, weights).clamp(min=1e-30),
            lengthen=lengthen,
        )


class Solution:
    """A quantization of a problem.

    Attributes:
        levels: int8 ``[experts, rows, columns]``.
        scale: ``[experts, rows]``.
        column_scale: ``[experts, columns]``.
        target: W H and a little of ``Problem.seen``, see ``fit``.
        gradient: target - Q H.
        ratio: ``[experts, rows]``, by which target - gradient is yet to be multiplied.
    """

    levels: Tensor
    scale: Tensor
    column_scale: Tensor
    target: Tensor
    gradient: Tensor
    ratio: Tensor

    def __init__(self, problem: Problem, levels: Tensor, scale: Tensor, columns: Tensor) -> None:
        """Refit the scales of rows to levels and column scales."""
        self.levels, self.scale, self.column_scale = levels, scale, columns
        self.ratio = torch.ones_like(scale)
        self.target = torch.empty_like(problem.exact)
        self.gradient = torch.empty_like(problem.exact)
        for expert, quantized in enumerate(self.values()):
            torch.mm(quantized, problem.hessian[expert], out=self.gradient[expert])
        self._fit(problem, self.gradient)

    def values(self) -> Tensor:
        """Q."""
        return self.levels * self.scale[:, :, None] * self.column_scale[:, None]

    def _fit(self, problem: Problem, product: Tensor) -> None:
        """Refit the scales of rows for a target that fits the rest.

        The least error for a number of bits makes Q too short (reverse water-filling, Cover and
        Thomas, Elements of Information Theory, 10.3.3): along an eigenvector of H with eigenvalue
        h, by a share of D / (h s^2), where D is the error of a column and s^2 the mean square of a
        weight. What a model has learned about rare inputs lies where h is small; shortening that
        hardly shows in the error, but raises the loss in first order. Therefore the target is
        W H + k ``seen``, with k proportional to D / s^2, which leaves small errors alone, and
        limited by the share 1 - w.q / w.w that the row falls short.
        """
        quantized = self.values()
        own, aim = _dots(quantized, product), _dots(quantized, problem.exact)
        error = problem.energy * problem.shape[1] - 2 * aim + own
        short = 1 - _dots(quantized, problem.weights) / problem.square
        longer = torch.minimum(problem.lengthen * error / problem.square, MAX_LENGTHEN * short)
        longer = longer.clamp(min=0)
        ratio = refit_rows(own, aim + longer * _dots(quantized, problem.seen))
        torch.addcmul(problem.exact, longer[:, :, None], problem.seen, out=self.target)
        torch.addcmul(self.target, ratio[:, :, None], product, value=-1, out=self.gradient)
        self.scale = self.scale * ratio
        self.ratio = torch.ones_like(self.scale)

    def refit_rows(self, aim: Tensor, rest: Tensor) -> None:
        """Least-squares scales of rows, for the same target.

        Args:
            aim, rest: q.target and q.gradient of each row, ``[experts, rows]``.
        """
        self.ratio = refit_rows(aim - rest, aim)
        self.scale = self.scale * self.ratio

    def refit_columns(self, problem: Problem, normals: list[Normal]) -> None:
        """Least-squares scales of columns, then of rows."""
        product = torch.sub(self.target, self.gradient).mul_(self.ratio[:, :, None])
        gradient = torch.sub(self.target, product, out=self.gradient)
        for expert in range(len(self.levels)):
            a = self.levels[expert] * self.scale[expert, :, None]
            aim = (a * gradient[expert]).sum(0)
            step = normals[expert].solve(a, problem.hessian[expert], aim, self.column_scale[expert])
            a *= step
            change = a @ problem.hessian[expert]
            curved = (a * change).sum(dtype=torch.float64)
            along = (step * aim).sum(dtype=torch.float64)
            share = float((along / curved).clamp(0, 1.5)) if curved > 0 else 0.0
            product[expert].add_(change, alpha=share)
            self.column_scale[expert].add_(step, alpha=share)
        self._fit(problem, product)


def finished(problem: Problem, solution: Solution) -> LevelWeights:
    """Round the column scales, refit the row scales to them, and round those.

    Row scales are stretched so that q.Hw = w.Hw. Least squares leaves q.Hw = q.Hq = (1 - e) w.Hw,
    where e is the row's relative error: its output is too small by that share, and what later
    layers compute from several such outputs by more. The correction adds only about e^2 to the
    error.

    Raises:
        QMoEError: ``value`` if a scale is out of range.
    """
    columns = solution.column_scale.to(SCALE).float()
    solution = Solution(problem, solution.levels, solution.scale, columns)
    aim = problem.energy * problem.shape[1]
    found = _dots(problem.weights, solution.target - solution.gradient)
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
    own = (slice(None), slice(problem.shape[0]), slice(problem.shape[1]))
    levels = torch.where(alive, solution.levels, 0)[own]
    return LevelWeights(levels.contiguous(), rows[own[:2]][:, :, None], columns[:, own[2]].to(SCALE))


def normalized(weights: Tensor) -> tuple[Tensor, Tensor]:
    largest = weights.abs().amax((1, 2)).double()
    largest = torch.where(largest > 0, largest, 1.0)
    scaled = (weights.double() / largest[:, None, None]).float()
    rows, columns = weights.shape[1:]
    return padded(scaled, (-columns % 64, -rows % 16)), largest


def padded(matrices: Tensor, extra: tuple[int, int]) -> Tensor:
    if not any(extra):
        return matrices.contiguous()
    return pad(matrices, (0, extra[0], 0, extra[1]))


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Dot product of each row of two matrices, ``[experts, rows]``."""
    return torch.stack([(a * b).sum(1) for a, b in zip(one, other, strict=True)])


def _products(matrices: Tensor, hessians: Tensor) -> Tensor:
    """One product per expert: the result of a batched one may depend on the batch."""
    return torch.stack([m @ h for m, h in zip(matrices, hessians, strict=True)])
