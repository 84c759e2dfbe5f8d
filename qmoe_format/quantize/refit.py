"""Least-squares scales for given levels.

With Q = diag(r) T diag(c), the error tr((W-Q) H (W-Q)^T) is quadratic in r for fixed c, and in c
for fixed r. Both are solved with a small ridge toward the current values, and a scale that would
change by an implausible factor keeps its value.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_RIDGE = 1e-4
COLUMN_RIDGE = 1e-3
MAX_SHARE = 1.5  # of steps that are best one by one


def refit_rows(own: Tensor, aim: Tensor) -> Tensor:
    """Factors for the row scales that minimize the error: q.WH / q.QH, but for the ridge.

    Args:
        own: q.QH of each row, ``[experts, rows]``.
        aim: q.WH, or with another target in place of WH, the same shape.
    """
    ridge = ROW_RIDGE * (own + own.mean(1, keepdim=True))
    ratio = (aim + ridge) / (own + ridge)
    return torch.where((ratio > 0.05) & (ratio < 20), ratio, 1.0)


def column_steps(
    aim: Tensor, own: Tensor, column_scale: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The changes of column scales that are each best while all others stay.

    Of the columns, only those that gain most: an eighth of them has most of what there is to gain,
    and each costs a product with its row of H.

    Args:
        aim: A_i . G_i, with A = diag(r) T, ``[columns]``.
        own: A_i . A_i H_ii, the same shape.
        column_scale: the current ones, the same shape.
        most: the number of columns that may change.

    Returns:
        The columns, int64, and their changes, the same shape.
    """
    step = aim / (own + COLUMN_RIDGE * (own + 0.1 * own.mean()) + torch.finfo(own.dtype).tiny)
    ratio = 1 + MAX_SHARE * step / column_scale
    step = torch.where((ratio > 0.1) & (ratio < 10), step, 0.0)
    columns = (step * aim).topk(most).indices
    return columns, step[columns]


def best_share(steps: Tensor, aim: Tensor, curved: Tensor) -> Tensor:
    """How far to go when steps that are best one by one go together, float32.

    Args:
        steps, aim: of the columns that change, see ``column_steps``.
        curved: tr(M H M^T), with M the change of Q, float64.
    """
    gained = steps.double() @ aim.double()
    return torch.where(curved > 0, gained / curved, 0.0).clamp(0, MAX_SHARE).float()
