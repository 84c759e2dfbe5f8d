"""The recipe ``rd``: as little error as the bits allow.

The file codes a trit with about -log2 of its frequency, so a matrix costs error + price x bits, and
every decision weighs the two (entropy-constrained quantisation). Weights are row scale x trit x
column scale: a scale for each column lets those that matter little get few bits (WaterSIC, arXiv
2603.04956).

1. Three GPTQ passes with a small share of the price find a start.
2. Rounds of descent, the columns in a new order each time, at a price that falls to the full one:
   letting non-zeros come where they help most ends better than taking them away where they do not.

After each pass or round the price of a code is brought up to date and the scales of rows are
refitted by least squares; those of columns after all passes but the first, and after every fourth
round. Least squares leaves weights too short, above all where inputs are rare: see
``_State.measure``, and ``_State._stretch`` at the end. benchmarks/quantize_choices.py measures what
these choices are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.descent import descend
from qmoe_format.quantize.gptq import gptq
from qmoe_format.quantize.hessian import Factored, Statistics, factored, row_energies
from qmoe_format.quantize.refit import refit_columns, refit_rows
from qmoe_format.quantize.rtn import quantize_rtn
from qmoe_format.quantize.ternary import Quantized, TernaryWeights, check_weights, scale_type

PASSES = 3
START_SHARE = 0.3  # of the price, in the passes: what they make zero seldom comes back
ROUNDS = 20
COLUMNS_EVERY = 4  # rounds
FIRST_PRICE = 3.0  # of the rounds, falling to 1 in the first half of them
ABSOLUTE = 0.30  # how far prices are from relative (0) to absolute (1) errors, see Rate
TRUST = 30.0  # factor by which a row's price may differ for that: energies are estimates
LENGTHEN = 8.0  # of D / s^2, see _State.measure
MOST_LENGTHEN = 0.8  # of what a row falls short
MOST_STRETCH = 1.3  # where a row keeps hardly anything, its length would be anything
FIRST_BITS = 2.2  # of a non-zero above a zero, where 70 % are zeros


@dataclass(frozen=True, slots=True)
class Rate:
    """What a bit is worth.

    For a bit, row j of an expert pays at most

        lam E_j (reference / (E_j rho_j))^ABSOLUTE,    E_j = w_j S w_j / columns,

    of its error; rho_j is its importance. That lies, in the logarithm, between two aims: that each
    row gets the same share of its own output wrong (lam E_j), and that a bit is spent wherever it
    matters most (lam reference / rho_j), which would be best if importance was known exactly and
    errors were small.

    Attributes:
        lam: bits fall as it rises. One for all, or ``[experts]``.
        reference: a typical E_j rho_j of the model, which makes lam a number without a unit.
    """

    lam: float | Tensor
    reference: float


def quantize_rd(weights: Tensor, scale_dtype: str, statistics: Statistics, rate: Rate) -> Quantized:
    """Quantise a batch of experts' matrices.

    Args:
        weights: float16, bfloat16, float32 or float64 ``[experts, rows, columns]``.
        scale_dtype: ``BF16``, ``F16`` or ``F32``.
        statistics: of their calibration tokens; without tokens the Hessian is the identity.
        rate: what a bit is worth.

    Returns:
        Trits with one scale for each row and one for each column.

    Raises:
        QMoEError: ``argument``, ``value`` as ``round_to_nearest``.
    """
    check_weights(weights)
    dtype = scale_type(scale_dtype)
    if not weights.numel():
        return quantize_rtn(weights, scale_dtype)
    experts, _, columns = weights.shape
    share = columns / statistics.tokens.clamp(min=1).double()
    damping, later = (0.05 * share).clamp(min=0.1), (0.05 * share).clamp(min=0.015)
    ready = factored(statistics, damping)
    state = _State(weights, ready, _eased(ready, damping, later))
    price = _prices(state, statistics, ready, rate)
    state.scale *= _first_threshold(price, state.energy.mean(1, keepdim=True))
    bits = torch.full((experts, 1), FIRST_BITS, device=weights.device)
    for step in range(PASSES):
        first_price = START_SHARE * price * bits
        state.trits = gptq(
            state.weights, ready.factor, None, state.scale, state.column_scale, first_price
        )
        bits = _code_bits(state.trits)
        state.measure()
        if step:
            state.refit_columns()
    generator = torch.Generator().manual_seed(0)
    for step in range(ROUNDS):
        state.reorder(torch.randperm(columns, generator=generator).to(weights.device))
        raised = 1 + (FIRST_PRICE - 1) * max(0.0, 1 - 2 * (step + 1) / ROUNDS)
        descend(
            state.trits, state.gradient, state.hessian, state.scale, state.column_scale,
            raised * price * bits,
        )  # fmt: skip
        bits = _code_bits(state.trits)
        state.refit_rows()
        if (step + 1) % COLUMNS_EVERY == 0:
            state.refit_columns()
    return Quantized(state.finish(dtype), ready.damping, ready.fallback)


class _State:
    """The matrices of some experts while they are worked on; everything transposed, in float32.

    Attributes:
        largest: float64 ``[experts]``, the largest magnitude of each W.
        weights: W^T over that, ``[experts, columns, rows]``, as the next five.
        exact: H W^T.
        seen: W^T where inputs were: H' (H' + d I)^-1 W^T = W^T - d (H' + d I)^-1 W^T, H' being the
            Hessian without damping and d GPTQ's damping.
        target: H W^T and a little of ``seen``, see ``measure``.
        gradient: target - H Q^T.
        trits: T^T.
        hessian: ``[experts, columns, columns]``.
        energy: E_j, ``[experts, rows]``.
        square: w_j w_j, ``[experts, rows]``.
        scale: ``[experts, rows]``.
        column_scale: ``[experts, columns]``, of geometric mean 1; at first proportional to the
            columns' root mean squares.
        order: int64 ``[columns]``, which of W's columns stands where.
    """

    def __init__(self, weights: Tensor, ready: Factored, hessian: Tensor) -> None:
        largest = weights.abs().amax((1, 2)).double()
        self.largest = torch.where(largest > 0, largest, 1.0)
        scaled = weights.double() / self.largest[:, None, None]
        self.weights = scaled.float().transpose(1, 2).contiguous()
        self.hessian = hessian
        self.exact = _products(hessian, self.weights)
        self.energy = _dots(self.weights, self.exact) / weights.shape[2]
        self.square = _dots(self.weights, self.weights).clamp(min=1e-30)
        damping = [1.0 if d is None else d for d in ready.damping]  # 1: without H nothing was seen
        unseen = _products(ready.factor.mT, _products(ready.factor, self.weights))
        self.seen = self.weights - torch.tensor(damping).to(unseen)[:, None, None] * unseen
        rms = self.weights.square().mean(2).sqrt()
        rms += 1e-3 * rms.amax(1, keepdim=True) + 1e-30
        self.column_scale = rms / rms.log().mean(1, keepdim=True).exp()
        self.scale = (self.weights / self.column_scale[:, :, None]).square().mean(1).sqrt()
        self.trits = torch.zeros_like(self.weights)
        self.target = self.exact
        self.order = torch.arange(self.weights.shape[1], device=hessian.device)

    def reorder(self, order: Tensor) -> None:
        """Put the columns into another order."""
        for name in ("weights", "seen", "exact", "target", "gradient", "trits", "column_scale"):
            setattr(self, name, getattr(self, name).index_select(1, order))
        # Twice as fast as indexing all of them at once.
        hessian = torch.empty_like(self.hessian)
        for before, after in zip(self.hessian, hessian, strict=True):
            torch.index_select(before.index_select(0, order), 1, order, out=after)
        self.hessian = hessian
        self.order = self.order[order]

    def refit_rows(self) -> None:
        """Least-squares scales of rows; the gradient anew, the target as it is."""
        quantized = self._quantized()
        aim = _dots(quantized, self.target)
        ratio = refit_rows(aim - _dots(quantized, self.gradient), aim)
        self.scale = self.scale * ratio
        # target - ratio (target - gradient)
        self.gradient.mul_(ratio[:, None]).addcmul_(self.target, 1 - ratio[:, None])

    def refit_columns(self) -> None:
        """Least-squares scales of columns, then of rows; target and gradient anew."""
        pieces = (self.trits, self.hessian, self.target, self.scale, self.column_scale)
        refitted = [refit_columns(*each) for each in zip(*pieces, strict=True)]
        self.column_scale = torch.stack(refitted)
        self.measure()

    def measure(self) -> None:
        """Target and gradient anew, and least-squares scales of rows for them.

        The least error for its bits makes Q too short (reverse water-filling, Cover and Thomas,
        Elements of Information Theory, 10.3.3): along an eigenvector of H with the eigenvalue h by
        the share D / (h s^2), where D is the error of a column and s^2 the mean square of a weight.
        What a model has learnt about rare inputs lies where h is small; to say less of that hardly
        counts as error, but raises the loss in first order. So the target is H W and k times what
        inputs have ``seen`` of W. k goes with D / s^2, which leaves small errors alone, but not
        beyond the share that w.q falls short of w.w.
        """
        quantized = self._quantized()
        product = _products(self.hessian, quantized)
        own, aim = _dots(quantized, product), _dots(quantized, self.exact)
        error = self.energy * self.weights.shape[1] - 2 * aim + own
        short = 1 - _dots(quantized, self.weights) / self.square
        longer = torch.minimum(LENGTHEN * error / self.square, MOST_LENGTHEN * short).clamp(min=0)
        ratio = refit_rows(own, aim + longer * _dots(quantized, self.seen))
        self.scale = self.scale * ratio
        self.target = self.exact + longer[:, None] * self.seen
        self.gradient = self.target - product.mul_(ratio[:, None])

    def _quantized(self) -> Tensor:
        return self.trits * self.scale[:, None] * self.column_scale[:, :, None]

    def _stretch(self) -> None:
        """Scale row j so that q.Hw = w.Hw.

        Least squares alone has q.Hw = q.Hq = (1 - e) w.Hw, if e is the row's relative error: its
        output is too small by that share, and what the layers after it compute from several such
        outputs is too small by more. To set it right adds only about e^2 to the error.
        """
        aim = self.energy * self.weights.shape[1]
        found = (self.weights * (self.target - self.gradient)).sum(1)
        ratio = aim / torch.where(found > 0, found, aim)
        self.scale *= torch.nan_to_num(ratio, nan=1.0).clamp(1 / MOST_STRETCH, MOST_STRETCH)

    def finish(self, dtype: torch.dtype) -> TernaryWeights:
        """Round the column scales, refit the rows to them, round those."""
        self.reorder(self.order.argsort())
        self.column_scale = self.column_scale.to(dtype).float()
        self.measure()
        self._stretch()
        used = self.trits.any(1) & (self.scale > 0)
        scale = (torch.where(used, self.scale, 0.0).double() * self.largest[:, None]).to(dtype)
        columns = self.column_scale.amax(1, keepdim=True)
        bad = ~torch.isfinite(scale.float() * columns.clamp(min=1.0))
        if bad.any():
            expert, row = bad.nonzero()[0].tolist()
            raise QMoEError(
                "value",
                f"expert {expert}, row {row}: the weights, up to "
                f"{float(self.largest[expert]):g}, are beyond what scales of {dtype} can hold; "
                "rescale the model",
            )
        alive = (scale > 0)[:, None] & (self.column_scale > 0)[:, :, None]
        trits = torch.where(alive, self.trits, 0.0).transpose(1, 2).to(torch.int8)
        return TernaryWeights(
            trits.contiguous(), scale[:, :, None, None], self.column_scale.to(dtype)
        )


def _eased(ready: Factored, damping: Tensor, later: Tensor) -> Tensor:
    """The Hessians with less damping: GPTQ, which cannot take a decision back, needs more of it."""
    hessian = ready.hessian.clone()
    for expert, used in enumerate(ready.damping):
        if used == float(damping[expert]):
            hessian[expert].diagonal().sub_(float(damping[expert] - later[expert]))
    return hessian


def _prices(state: _State, statistics: Statistics, ready: Factored, rate: Rate) -> Tensor:
    """What a bit costs each row, in units of the state's Hessian and weights."""
    energy = state.energy.double().cpu()
    # E_j of Rate, in its own units.
    own = energy * (ready.unit * state.largest.square().cpu())[:, None]
    relative = (rate.reference / (own * statistics.importance()).clamp(min=1e-300)) ** ABSOLUTE
    # A share that is far off the others' is not believed.
    lam = torch.as_tensor(rate.lam, dtype=torch.float64).view(-1, 1)
    share = lam * relative.clamp(1 / TRUST, TRUST)
    # Without a Hessian there is no E_j, and no column makes good what another got wrong, so errors
    # are several times as large: about as many bits are left if a bit's price is, too.
    blind = torch.tensor([why is not None for why in ready.fallback])
    share = torch.where(blind[:, None], (0.5 * (lam / 0.05) ** 0.3).clamp(max=0.8), share)
    return (share * energy).to(state.energy)


def weighted_energies(weights: Tensor, statistics: Statistics) -> Tensor:
    """E_j rho_j of ``Rate``, float64 ``[experts, rows]``.

    Args:
        weights: ``[experts, rows, columns]``.
    """
    energies = torch.stack(
        [row_energies(w, s) for w, s in zip(weights, statistics.sums, strict=True)]
    ).cpu()
    return energies * statistics.importance()


def _first_threshold(price: Tensor, energy: Tensor) -> Tensor:
    """Scale over root mean square to begin with: a smaller one leaves fewer zeros."""
    relative = (price / energy.clamp(min=1e-30)).clamp(1e-9, 1.0)
    return (2.2 + 0.8 * torch.log10(relative / 0.05)).clamp(1.0, 2.2)


def _code_bits(trits: Tensor) -> Tensor:
    """Bits that a non-zero costs more than a zero: log2(p0 / p1) + 1 for its sign.

    ``[experts, 1]``, from trits ``[experts, columns, rows]``.
    """
    size = trits[0].numel()
    nonzero = trits.count_nonzero(dim=(1, 2)).double()
    return (torch.log2((size - nonzero + 0.5) / (nonzero + 0.5)) + 1).clamp(min=0).float()[:, None]


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Dot product of each row of two of the state's matrices: ``[experts, rows]``."""
    return torch.stack([(a * b).sum(0) for a, b in zip(one, other, strict=True)])


def _products(hessian: Tensor, matrices: Tensor) -> Tensor:
    """Each expert's product by itself: batched ones may depend on the batch."""
    return torch.stack([h @ m for h, m in zip(hessian, matrices, strict=True)])
