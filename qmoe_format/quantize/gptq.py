"""GPTQ for ternary matrices, batched over experts.

Column after column is rounded for all rows of all experts at once, and what a column got wrong is
made good by the columns to come (GPTQ, arXiv 2210.17323, algorithm 1; QMoE, arXiv 2310.16795,
section 3.2, for the batching). Weights are held transposed, ``[experts, columns, rows]``, so that a
column is contiguous.

The columns are halved again and again: what the left half got wrong reaches the right half by one
matrix product, so nearly all work is done by large products whatever the shape.

Every elementwise operation rounds once and each expert has its matrix products for itself, so an
expert's result does not depend on which others are in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

GROUP = 16  # so many columns are not halved any more


def gptq(
    weights: Tensor,
    factor: Tensor,
    low: Tensor | None,
    high: Tensor,
    column_scale: Tensor | None = None,
    price: Tensor | None = None,
) -> Tensor:
    """Trits of a batch of matrices on a given grid, by one pass over the columns.

    With x the weight and what it has to make good, v = high and h = 1 / U_ii^2, a trit of +1 costs
    h (x - v)^2 + price and one of 0 costs h x^2. So it is +1 where

        x > v / 2 + price / (2 h v),

    and -1 where x is as far below 0, with low in place of high; a tie goes to 0.

    Args:
        weights: float ``[experts, columns, rows]``; left as they are.
        factor: U, the same type, ``[experts, columns, columns]``: ``inverse_factor`` of each
            Hessian.
        low, high: ``[experts, rows]``, the values of trits -1 and +1, low <= 0 <= high; low None
            means -high.
        column_scale: ``[experts, columns]`` that multiplies them, or None.
        price: ``[experts, rows]``, what a non-zero costs more than a zero, in units of the error
            tr((W-Q) H (W-Q)^T); or None.

    Returns:
        Trits, the weights' type, ``[experts, columns, rows]``.
    """
    rest = weights.clone()
    trits = torch.empty_like(weights)
    errors = torch.empty_like(weights)
    spread = factor.diagonal(dim1=1, dim2=2)

    def threshold(value: Tensor, d: Tensor) -> Tensor:
        if price is None:
            return torch.where(value == 0, torch.inf, value / 2)
        # Where the value is 0 this is infinite, or NaN, which nothing is greater than.
        return value / 2 + (price * (d * d / 2)) / value

    def one_by_one(start: int, end: int) -> None:
        for i in range(start, end):
            x, d = rest[:, i], spread[:, i, None]
            value = high if column_scale is None else high * column_scale[:, i, None]
            top = threshold(value, d)
            trit = trits[:, i]
            torch.gt(x, top, out=trit)
            if low is None:
                trit -= torch.lt(x, -top, out=torch.empty_like(trit))
                rounded = trit * value
            else:
                below = low if column_scale is None else low * column_scale[:, i, None]
                is_low = torch.lt(x, -threshold(-below, d), out=torch.empty_like(trit))
                rounded = trit * value + is_low * below
                trit -= is_low
            torch.div(x - rounded, d, out=errors[:, i])
            rest[:, i + 1 : end] -= factor[:, i, i + 1 : end, None] * errors[:, i, None]

    def carry(left: slice, right: slice) -> None:
        for expert, u in enumerate(factor):
            rest[expert, right].addmm_(u[left, right].T, errors[expert, left], alpha=-1)

    for part, other in by_halves(0, weights.shape[1], GROUP):
        if other is None:
            one_by_one(part.start, part.stop)
        elif part.start < other.start:
            carry(part, other)
    return trits


def by_halves(start: int, end: int, most: int) -> Iterator[tuple[slice, slice | None]]:
    """The steps of a pass from ``start`` to ``end`` in which products join halves.

    (part, None): decide a part, of at most ``most``. (left, right), as soon as the left half is
    decided, and (right, left), as soon as the right one is: tell the one what the other decided.

    A generator rather than a function within its user that calls itself: such a function is a
    reference cycle, which keeps all that it works with until the garbage collector comes by.
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
