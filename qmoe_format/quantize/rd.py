"""The recipe ``rd``: the least error for the bits.

The file codes a level in about -log2 of its frequency, so that a matrix costs error + price x bits,
and every decision weighs one against the other (entropy-constrained quantization). Weights are row
scale x level x column scale: scales of columns let those that matter little get few bits (WaterSIC,
arXiv 2603.04956).

1. A GPTQ pass at a fraction of the price finds a start.
2. Rounds of descent follow, at a price that falls to the full one: adding non-zeros where they help
   most ends better than removing them where they help least.

Each pass or round updates the price of a non-zero. The scales of rows are refitted by least squares
after each of the first rounds, and later every few rounds, together with those of some columns: a
quarter of them at first, then an eighth. Now and then the columns change places, so that others
come into one block.

A product with the Hessian takes most of the time: two for the problem, half of one for a pass,
one for its gradient, and a share of one whenever columns are refitted. A round changes too few
levels to need one. benchmarks/quantize_choices.py measures what these choices are worth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.descent import descend
from qmoe_format.quantize.gptq import by_halves
from qmoe_format.quantize.grids import FORBIDDEN, Prices
from qmoe_format.quantize.hessian import Factored, Statistics, factored
from qmoe_format.quantize.level_weights import Quantized, check_weights
from qmoe_format.quantize.padding import BLOCK, padded_columns, padded_rows, padded_square
from qmoe_format.quantize.rate import Rate, level_prices, row_prices
from qmoe_format.quantize.rtn import quantize_rtn
from qmoe_format.quantize.solution import Problem, Solution, finished
from qmoe_format.quantize.steps import steps_on

_FIRST_BITS = 2.2  # of a non-zero over a zero, where 70 % are zeros
_FURTHER_BITS = 3.0  # of each further level, where an eighth of the non-zeros goes on
_STEP = 4.0  # between levels, in roots of the price of a bit; 2.9 would be best for many levels
_FINEST = 40.0  # steps between 0 and 3 times the root mean square, so that 127 reach any weight
_LEAST_COLUMNS = 64  # that are refitted: in small matrices each of them matters
_TERNARY_ZEROS = 0.9  # with more zeros than that, three levels are as good as any number


@dataclass(frozen=True, slots=True)
class Search:
    """How long and how the recipe searches.

    Attributes:
        passes: of GPTQ, at least 1.
        start_price: in the passes, relative to the full price: what becomes 0 there seldom returns.
        rounds: of descent.
        first_price: in the first round, relative to the full one; falls to 1 in half of them.
        columns_every: number of rounds after which to refit scales of columns.
        first_columns: share of the columns whose scales are refitted before the first round.
        columns: share of them later.
        refit_rows: share of the rounds after each of which the scales of rows are refitted; later
            only with those of columns.
        reorder_every: number of rounds after which to put the columns into another order.
        lengthen: how much to lengthen weights where inputs are rare, see ``Solution``.
        damping: of Hessians in the descent, at least, relative to their mean diagonal: the share of
            the plain error of weights in what is minimized.
    """

    passes: int = 1
    start_price: float = 0.3
    rounds: int = 40
    first_price: float = 3.0
    columns_every: int = 5
    first_columns: float = 1 / 4
    columns: float = 1 / 8
    refit_rows: float = 1 / 4
    reorder_every: int = 10
    lengthen: float = 8.0
    damping: float = 0.004


EFFORTS = {
    "low": Search(rounds=20),
    "medium": Search(),
    "high": Search(rounds=160, columns_every=10),
}


def quantize_rd(
    weights: Tensor,
    statistics: Statistics,
    rate: Rate,
    levels: int | None = None,
    effort: str = "medium",
    search: Search | None = None,
) -> Quantized:
    """See ``Recipe.quantize``. There is one scale per row and one per column.

    Args:
        levels: 3 for ternary matrices; by default as many as pay.
        effort: ``low``, ``medium`` or ``high``; the more rounds, the less error at equal bits.
        search: in place of that of ``effort``.
    """
    check_weights(weights)
    if levels not in (None, 3):
        raise QMoEError("argument", f"{levels} levels", "ask for 3, or leave it open")
    if effort not in EFFORTS:
        raise QMoEError("argument", f"effort {effort!r}", f"choose {', '.join(EFFORTS)}")
    if not weights.numel():
        return quantize_rtn(weights)
    search = search or EFFORTS[effort]
    rows, columns = weights.shape[1:]
    share = columns / statistics.tokens.clamp(min=1).double()
    damping, later = (0.05 * share).clamp(min=0.1), (0.05 * share).clamp(min=search.damping)
    ready = factored(statistics, damping)
    hessian = padded_square(_eased(ready, damping, later))
    ready = replace(ready, hessian=hessian, factor=padded_square(ready.factor))
    problem = Problem.of(weights, ready, hessian, search.lengthen)
    unit = ready.unit * problem.largest.square().cpu()
    importance = statistics.importance()
    if importance.shape[1] > 1:
        importance = padded_rows(importance)
    price = row_prices(rate, problem.energy, unit, importance, ready.fallback)
    ternary = torch.full((len(weights),), levels == 3, device=weights.device)
    solution = _start(problem, ready.factor, price, ternary, search)
    used, fallback = ready.damping, ready.fallback
    del ready, hessian  # matrices that are no longer needed
    nonzeros, total = _counts(solution.levels)
    ternary |= nonzeros < (1 - _TERNARY_ZEROS) * rows * columns
    generator = torch.Generator().manual_seed(0)
    for step in range(search.rounds):
        if step % search.columns_every == 0:
            refitted = columns * (search.columns if step else search.first_columns)
            solution.refit_columns(problem, min(columns, max(_LEAST_COLUMNS, int(refitted))))
        if step % search.reorder_every == 0:
            width = problem.hessian.shape[1]
            order = torch.randperm(width, generator=generator)
            order = order.to(weights.device, non_blocking=True)
            problem.reorder(order)
            solution.reorder(order)
        raised = 1 + (search.first_price - 1) * max(0.0, 1 - 2 * (step + 1) / search.rounds)
        prices = level_prices(nonzeros, total, rows * columns, raised * price, ternary)
        refitting = step < search.rounds * search.refit_rows
        more, higher = descend(problem, solution, prices, ternary, generator, refitting)
        nonzeros, total = nonzeros + more, total + higher
    return Quantized(finished(problem, solution), used, fallback)


def _eased(ready: Factored, damping: Tensor, later: Tensor) -> Tensor:
    """The Hessians with less damping: GPTQ, which cannot revise a decision, needs more of it."""
    hessian = ready.hessian.clone()
    for expert, used in enumerate(ready.damping):
        if used == float(damping[expert]):
            hessian[expert].diagonal().sub_(float(damping[expert] - later[expert]))
    return hessian


def _start(
    problem: Problem, factor: Tensor, price: Tensor, ternary: Tensor, search: Search
) -> Solution:
    """The GPTQ passes."""
    height, width = problem.shape
    scale, columns = _first_scales(problem, factor, price, ternary)
    price = search.start_price * price
    further = torch.where(ternary[:, None], FORBIDDEN, price * _FURTHER_BITS)
    prices = Prices(price * _FIRST_BITS, further)
    for _ in range(search.passes):
        levels = _gptq(problem.weights, factor, scale, columns, prices, ternary)
        prices = level_prices(*_counts(levels), height * width, price, ternary)
        solution = Solution(problem, levels, scale, columns)
        scale, columns = solution.scale, solution.column_scale
    return solution


def _gptq(
    weights: Tensor,
    factor: Tensor,
    scale: Tensor,
    column_scale: Tensor,
    prices: Prices,
    ternary: Tensor,
) -> Tensor:
    """See ``gptq.gptq``; here a column lies across the rows, and a kernel rounds a block of them.

    Returns:
        int8 ``[experts, rows, columns]``.
    """
    rest, errors = weights.clone(), torch.empty_like(weights)
    levels = torch.empty(weights.shape, dtype=torch.int8, device=weights.device)
    steps = steps_on(weights.device)
    for part, other in by_halves(0, weights.shape[2] // BLOCK, 1):
        own = slice(part.start * BLOCK, part.stop * BLOCK)
        if other is None:
            steps.round_block(
                rest, factor, levels, errors, own.start, scale, column_scale, prices, ternary
            )
        elif part.start < other.start:
            right = slice(other.start * BLOCK, other.stop * BLOCK)
            for expert, u in enumerate(factor):
                rest[expert, :, right].addmm_(errors[expert, :, own], u[own, right], alpha=-1)
    return levels


def _counts(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each expert the number of non-zeros and the sum of magnitudes, float64 ``[experts]``."""
    return levels.count_nonzero((1, 2)).double(), levels.abs().sum((1, 2)).double()


