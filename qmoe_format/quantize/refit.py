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


def refit_columns(
    levels: Tensor,
    hessian: Tensor,
    target: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    steps: int = 8,
) -> Tensor:
    """Column scales of one expert that minimize the error, ``[columns]``.

    With A = diag(r) T, the normal equations are ((A^T A) o H) c = v, v_i = A_i . (WH)_i. Their
    diagonal is large, so that a few steps of conjugate gradients from the current scales, with the
    diagonal as preconditioner, are as good as an exact solution and much faster.

    Args:
        levels: ``[columns, rows]``.
        hessian: ``[columns, columns]``.
        target: H W^T, or another target in its place, ``[columns, rows]``.
        scale: ``[rows]``.
        column_scale: the current ones, ``[columns]``.
        steps: of conjugate gradients.
    """
    a = levels * scale
    normal = (a @ a.T).mul_(hessian)
    aim = (a * target).sum(1)
    diagonal = normal.diagonal()
    ridge = COLUMN_RIDGE * (diagonal + 0.1 * diagonal.mean())
    diagonal += ridge
    aim += ridge * column_scale
    new = _conjugate_gradients(normal, aim, column_scale, steps)
    ratio = new / column_scale
    new = torch.where((ratio > 0.1) & (ratio < 10), new, column_scale)

    def error(c: Tensor) -> Tensor:
        return (c * (normal @ c - 2 * aim)).sum(dtype=torch.float64)

    return torch.where(error(new) < error(column_scale), new, column_scale)


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
