"""GPTQ on any grid of values, batched over experts.

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

from qmoe_format.quantize.grids import Grid

GROUP = 16  # columns


def gptq(weights: Tensor, factor: Tensor, grid: Grid, group: int = GROUP) -> Tensor:
    """Levels of a batch of matrices on a given grid, float ``[experts, columns, rows]``.

    Args:
        weights: float ``[experts, columns, rows]``; not changed.
        factor: U, ``inverse_factor`` of each Hessian, ``[experts, columns, columns]``.
        grid: how a column is rounded.
        group: number of columns that are not halved further; affects rounding errors only.
    """
    rest = weights.clone()
    levels = torch.empty_like(weights)
    errors = torch.empty_like(weights)
    spread = factor.diagonal(dim1=1, dim2=2)

    def round_columns(part: slice) -> None:
        x, error, d = rest[:, part], errors[:, part], spread[:, part, None]
        factors = factor[:, part, part, None]
        rounded = grid.rounding(part, d)
        for i, level in enumerate(levels[:, part].unbind(1)):
            torch.div(x[:, i] - rounded(i, x[:, i], level), d[:, i], out=error[:, i])
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
