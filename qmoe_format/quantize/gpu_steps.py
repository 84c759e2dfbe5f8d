"""The inner steps of the recipe ``rd`` on a GPU: CUDA kernels, and products between them.

``cpu_steps`` has the same functions. On a GPU a level that moves costs more than a product with
many that do not, so a round of descent is one product with the Hessian, divided by halves as GPTQ
is: a kernel decides a block of 64 columns, in which a thread has a row, and what changed reaches
the other columns in products that are as large as can be. Where they are small, another kernel
does them for all experts at once.

Nothing here waits for the GPU. Products follow torch's setting for TF32.

No GPU has run this yet: the kernels were checked in a simulator (``tests/gpu/shim``) and compiled,
and the rest ran on a CPU in their company. ``gpu/NOTES.md`` says why it is as it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe_format.gpu.arrays import Library
from qmoe_format.gpu.kernel_text import source
from qmoe_format.gpu.launch import Kernel, Launch, execute
from qmoe_format.quantize.gptq import by_halves
from qmoe_format.quantize.grids import MOST, SKIPPED, Prices
from qmoe_format.quantize.hessian import inverse_factor
from qmoe_format.quantize.padding import BLOCK, GROUP
from qmoe_format.quantize.refit import best_share, column_steps

ROWS = 64  # of a block
THREADS = {"gptq_block": ROWS, "sweep": ROWS, "pass_on": 256}
_SMALL = 2  # blocks of columns whose moves a kernel passes on, not products


@cache
def kernel(name: str) -> Kernel:
    """One of ``kernels/*.cu``."""
    text = source(
        *("types", "quantize/rounding", f"quantize/{name}"),
        THREADS=THREADS[name],
        ROWS=ROWS,
        BLOCK=BLOCK,
        GROUP=GROUP,
        MOST=MOST,
        SKIPPED=SKIPPED,
    )
    return Kernel(name, text, THREADS[name])


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
    """See ``cpu_steps.round_block``."""
    _launch(
        "gptq_block", rest, factor, levels, errors, scale, column_scale,
        prices.first, prices.further, ternary.view(torch.uint8), places=(block,),
    )  # fmt: skip


def group_factors(hessian: Tensor, groups: Tensor) -> Tensor:
    """See ``cpu_steps.group_factors``. ``groups`` is on the CPU."""
    there = groups.to(hessian.device, non_blocking=True)
    return inverse_factor(hessian[:, there[:, :, None], there[:, None]], check=False)


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
    """See ``cpu_steps.descend``. ``order`` and ``members`` are on the CPU."""
    # In the order of their turns, columns that are decided together are neighbors.
    places = (order[:, None] + members).flatten().to(levels.device, non_blocking=True)
    square = take_both(hessian, places)
    turned, rest = take_columns(levels, places), take_columns(gradient, places)
    sizes = column_scale.index_select(1, places)
    aim = take_columns(target, places) if summing or ratio is not None else rest
    if ratio is not None:
        torch.lerp(aim, rest, ratio[:, :, None], out=rest)
    moves = torch.empty_like(rest)
    limits = ternary.view(torch.uint8)
    for part, other in by_halves(0, len(order), 1):
        own = slice(part.start * BLOCK, part.stop * BLOCK)
        if other is None:
            _launch(
                "sweep", turned, rest, square, factors, scale, sizes,
                prices.first, prices.further, limits, moves, places=(own.start,),
            )  # fmt: skip
        elif part.stop - part.start <= _SMALL:
            at = (own.start, own.stop - own.start, other.start * BLOCK)
            _launch("pass_on", moves, rest, square, places=at, tiles=other.stop - other.start)
        else:
            there = slice(other.start * BLOCK, other.stop * BLOCK)
            # One product per expert: the result of a batched one may depend on the batch.
            for expert, h in enumerate(square):
                rest[expert, :, there].addmm_(moves[expert, :, own], h[own, there], alpha=-1)
    sums = torch.zeros(*scale.shape, 4, dtype=torch.float64, device=scale.device)
    if summing:
        q = torch.mul(turned, scale[:, :, None], out=moves).mul_(sizes[:, None])
        sums[:, :, 0], sums[:, :, 1] = _dots(q, aim), _dots(q, rest)
    sums[:, :, 2] = turned.count_nonzero(2) - levels.count_nonzero(2)
    sums[:, :, 3] = turned.abs().sum(2) - levels.abs().sum(2)
    levels.index_copy_(2, places, turned)
    gradient.index_copy_(2, places, rest)
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
    """See ``cpu_steps.row_sums``."""
    q = (levels * scale[:, :, None]).mul_(column_scale[:, None])
    others = (target - gradient, exact, seen, weights)
    return torch.stack([_dots(q, other) for other in others], 2)


def aim_at(
    exact: Tensor, seen: Tensor, longer: Tensor, ratio: Tensor, target: Tensor, gradient: Tensor
) -> None:
    """See ``cpu_steps.aim_at``."""
    gradient.sub_(target).mul_(ratio[:, :, None])
    torch.addcmul(exact, seen, longer[:, :, None], out=target)
    gradient.add_(target)


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
    """See ``cpu_steps.refit_columns``."""
    torch.lerp(target, gradient, ratio[:, :, None], out=gradient)
    parts = zip(levels, scale, column_scale, gradient, hessian, strict=True)
    for own, size, columns, rest, square in parts:
        a = own * size[:, None]
        aim = (a * rest).sum(0)
        changing, steps = column_steps(aim, a.square().sum(0) * square.diagonal(), columns, most)
        move = a.index_select(1, changing).mul_(steps)
        change = move @ square.index_select(0, changing)
        curved = (move * change.index_select(1, changing)).sum(dtype=torch.float64)
        share = best_share(steps, aim[changing], curved)
        rest.sub_(change.mul_(share))
        columns.index_add_(0, changing, steps * share)


def take_columns(matrices: Tensor, order: Tensor) -> Tensor:
    """``matrices[:, :, order]``."""
    return matrices.index_select(2, order)


def take_both(squares: Tensor, order: Tensor) -> Tensor:
    """``squares[:, order][:, :, order]``."""
    return squares[:, order[:, None], order]


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Dot products of rows, float64 ``[experts, rows]``."""
    return (one * other).sum(2, dtype=torch.float64)


def _launch(
    name: str, first: Tensor, *others: Tensor, places: tuple[int, ...], tiles: int = 1
) -> None:
    """Enqueue a kernel on torch's stream.

    Args:
        name: of the kernel.
        first, others: the arrays; ``first`` has all rows and columns.
        places: the arguments after the numbers of rows and columns.
        tiles: of columns, to which blocks belong.
    """
    assert all(each.is_contiguous() for each in (first, *others))
    experts, rows, columns = first.shape
    arguments: tuple[Any, ...] = (first, *others, *map(np.int32, (rows, columns, *places)))
    blocks = (-(-rows // ROWS), experts, tiles)
    _run(Launch(kernel(name), blocks, arguments), first.device)


def _run(launch: Launch, device: torch.device) -> None:
    execute([launch], device.index, Library(device.index, torch).stream())
