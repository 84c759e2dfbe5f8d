"""Least-squares scales for given levels.

With Q = diag(r) T diag(c), the error tr((W-Q) H (W-Q)^T) is quadratic in r for fixed c, and in c
for fixed r. Both are solved with a small ridge toward the current values, and a scale that would
change by an implausible factor keeps its value.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_RIDGE = 1e-4
COLUMN_RIDGE = 1e-3


def refit_rows(own: Tensor, aim: Tensor) -> Tensor:
    """Factors for the row scales that minimize the error: q.WH / q.QH, but for the ridge.

    Args:
        own: q.QH of each row, ``[experts, rows]``.
        aim: q.WH, or with another target in place of WH, the same shape.
    """
    ridge = ROW_RIDGE * (own + own.mean(1, keepdim=True))
    ratio = (aim + ridge) / (own + ridge)
    return torch.where((ratio > 0.05) & (ratio < 20), ratio, 1.0)


class Normal:
    """The normal equations of one expert's column scales, kept from one refit to the next.

    With A = diag(r) T, the normal matrix is (A^T A) o H. It changes little from refit to refit.
    """

    def __init__(self) -> None:
        self.matrix: Tensor | None = None

    def solve(self, a: Tensor, hessian: Tensor, aim: Tensor, column_scale: Tensor, steps: int = 8) -> Tensor:
        """The change of column scales, ``[columns]``.

        Args:
            a: diag(r) T, ``[rows, columns]``.
            hessian: ``[columns, columns]``.
            aim: A_i . G_i of each column, ``[columns]``.
            column_scale: the current ones, ``[columns]``.
        """
        if self.matrix is None:
            self.matrix = (a.T @ a).mul_(hessian)
            diagonal = self.matrix.diagonal()
            diagonal += COLUMN_RIDGE * (diagonal + 0.1 * diagonal.mean()) + 1e-30
        step = _conjugate_gradients(self.matrix, aim, torch.zeros_like(aim), steps)
        ratio = 1 + step / column_scale
        return torch.where((ratio > 0.1) & (ratio < 10), step, 0.0)


def _conjugate_gradients(matrix: Tensor, aim: Tensor, start: Tensor, steps: int) -> Tensor:
    """x with ``matrix @ x`` near ``aim``, for a positive definite matrix."""
    x = start
    rest = aim - matrix @ x
    inverse = 1 / matrix.diagonal()
    tiny = torch.finfo(matrix.dtype).tiny  # in place of 0, once x is exact
    direction = inverse * rest
    square = (rest * direction).sum()
    for _ in range(steps):
        product = matrix @ direction
        step = square / (direction * product).sum().clamp(min=tiny)
        x = x + step * direction
        rest = rest - step * product
        before, square = square, (rest * inverse * rest).sum()
        direction = inverse * rest + square / before.clamp(min=tiny) * direction
    return x
