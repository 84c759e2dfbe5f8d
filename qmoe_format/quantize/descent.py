"""Block coordinate descent on error plus rate.

GPTQ decides each column once, before it knows those that follow. Descent revisits the columns, a
group of 16 at a time, with all others fixed. With G = (W - Q) H, the error of a group B of columns
is least at the real values

    x = q_B + G_B H_BB^-1,

which are rounded one after the other as in GPTQ, with the group's own Hessian. A row accepts its
new levels only if they lower error + price, so that the sum never rises; G is then updated. Groups
of one column would be ordinary coordinate descent; larger ones also find moves that only pay off
together, and if each round has other groups, more of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.quantize.grids import Prices
from qmoe_format.quantize.padding import BLOCK, GROUP
from qmoe_format.quantize.solution import Problem, Solution
from qmoe_format.quantize.steps import steps_on


def descend(
    problem: Problem,
    solution: Solution,
    prices: Prices,
    ternary: Tensor,
    generator: torch.Generator,
    refitting: bool,
) -> tuple[Tensor, Tensor]:
    """A round: every column once, in random groups of its block, in a random order of blocks.

    Args:
        prices: of levels.
        ternary: whether levels end at 1, bool ``[experts]``.
        generator: of the groups and the order; all experts have the same.
        refitting: whether to refit the scales of rows afterward.

    Returns:
        How much the number of non-zeros and the sum of the magnitudes of all levels have changed,
        float64 ``[experts]``.
    """
    steps = steps_on(problem.hessian.device)
    blocks = problem.hessian.shape[1] // BLOCK
    order = torch.randperm(blocks, generator=generator) * BLOCK
    members = torch.rand(blocks, BLOCK, generator=generator).argsort(1)
    factors = steps.group_factors(problem.hessian, (order[:, None] + members).view(-1, GROUP))
    sums = steps.descend(
        solution.levels, solution.gradient, solution.target, solution.ratio, problem.hessian,
        factors, solution.scale, solution.column_scale, prices, ternary, order, members, refitting,
    )  # fmt: skip
    solution.ratio = None
    if refitting:
        solution.refit_rows(*sums[:, :, :2].float().unbind(2))
    nonzeros, total = sums[:, :, 2:].sum(1).unbind(1)
    return nonzeros, total