def _first_scales(
    problem: Problem, factor: Tensor, price: Tensor, ternary: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales of rows and columns to begin with.

    Where many levels pay, the best distance of two is a multiple of U_ii sqrt(price), whatever the
    weights are (WaterSIC, arXiv 2603.04956, section 3). Where hardly any do, level 1 should be
    worth what the largest weights are, 2 to 3 times the root mean square: a limit. Scales of rows
    and columns are fitted to a soft minimum of the two,

        limit / (1 + x^4)^(1/4),    x = limit / step.
    """
    height, width = problem.shape
    weights, price = problem.weights[:, :height, :width], price[:, :height]
    rms = weights.square().mean(1).sqrt()
    rms += 1e-3 * rms.amax(1, keepdim=True) + 1e-30
    columns = rms / rms.log().mean(1, keepdim=True).exp()  # of geometric mean 1
    scale = (weights / columns[:, None]).square().mean(2).sqrt()
    # The smaller the scale relative to the root mean square, the fewer zeros.
    energy = problem.energy[:, :height].mean(1, keepdim=True).clamp(min=1e-30)
    relative = (price / energy).clamp(1e-9, 1.0)
    most = torch.where(ternary, 2.2, 3.0).to(scale)[:, None]
    scale = scale * torch.minimum((most + 0.8 * torch.log10(relative / 0.05)).clamp(min=1.0), most)
    steps = (_STEP * price.sqrt()).clamp(min=1e-30)
    across = torch.where(ternary[:, None], 0.0, scale / steps)
    down = columns / factor.diagonal(dim1=1, dim2=2)[:, :width]
    soft = (across[:, :, None] * down[:, None]).clamp_(max=_FINEST).pow_(4).log1p_().mul_(-0.25)
    mean = columns.log() + soft.mean(1)
    mean -= mean.mean(1, keepdim=True)
    rows = scale.clamp(min=1e-30).log() + soft.mean(2)
    return padded_rows(rows.exp()), padded_columns(mean.exp())
