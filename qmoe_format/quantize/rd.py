"""The recipe ``rd``: the least error for the bits.

The file codes a level in about -log2 of its frequency, so that a matrix costs error + price x bits,
and every decision weighs one against the other (entropy-constrained quantization). Weights are row
scale x level x column scale: scales of columns let those that matter little get few bits (WaterSIC,
arXiv 2603.04956).

1. GPTQ passes at a fraction of the price find a start.
2. Rounds of descent follow, each with the columns in a new random order, at a price that falls to
   the full one: adding non-zeros where they help most ends better than removing them where they
   help least.

Each pass or round updates the price of a non-zero and refits the scales of rows by least squares;
those of columns are refitted after all passes but the first, and after every few rounds.
benchmarks/quantize_choices.py measures what these choices are worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.descent import Descent, gptq_pass
from qmoe_format.quantize.grids import FORBIDDEN, Prices
from qmoe_format.quantize.hessian import Factored, Statistics, factored
from qmoe_format.quantize.level_weights import Quantized, check_weights
from qmoe_format.quantize.rate import Rate, level_prices, row_prices
from qmoe_format.quantize.rtn import quantize_rtn
from qmoe_format.quantize.solution import Problem, Solution, finished, padded
from qmoe_format.quantize.refit import Normal
from torch.nn.functional import pad

_FIRST_BITS = 2.2  # of a non-zero over a zero, where 70 % are zeros
_FURTHER_BITS = 3.0  # of each further level, where an eighth of the non-zeros goes on
_STEP = 4.0  # between levels, in roots of the price of a bit; 2.9 would be best for many levels
_FINEST = 40.0  # steps between 0 and 3 times the root mean square, so that 127 reach any weight
_TERNARY_ZEROS = 0.9  # with more zeros than that, three levels are as good as any number


@dataclass(frozen=True, slots=True)
class Search:
    """How long and how the recipe searches.

    Attributes:
        passes: of GPTQ, at least 1.
        start_price: in the passes, relative to the full price: what becomes 0 there seldom returns.
        rounds: of descent.
        first_price: in the first round, relative to the full one; falls to 1 in half of them.
        columns_every: number of rounds after which to refit the scales of columns.
        group: number of columns that descent decides together.
        lengthen: how much to lengthen weights where inputs are rare, see ``Solution.fit``.
        damping: of Hessians in the descent, at least, relative to their mean diagonal: the share of
            the plain error of weights in what is minimized.
    """

    passes: int = 3
    start_price: float = 0.3
    rounds: int = 20
    first_price: float = 3.0
    columns_every: int = 4
    group: int = 16
    lengthen: float = 8.0
    damping: float = 0.004


def quantize_rd(
    weights: Tensor,
    statistics: Statistics,
    rate: Rate,
    levels: int | None = None,
    search: Search = Search(),
) -> Quantized:
    """See ``Recipe.quantize``. There is one scale per row and one per column.

    Args:
        levels: 3 for ternary matrices; by default as many as pay.
    """
    check_weights(weights)
    if levels not in (None, 3):
        raise QMoEError("argument", f"{levels} levels", "ask for 3, or leave it open")
    if not weights.numel():
        return quantize_rtn(weights)
    rows, columns = weights.shape[1:]
    share = columns / statistics.tokens.clamp(min=1).double()
    damping, later = (0.05 * share).clamp(min=0.1), (0.05 * share).clamp(min=search.damping)
    ready = factored(statistics, damping)
    extra = -columns % 64
    hessian = padded(_eased(ready, damping, later), (extra, extra))
    ready.factor = padded(ready.factor, (extra, extra))
    for h, u in zip(hessian, ready.factor):
        if extra:
            h.diagonal()[columns:] = 1
            u.diagonal()[columns:] = 1
    problem = Problem.of(weights, ready, hessian, search.lengthen)
    unit = ready.unit * problem.largest.square().cpu()
    importance = statistics.importance()
    if importance.shape[1] > 1:
        importance = pad(importance, (0, -rows % 16), value=1.0)
    price = row_prices(rate, problem.energy, unit, importance, ready.fallback)
    ternary = torch.full((len(weights),), levels == 3, device=weights.device)
    size = rows * columns
    solution = _start(problem, ready.factor, price, ternary, search, size)
    zeros = 1 - solution.levels.count_nonzero(dim=(1, 2)) / size
    ternary |= zeros > _TERNARY_ZEROS
    used, fallback = ready.damping, ready.fallback
    del ready  # two Hessians that are no longer needed
    descent = Descent(*problem.weights.shape[1:])
    normals = solution.normals
    nonzeros, total = level_counts(solution.levels)
    for step in range(search.rounds):
        raised = 1 + (search.first_price - 1) * max(0.0, 1 - 2 * (step + 1) / search.rounds)
        prices = level_prices(nonzeros, total, size, raised * price, ternary)
        sums = descent.round(solution, problem.hessian, prices, ternary)
        aim, rest, nonzeros, total = sums[:, :, 0], sums[:, :, 1], sums[:, :, 2].sum(1), sums[:, :, 3].sum(1)
        solution.refit_rows(aim.float(), rest.float())
        if (step + 1) % search.columns_every == 0:
            solution.refit_columns(problem, normals)
    return Quantized(finished(problem, solution), used, fallback)


def _eased(ready: Factored, damping: Tensor, later: Tensor) -> Tensor:
    """The Hessians with less damping: GPTQ, which cannot revise a decision, needs more of it."""
    hessian = ready.hessian.clone()
    for expert, used in enumerate(ready.damping):
        if used == float(damping[expert]):
            hessian[expert].diagonal().sub_(float(damping[expert] - later[expert]))
    return hessian


def _start(
    problem: Problem, factor: Tensor, price: Tensor, ternary: Tensor, search: Search, size: int
) -> Solution:
    """The GPTQ passes."""
    scale, columns = _first_scales(problem, factor, price, ternary)
    price = search.start_price * price
    further = torch.where(ternary[:, None], FORBIDDEN, price * _FURTHER_BITS)
    prices = Prices(price * _FIRST_BITS, further)
    normals = [Normal() for _ in scale]
    for step in range(search.passes):
        levels = gptq_pass(problem, factor, scale, columns, prices, ternary.tolist())
        prices = level_prices(*level_counts(levels), size, price, ternary)
        solution = Solution(problem, levels, scale, columns)
        if step:
            for each in normals: each.matrix=None
            solution.refit_columns(problem, normals)
        scale, columns = solution.scale, solution.column_scale
    solution.normals = normals
    return solution


def level_counts(levels: Tensor):
    return levels.count_nonzero(dim=(1, 2)).double(), levels.abs().sum((1, 2)).double()


def _first_scales(
    problem: Problem, factor: Tensor, price: Tensor, ternary: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales of rows and columns to begin with.

    Where many levels pay, the best distance of two is a multiple of U_ii sqrt(price), whatever the
    weights are (WaterSIC, arXiv 2603.04956, section 3). Where hardly any do, level 1 should be
    worth what the largest weights are, 2 to 3 times the root mean square. A soft minimum of the two
    is fitted by scales of rows and columns.
    """
    rms = problem.weights.square().sum(1).div(problem.shape[0]).sqrt()
    rms += 1e-3 * rms.amax(1, keepdim=True) + 1e-30
    columns = rms / rms.log().mean(1, keepdim=True).exp()  # of geometric mean 1
    scale = (problem.weights / columns[:, None]).square().sum(2).div(problem.shape[1]).sqrt()
    # The smaller the scale relative to the root mean square, the fewer zeros.
    relative = (price / problem.energy.mean(1, keepdim=True).clamp(min=1e-30)).clamp(1e-9, 1.0)
    most = torch.where(ternary, 2.2, 3.0).to(scale)[:, None]
    scale = scale * torch.minimum((most + 0.8 * torch.log10(relative / 0.05)).clamp(min=1.0), most)
    spread = factor.diagonal(dim1=1, dim2=2)
    limit = (scale[:, :, None] * columns[:, None]).clamp(min=1e-30).log()
    step = (_STEP * price.sqrt()[:, :, None] * spread[:, None]).clamp(min=1e-30).log()
    step = torch.maximum(step, limit - math.log(_FINEST))
    step = torch.where(ternary[:, None, None], torch.inf, step)
    both = -torch.logaddexp(-4 * step, -4 * limit) / 4
    both = both[:, : problem.shape[0], : problem.shape[1]]
    mean = both.mean(1)
    mean = mean - mean.mean(1, keepdim=True)
    extra = -problem.shape[1] % 64, -problem.shape[0] % 16
    return pad((both - mean[:, None]).mean(2).exp(), (0, extra[1]), value=1.0), pad(mean.exp(), (0, extra[0]), value=1.0)
