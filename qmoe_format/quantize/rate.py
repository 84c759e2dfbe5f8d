"""What a bit is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.quantize.grids import FORBIDDEN, Prices
from qmoe_format.quantize.hessian import Statistics, row_energies

ABSOLUTE = 0.60  # where prices lie between relative (0) and absolute (1) errors, see Rate
TRUST = 30.0  # the factor by which that may change a row's price: energies are estimates


@dataclass(frozen=True, slots=True)
class Rate:
    """What a bit is worth.

    Row j of an expert accepts at most this much error to save a bit:

        lam E_j (reference / (E_j rho_j))^ABSOLUTE,    E_j = w_j S w_j / columns,

    where rho_j is its importance. On a logarithmic scale, this lies between two goals: the same
    relative error for the outputs of all rows (lam E_j), and bits wherever they matter most
    (lam reference / rho_j), which would be best if importances were exact and errors small.

    Attributes:
        lam: the larger, the fewer bits. One for all experts, or ``[experts]``.
        reference: a typical E_j rho_j of the model, which makes lam dimensionless.
    """

    lam: float | Tensor
    reference: float

    def times(self, factor: float) -> Rate:
        """With a lambda that is larger by a factor."""
        return Rate(self.lam * factor, self.reference)


def row_prices(
    rate: Rate,
    energy: Tensor,
    unit: Tensor,
    importance: Tensor,
    fallback: Sequence[str | None],
) -> Tensor:
    """The price of a bit in each row, in the units of ``energy``, ``[experts, rows]``.

    Args:
        rate: what a bit is worth.
        energy: E_j / unit, float32 ``[experts, rows]``.
        unit: float64 ``[experts]``, on the CPU.
        importance: rho_j, float64 ``[experts, rows or 1]``.
        fallback: why an expert has no Hessian, or None.
    """
    relative = energy.double().cpu()
    own = relative * unit[:, None]
    factor = (rate.reference / (own * importance).clamp(min=1e-300)) ** ABSOLUTE
    lam = torch.as_tensor(rate.lam, dtype=torch.float64).view(-1, 1)
    share = lam * factor.clamp(1 / TRUST, TRUST)
    # Without a Hessian E_j is unknown, and errors are several times as large, because no column
    # compensates for another: a price raised as much leaves about the same number of bits.
    missing = torch.tensor([why is not None for why in fallback])
    share = torch.where(missing[:, None], (0.5 * (lam / 0.05) ** 0.3).clamp(max=0.8), share)
    return (share * relative).to(energy)


def weighted_energies(weights: Tensor, statistics: Statistics) -> Tensor:
    """E_j rho_j of ``Rate``, float64 ``[experts, rows]``; weights as in ``Recipe.quantize``."""
    pairs = zip(weights, statistics.sums, strict=True)
    energies = torch.stack([row_energies(w, s) for w, s in pairs]).cpu()
    return energies * statistics.importance()


def level_prices(
    nonzeros: Tensor, total: Tensor, size: int, price: Tensor, ternary: Tensor
) -> Prices:
    """What levels cost by the code lengths that these levels give (SPEC.md section 7).

    The mask codes 0 and not 0 in -log2 of their shares, and a non-zero has a sign. Unless levels
    are ternary, the refinement has a 1 for each step up and a 0 at the end.

    Args:
        nonzeros: their number, float64 ``[experts]``.
        total: the sum of the magnitudes of levels, the same shape.
        size: the number of levels of an expert.
        price: of a bit, in units of the error, ``[experts, rows]``.
        ternary: bool ``[experts]``.
    """
    ups = total - nonzeros
    share = (ups + 0.5) / (ups + nonzeros + 1)
    end = torch.where(ternary, 0.0, -torch.log2(1 - share))
    first = torch.log2((size - nonzeros + 0.5) / (nonzeros + 0.5)) + 1 + end
    first, further = (b.clamp(min=0).float()[:, None] for b in (first, -torch.log2(share)))
    return Prices(price * first, torch.where(ternary[:, None], FORBIDDEN, price * further))
