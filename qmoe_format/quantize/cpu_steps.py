"""The inner steps of the recipe ``rd`` on a CPU: kernels on rows, divided among torch's threads.

``gpu_steps`` has the same functions. Tensors are contiguous, rows a multiple of ``LANES`` and
columns of ``BLOCK``. With E_j the error of a row j, prices are in its units; see ``Multiples``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qmoe_format.codec.threads import in_parts
from qmoe_format.quantize.grids import Prices
from qmoe_format.quantize.kernels import fit, gptq_block, sweep
from qmoe_format.quantize.padding import LANES
from qmoe_format.quantize.refit import best_share, column_steps

_LEAST_ROWS = 256  # that are worth a thread


def round_block(
    rest: Tensor,
    factor: Tensor,
    levels: Tensor,
    errors: Tensor,
    block: int,
    scale: Tensor,
    column_scale: Tensor,
    prices: Prices,
    ternary: Tensor,
) -> None:
    """GPTQ within a block of columns: set its ``levels`` and ``errors``.

    Args:
        rest: what is to be rounded, float32 ``[experts, rows, columns]``.
        factor: U, ``[experts, columns, columns]``.
        levels: int8 ``[experts, rows, columns]``.
        errors: over U_ii, float32 ``[experts, rows, columns]``.
        block: the first column.
        scale, column_scale, prices: see ``Multiples``.
        ternary: whether levels end at 1, bool ``[experts]``.
    """
    _by_rows(
        gptq_block.gptq_block, block, rest, factor, levels, errors, scale, column_scale,
        prices.first, prices.further, ternary,
    )  # fmt: skip


def group_factors(hessian: Tensor, groups: Tensor) -> Tensor:
    """``inverse_factor`` of the Hessian of each group of columns.

    Args:
        hessian: H, ``[experts, columns, columns]``.
        groups: the columns of each, int64 ``[groups, GROUP]``.

    Returns:
        ``[experts, groups, GROUP, GROUP]``.
    """
    factors = torch.empty(len(hessian), *groups.shape, groups.shape[1])
    _by_rows(fit.group_factors, groups.numpy(), factors, hessian)
    return factors


def descend(
    levels: Tensor,
    gradient: Tensor,
    target: Tensor,
    ratio: Tensor | None,
    hessian: Tensor,
    factors: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    prices: Prices,
    ternary: Tensor,
    order: Tensor,
    members: Tensor,
    summing: bool,
) -> Tensor:
    """A round of descent: change ``levels`` and ``gradient``; see ``kernels.sweep.sweep``.

    Args:
        ratio: None if it is 1.
        summing: whether q.target and q.gradient are wanted.

    Returns:
        Of each row q.target, q.gradient, and how much the number of non-zeros and the sum of the
        magnitudes of levels have changed, float64 ``[experts, rows, 4]``.
    """
    experts, rows, columns = levels.shape
    sums = torch.empty(experts, rows, 4, dtype=torch.float64)
    # Of one expert at a time. Only what is written takes memory.
    moves = np.empty((rows, columns), np.int32)
    sizes = np.empty((rows, columns), np.float32)
    marks, counts = np.empty((len(order), rows), np.int32), np.empty(rows, np.int32)
    turns = (
        order.numpy(), members.numpy(), moves, sizes, counts, marks, ratio is not None, summing
    )  # fmt: skip
    ratio = scale if ratio is None else ratio
    _by_rows(
        sweep.sweep, turns, levels, gradient, target, ratio, hessian, factors, scale, column_scale,
        prices.first, prices.further, ternary, sums,
    )  # fmt: skip
    return sums


def row_sums(
    levels: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    target: Tensor,
    gradient: Tensor,
    exact: Tensor,
    seen: Tensor,
    weights: Tensor,
) -> Tensor:
    """Dot products of each row q with target - gradient, ``exact``, ``seen`` and ``weights``.

    Returns:
        float64 ``[experts, rows, 4]``.
    """
    sums = torch.empty(*scale.shape, 4, dtype=torch.float64)
    _by_rows(
        fit.row_sums, 0, levels, scale, column_scale, target, gradient, exact, seen, weights, sums
    )
    return sums


def aim_at(
    exact: Tensor, seen: Tensor, longer: Tensor, ratio: Tensor, target: Tensor, gradient: Tensor
) -> None:
    """Multiply target - gradient by ``ratio``, and make the target ``exact`` + longer ``seen``."""
    _by_rows(fit.aim_at, 0, exact, seen, longer, ratio, target, gradient)


def refit_columns(
    levels: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    target: Tensor,
    gradient: Tensor,
    ratio: Tensor,
    hessian: Tensor,
    most: int,
) -> None:
    """Change ``gradient`` and ``column_scale``; see ``Solution.refit_columns``."""
    experts, rows, width = levels.shape
    sums = torch.empty(experts, -(-rows // fit.CHUNK), 2, width)
    _by_rows(fit.column_sums, 0, levels, scale, target, gradient, ratio, sums, unit=fit.CHUNK)
    for expert in range(experts):
        aim, square = sums[expert].sum(0)
        own = square * hessian[expert].diagonal()
        columns, steps = column_steps(aim, own, column_scale[expert], most)
        at, one = columns.numpy(), slice(expert, expert + 1)
        move, curved = torch.empty(1, rows, len(columns)), torch.empty(1, rows, dtype=torch.float64)
        _by_rows(fit.moves, at, levels[one], scale[one], steps[None], move)
        change = move @ hessian[expert].index_select(0, columns)
        _by_rows(fit.moved_sums, at, move, change, curved)
        share = best_share(steps, aim[columns], curved.sum())
        gradient[expert].sub_(change[0], alpha=float(share))
        column_scale[expert].index_add_(0, columns, steps * share)


def take_columns(matrices: Tensor, order: Tensor) -> Tensor:
    """``matrices[:, :, order]``."""
    result = torch.empty_like(matrices)
    _by_rows(fit.take_columns, order.numpy(), matrices, result)
    return result


def take_both(squares: Tensor, order: Tensor) -> Tensor:
    """``squares[:, order][:, :, order]``."""
    result = torch.empty_like(squares)
    _by_rows(fit.take_both, order.numpy(), squares, result)
    return result


def _by_rows(
    kernel: Callable[..., object], shared: object, *arrays: Tensor, unit: int = LANES
) -> None:
    """Call a kernel with what is shared, with each expert's part of arrays, and with rows.

    Each thread gets whole units of rows.
    """
    rows = arrays[0].shape[1]
    threads = min(torch.get_num_threads(), max(1, rows // _LEAST_ROWS))
    assert all(each.is_contiguous() for each in arrays)
    for parts in zip(*(each.numpy() for each in arrays), strict=True):

        def work(first: int, last: int, parts: tuple[object, ...] = parts) -> None:
            kernel(shared, *parts, first * unit, min(last * unit, rows))

        in_parts(-(-rows // unit), threads, work)
