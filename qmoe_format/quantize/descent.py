"""Block coordinate descent on error plus rate.

GPTQ decides each column once, before it knows those that follow. Descent revisits the columns, a
group at a time, with all others fixed. With G = H (W - Q)^T, the error of a group B of columns is
least at the real values

    x = q_B + H_BB^-1 G_B,

which are rounded one after the other as in GPTQ, with the group's own Hessian. A row accepts its
new levels only if they lower error + price, so that the sum never rises; G is then
updated. Groups of one column would be ordinary coordinate descent; larger ones also find moves that
only pay off together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.quantize.gptq import GROUP, by_halves, gptq
from qmoe_format.quantize.grids import Multiples, Prices
from qmoe_format.quantize.hessian import inverse_factor


def descend(
    levels: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    prices: Prices,
    group: int = GROUP,
) -> None:
    """Sweep over the columns once, changing ``levels`` and ``gradient`` in place.

    Args:
        levels: float ``[experts, columns, rows]``.
        gradient: G, ``[experts, columns, rows]``.
        hessian: H, ``[experts, columns, columns]``.
        scale: the value of level 1 before its column's scale, ``[experts, rows]``.
        column_scale: ``[experts, columns]``.
        prices: of levels.
        group: number of columns that are decided together.
    """
    moves = torch.empty_like(levels)
    experts, columns, _ = levels.shape
    factors = _group_factors(hessian, group)

    def columns_of(groups: slice) -> slice:
        return slice(groups.start * group, min(groups.stop * group, columns))

    for part, other in by_halves(0, len(factors), 1):
        own = columns_of(part)
        if other is None:
            moves[:, own] = _move(
                levels[:, own],
                gradient[:, own],
                hessian[:, own, own],
                factors[part.start],
                Multiples(scale, column_scale[:, own], prices),
            )
        target = own if other is None else columns_of(other)
        for expert in range(experts):
            gradient[expert, target].addmm_(
                hessian[expert, target, own], moves[expert, own], alpha=-1
            )


def _group_factors(hessian: Tensor, group: int) -> list[Tensor]:
    """``inverse_factor`` of each group's Hessian, ``[experts, group, group]`` each."""
    experts, columns, _ = hessian.shape
    whole = columns // group
    factors: list[Tensor] = []
    if whole:
        square = hessian[:, : whole * group, : whole * group]
        blocks = square.reshape(experts, whole, group, whole, group)
        diagonal = blocks.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
        factors += inverse_factor(diagonal).unbind(0)
    if columns > whole * group:
        factors.append(inverse_factor(hessian[:, whole * group :, whole * group :]))
    return factors


def _move(
    levels: Tensor, gradient: Tensor, hessian: Tensor, factor: Tensor, grid: Multiples
) -> Tensor:
    """Set the levels of one group, ``[experts, group, rows]``; return the change of its values."""
    value = grid.scale[:, None] * grid.column_scale[:, :, None]
    now = levels * value
    pairs = zip(factor, gradient, strict=True)
    best = now + torch.stack([u.T @ (u @ g) for u, g in pairs])
    new = gptq(best, factor, grid)
    move = new * value - now
    curved = torch.stack([h @ m for h, m in zip(hessian, move, strict=True)])
    error = (move * (curved - 2 * gradient)).sum(1)
    better = (error + grid.prices.of(new) - grid.prices.of(levels) < 0)[:, None]
    levels.copy_(torch.where(better, new, levels))
    return torch.where(better, move, 0.0)
