"""Block coordinate descent on error plus rate.

GPTQ decides each column once, knowing nothing of the columns to come. Descent goes over the columns
again, a few at a time, while all others stay as they are. With G = H (W - Q)^T a block B of columns
has its least error at the real values

    x = q_B + H_BB^-1 G_B,

which are rounded one after the other as in GPTQ, with the block's own Hessian. A row takes the new
trits only if they lower error + price x non-zeros, so the sum never rises, and what moved is taken
off G. Blocks of one column would be ordinary coordinate descent; those of some columns also find
moves that pay only together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.quantize.gptq import BLOCK, gptq
from qmoe_format.quantize.hessian import inverse_factor

GROUP = 16


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
    experts, columns, _ = trits.shape
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        local = gradient[:, start:end].clone()
        moves = torch.empty_like(local)
        for first in range(start, end, GROUP):
            group = slice(first, min(first + GROUP, end))
            inner = slice(group.start - start, group.stop - start)
            moves[:, inner] = _best_moves(
                trits[:, group],
                local[:, inner],
                hessian[:, group, group],
                scale,
                column_scale[:, group],
                price,
            )
            for expert in range(experts):
                local[expert, inner.stop :].addmm_(
                    hessian[expert, group.stop : end, group], moves[expert, inner], alpha=-1
                )
        for expert in range(experts):
            gradient[expert].addmm_(hessian[expert, :, start:end], moves[expert], alpha=-1)


def _best_moves(
    trits: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    price: Tensor,
) -> Tensor:
    """Set the trits of one block, ``[experts, group, rows]``; returns how far its values moved."""
    value = scale[:, None] * column_scale[:, :, None]
    now = trits * value
    factor = torch.stack([inverse_factor(each) for each in hessian])
    best = now + torch.stack([u.T @ (u @ g) for u, g in zip(factor, gradient, strict=True)])
    new = gptq(best, factor, -scale, scale, column_scale, price)
    move = new * value - now
    curved = torch.stack([h @ m for h, m in zip(hessian, move, strict=True)])
    error = (move * (curved - 2 * gradient)).sum(1)
    nonzeros = (new.abs() - trits.abs()).sum(1)
    better = error + price * nonzeros < 0
    trits.copy_(torch.where(better[:, None], new, trits))
    return move * better[:, None]
