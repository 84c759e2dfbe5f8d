"""GPTQ for ternary matrices, batched over experts.

Columns are rounded one after the other, for all rows of all experts at once, and later columns
compensate for the error of each (GPTQ, arXiv 2210.17323, algorithm 1; batching: QMoE, arXiv
2310.16795, section 3.2). Weights are transposed, ``[experts, columns, rows]``, so that a column is
contiguous.

The columns are halved recursively. The errors of a left half reach its right half in one matrix
product, so nearly all the work is in large products, whatever the shape.

Every elementwise operation rounds once, and each expert has matrix products of its own, so that an
expert's result does not depend on the rest of the batch. Where the summation order of a product
depends on the alignment of its matrices (MKL on AMD processors), this takes experts that are all
aligned alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

GROUP = 16  # columns


def gptq(
    weights: Tensor,
    factor: Tensor,
    low: Tensor | None,
    high: Tensor,
    column_scale: Tensor | None = None,
    price: Tensor | None = None,
    group: int = GROUP,
) -> Tensor:
    """Levels of a batch of matrices on a given grid, float ``[experts, columns, rows]``.

    With x the weight plus the errors it compensates for, v = high and h = 1 / U_ii^2, a level of +1
    costs h (x - v)^2 + price and one of 0 costs h x^2. So it is +1 where

        x > v / 2 + price / (2 h v),

    and, with low in place of high, -1 where x is as far below 0. Ties go to 0.

    Args:
        weights: float ``[experts, columns, rows]``; not changed.
        factor: U, ``inverse_factor`` of each Hessian, ``[experts, columns, columns]``.
        low: values of level -1, <= 0, ``[experts, rows]``; None for -high.
        high: values of level +1, >= 0, ``[experts, rows]``.
        column_scale: multiplies low and high, ``[experts, columns]``; or None.
        price: of a non-zero over a zero, ``[experts, rows]``, in units of the error
            tr((W-Q) H (W-Q)^T); or None.
        group: number of columns that are not halved further; affects rounding errors only.
    """
    rest = weights.clone()
    levels = torch.empty_like(weights)
    errors = torch.empty_like(weights)
    spread = factor.diagonal(dim1=1, dim2=2)

    def threshold(value: Tensor, d: Tensor) -> Tensor:
        if price is None:
            return torch.where(value == 0, torch.inf, value / 2)
        # Where the value is 0, this is infinite or NaN, and no x is greater.
        return value / 2 + price[:, None] * (d * d / 2) / value

    def round_columns(part: slice) -> None:
        x, error, d = rest[:, part], errors[:, part], spread[:, part, None]
        factors = factor[:, part, part, None]
        scales = torch.ones_like(d) if column_scale is None else column_scale[:, part, None]
        up = high[:, None] * scales
        down = up if low is None else -low[:, None] * scales
        top = threshold(up, d)
        bottom = -(top if low is None else threshold(down, d))
        for i, level in enumerate(levels[:, part].unbind(1)):
            torch.gt(x[:, i], top[:, i], out=level)
            minus = torch.lt(x[:, i], bottom[:, i], out=torch.empty_like(level))
            if low is None:
                rounded = level.sub_(minus) * up[:, i]
            else:
                rounded = level * up[:, i] - minus * down[:, i]
                level -= minus
            torch.div(x[:, i] - rounded, d[:, i], out=error[:, i])
            x[:, i + 1 :].sub_(factors[:, i, i + 1 :] * error[:, i, None])

    for part, other in by_halves(0, weights.shape[1], group):
        if other is None:
            round_columns(part)
        elif part.start < other.start:
            for expert, u in enumerate(factor):
                rest[expert, other].addmm_(u[part, other].T, errors[expert, part], alpha=-1)
    return levels


def by_halves(start: int, end: int, most: int) -> Iterator[tuple[slice, slice | None]]:
    """The steps of a pass from ``start`` to ``end`` that connects halves by matrix products.

    Written as a generator because a nested function that calls itself would be a reference cycle,
    which keeps its tensors alive until the garbage collector runs.

    Yields:
        ``(part, None)``: decide a part of at most ``most``. ``(left, right)`` after the left half
        and ``(right, left)`` after the right one: pass the decisions of the first on to the second.
    """
    if end - start <= most:
        yield slice(start, end), None
        return
    middle = (start + end) // 2
    left, right = slice(start, middle), slice(middle, end)
    yield from by_halves(start, middle, most)
    yield left, right
    yield from by_halves(middle, end, most)
    yield right, left
