"""Block coordinate descent on error plus rate.

GPTQ decides each column once, knowing nothing of the columns to come. Descent goes over the columns
again, a group at a time, while all others stay as they are. With G = H (W - Q)^T a group B of
columns has its least error at the real values

    x = q_B + H_BB^-1 G_B,

which are rounded one after the other as in GPTQ, with the group's own Hessian. A row takes the new
trits only if they lower error + price x non-zeros, so the sum never rises, and what moved is taken
off G. Groups of one column would be ordinary coordinate descent; those of some columns also find
moves that pay only together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.quantize.gptq import GROUP, by_halves, gptq
from qmoe_format.quantize.hessian import inverse_factor


def descend(
    trits: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    price: Tensor,
) -> None:
    """One sweep over the columns; changes ``trits`` and ``gradient``.

    Args:
        trits: float ``[experts, columns, rows]``.
        gradient: H (W - Q)^T, ``[experts, columns, rows]``.
        hessian: H, ``[experts, columns, columns]``.
        scale: ``[experts, rows]``, the value of trit 1 before its column's scale.
        column_scale: ``[experts, columns]``.
        price: ``[experts, rows]``, what a non-zero costs more than a zero, in units of the error.
    """
    moves = torch.empty_like(trits)
    experts, columns, _ = trits.shape
    factors = _group_factors(hessian)

    def columns_of(groups: slice) -> slice:
        return slice(groups.start * GROUP, min(groups.stop * GROUP, columns))

    for part, other in by_halves(0, len(factors), 1):
        group = columns_of(part)
        if other is None:
            moves[:, group] = _move(
                trits[:, group],
                gradient[:, group],
                hessian[:, group, group],
                factors[part.start],
                scale,
                column_scale[:, group],
                price,
            )
        # What moved here is taken off G here or there.
        target = group if other is None else columns_of(other)
        for expert in range(experts):
            gradient[expert, target].addmm_(
                hessian[expert, target, group], moves[expert, group], alpha=-1
            )


def _group_factors(hessian: Tensor) -> list[Tensor]:
    """``inverse_factor`` of each group's Hessian, ``[experts, group, group]`` each."""
    experts, columns, _ = hessian.shape
    whole = columns // GROUP
    factors: list[Tensor] = []
    if whole:
        square = hessian[:, : whole * GROUP, : whole * GROUP]
        blocks = square.reshape(experts, whole, GROUP, whole, GROUP)
        diagonal = blocks.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
        factors += inverse_factor(diagonal).unbind(0)
    if columns > whole * GROUP:
        factors.append(inverse_factor(hessian[:, whole * GROUP :, whole * GROUP :]))
    return factors


def _move(
    trits: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    factor: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    price: Tensor,
) -> Tensor:
    """Set the trits of one group, ``[experts, group, rows]``; returns how far its values moved."""
    value = scale[:, None] * column_scale[:, :, None]
    now = trits * value
    pairs = zip(factor, gradient, strict=True)
    best = now + torch.stack([u.T @ (u @ g) for u, g in pairs])
    new = gptq(best, factor, None, scale, column_scale, price)
    move = new * value - now
    curved = torch.stack([h @ m for h, m in zip(hessian, move, strict=True)])
    error = (move * (curved - 2 * gradient)).sum(1)
    nonzeros = (new.abs() - trits.abs()).sum(1)
    better = (error + price * nonzeros < 0)[:, None]
    trits.copy_(torch.where(better, new, trits))
    return torch.where(better, move, 0.0)
