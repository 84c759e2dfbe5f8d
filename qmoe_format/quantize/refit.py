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


def refit_rows(quantized: Tensor, gradient: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Row scales that minimise the error; a product with H is not needed.

    For row j, q = r_j a:  r_j <- r_j (q.WH + e) / (q.QH + e),  QH = WH - G.

    Args:
        quantized: Q^T, ``[experts, columns, rows]``.
        gradient: H (W - Q)^T, the same shape.
        target: H W^T, the same shape.
        scale: ``[experts, rows]``.

    Returns:
        The new scales, ``[experts, rows]``; ``gradient`` is brought up to date.
    """
    product = target - gradient
    own = (quantized * product).sum(1)
    aim = (quantized * target).sum(1)
    ridge = ROW_RIDGE * (own + own.mean(1, keepdim=True))
    ratio = (aim + ridge) / (own + ridge)
    ratio = torch.where((ratio > 0.05) & (ratio < 20), ratio, 1.0)
    torch.sub(target, product.mul_(ratio[:, None]), out=gradient)
    return scale * ratio


def refit_columns(
    trits: Tensor, hessian: Tensor, target: Tensor, scale: Tensor, column_scale: Tensor
) -> Tensor:
    """Column scales of one expert that minimise the error.

    With A = diag(r) T, the error's normal equations are ((A^T A) o H) c = v, v_i = A_i . (WH)_i.

    Args:
        trits: ``[columns, rows]``.
        hessian: ``[columns, columns]``.
        target: H W^T, ``[columns, rows]``.
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
    # float32 is enough: the ridge is far above its rounding.
    ridged = normal.clone()
    ridged.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    new = torch.cholesky_solve((aim + ridge * column_scale)[:, None], factor)[:, 0]
    ratio = new / column_scale
    new = torch.where((ratio > 0.1) & (ratio < 10), new, column_scale)

    def error(c: Tensor) -> Tensor:
        return (c * (normal @ c - 2 * aim)).sum(dtype=torch.float64)

    better = (failed == 0) & (error(new) < error(column_scale))
    return torch.where(better, new, column_scale)
