"""GPTQ for ternary matrices, batched over experts.

Column after column is rounded for all rows of all experts at once, and what a column got wrong is
made good by the columns to come (GPTQ, arXiv 2210.17323, algorithm 1; QMoE, arXiv 2310.16795,
section 3.2, for the batching). Weights are held transposed, ``[experts, columns, rows]``, so that a
column is contiguous.

Every elementwise operation rounds once and each expert has its matrix products for itself, so an
expert's result does not depend on which others are in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def choose(
    x: Tensor, low: Tensor, high: Tensor, minus: Tensor, plus: Tensor
) -> tuple[Tensor, Tensor]:
    """The best of low, 0 and high for each x, by squared distance and the price of its code.

        cost(0) = x^2      cost(-) = (x - low)^2 + minus      cost(+) = (x - high)^2 + plus

    The price of a zero is taken off those of the others; a tie goes to 0. With prices of 0 the
    thresholds are low / 2 and high / 2. All of ``x``'s shape or broadcast to it.

    Returns:
        The trits as ``x``'s type, and their values.
    """
    up = high * (high - 2 * x) + plus
    down = low * (low - 2 * x) + minus
    is_up = (up < 0) & (up <= down)
    is_down = (down < 0) & ~is_up
    value = torch.where(is_up, high, torch.where(is_down, low, 0.0))
    return is_up.to(x.dtype) - is_down.to(x.dtype), value


def gptq(
    weights: Tensor,
    factor: Tensor,
    low: Tensor,
    high: Tensor,
    column_scale: Tensor | None = None,
    price: Tensor | None = None,
) -> Tensor:
    """Trits of a batch of matrices on a given grid, by one pass over the columns.

    Args:
        weights: float ``[experts, columns, rows]``; left as they are.
        factor: the same type, ``[experts, columns, columns]``: ``inverse_factor`` of each Hessian.
        low, high: ``[experts, rows]``, the values of trits -1 and +1, low <= 0 <= high.
        column_scale: ``[experts, columns]`` that multiplies them, or None.
        price: ``[experts, rows]``, what a non-zero costs more than a zero, in units of the error
            tr((W-Q) H (W-Q)^T); or None.

    Returns:
        Trits, the weights' type, ``[experts, columns, rows]``.
    """
    rest = weights.clone()
    trits = torch.empty_like(weights)
    experts, columns, rows = weights.shape
    errors = weights.new_empty((experts, min(BLOCK, columns), rows))
    spread = factor.diagonal(dim1=1, dim2=2)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = rest[:, start:end]
        for i in range(end - start):
            column = start + i
            scale = 1.0 if column_scale is None else column_scale[:, column, None]
            d = spread[:, column, None]
            extra = torch.zeros_like(d) if price is None else price * (d * d)
            x = block[:, i]
            trits[:, column], value = choose(x, low * scale, high * scale, extra, extra)
            errors[:, i] = (x - value) / d
            block[:, i + 1 :] -= factor[:, column, column + 1 : end, None] * errors[:, i, None]
        for expert in range(experts if end < columns else 0):
            rest[expert, end:].addmm_(
                factor[expert, start:end, end:].T, errors[expert, : end - start], alpha=-1
            )
    return trits
