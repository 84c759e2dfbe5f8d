"""Least-squares scales for given trits.

With Q = diag(r) T diag(c) the error tr((W-Q) H (W-Q)^T) is quadratic in r for given c and in c for
given r. Both are solved with a little ridge towards the present values, and a scale that would
leave a sane range keeps its old value.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_RIDGE = 1e-4
COLUMN_RIDGE = 1e-3
STEPS = 8  # of conjugate gradients


def refit_rows(own: Tensor, aim: Tensor) -> Tensor:
    """By what to multiply row scales to minimise the error: q.WH / q.QH, with a little ridge.

    Args:
        own: q.QH of each row, ``[experts, rows]``.
        aim: q.WH, or with what stands for WH, the same shape.
    """
    ridge = ROW_RIDGE * (own + own.mean(1, keepdim=True))
    ratio = (aim + ridge) / (own + ridge)
    return torch.where((ratio > 0.05) & (ratio < 20), ratio, 1.0)


def refit_columns(
    trits: Tensor, hessian: Tensor, target: Tensor, scale: Tensor, column_scale: Tensor
) -> Tensor:
    """Column scales of one expert that minimise the error.

    With A = diag(r) T, the error's normal equations are ((A^T A) o H) c = v, v_i = A_i . (WH)_i.
    Their diagonal is large, so a few steps of conjugate gradients with it as preconditioner, from
    the present scales on, are as good as a solution, and much faster.

    Args:
        trits: ``[columns, rows]``.
        hessian: ``[columns, columns]``.
        target: H W^T, or what stands for it, ``[columns, rows]``.
        scale: ``[rows]``.
        column_scale: ``[columns]``, the present ones.

    Returns:
        ``[columns]``, the type of ``column_scale``.
    """
    a = trits * scale
    normal = (a @ a.T).mul_(hessian)
    aim = (a * target).sum(1)
    diagonal = normal.diagonal()
    ridge = COLUMN_RIDGE * (diagonal + 0.1 * diagonal.mean())
    diagonal += ridge
    aim += ridge * column_scale
    new = _conjugate_gradients(normal, aim, column_scale)
    ratio = new / column_scale
    new = torch.where((ratio > 0.1) & (ratio < 10), new, column_scale)

    def error(c: Tensor) -> Tensor:
        return (c * (normal @ c - 2 * aim)).sum(dtype=torch.float64)

    return torch.where(error(new) < error(column_scale), new, column_scale)


def _conjugate_gradients(matrix: Tensor, aim: Tensor, start: Tensor) -> Tensor:
    """x with ``matrix @ x`` near ``aim``, for a positive definite matrix."""
    x = start
    rest = aim - matrix @ x
    inverse = 1 / matrix.diagonal()
    tiny = torch.finfo(matrix.dtype).tiny  # where nothing is left to be done
    direction = inverse * rest
    square = (rest * direction).sum()
    for _ in range(STEPS):
        product = matrix @ direction
        step = square / (direction * product).sum().clamp(min=tiny)
        x = x + step * direction
        rest = rest - step * product
        before, square = square, (rest * inverse * rest).sum()
        direction = inverse * rest + square / before.clamp(min=tiny) * direction
    return x
