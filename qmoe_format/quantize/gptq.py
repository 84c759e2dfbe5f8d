"""GPTQ for ternary matrices, batched over experts.

Column after column is rounded for all rows of all experts at once, and what a column got wrong is
made good by the columns to come (GPTQ, arXiv 2210.17323, algorithm 1; QMoE, arXiv 2310.16795,
section 3.2, for the batching). Weights are held transposed, ``[experts, columns, rows]``, so that a
column is contiguous.

The columns are halved again and again: what the left half got wrong reaches the right half by one
matrix product, so nearly all work is done by large products whatever the shape.

Every elementwise operation rounds once and each expert has its matrix products for itself, so an
expert's result does not depend on which others are in the batch; on processors where the order of a
product's sums depends on how its matrices lie in memory (MKL on AMD's), if all experts lie alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

GROUP = 16  # parts of at most this many columns are not halved further


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
        return value / 2 + price[:, None] * (d * d / 2) / value

    def one_by_one(part: slice) -> None:
        x, wrong, d = rest[:, part], errors[:, part], spread[:, part, None]
        factors = factor[:, part, part, None]
        scales = torch.ones_like(d) if column_scale is None else column_scale[:, part, None]
        up = high[:, None] * scales
        down = up if low is None else -low[:, None] * scales
        top = threshold(up, d)
        bottom = -(top if low is None else threshold(down, d))
        for i, trit in enumerate(trits[:, part].unbind(1)):
            torch.gt(x[:, i], top[:, i], out=trit)
            minus = torch.lt(x[:, i], bottom[:, i], out=torch.empty_like(trit))
            if low is None:
                rounded = trit.sub_(minus) * up[:, i]
            else:
                rounded = trit * up[:, i] - minus * down[:, i]
                trit -= minus
            torch.div(x[:, i] - rounded, d[:, i], out=wrong[:, i])
            x[:, i + 1 :].sub_(factors[:, i, i + 1 :] * wrong[:, i, None])

    def carry(left: slice, right: slice) -> None:
        for expert, u in enumerate(factor):
            rest[expert, right].addmm_(u[left, right].T, errors[expert, left], alpha=-1)

    for part, other in by_halves(0, weights.shape[1], GROUP):
        if other is None:
            one_by_one(part)
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
