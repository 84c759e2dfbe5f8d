"""The values that weights may take, and which of them GPTQ gives a weight.

A grid rounds a column of all rows of all experts at once. With U_ii the column's ``spread`` (see
``gptq``), an error e of a weight costs e^2 / U_ii^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

MOST = 127  # the largest level of a file
FORBIDDEN = 1e30  # a price that nothing pays; finite, because 0 of it is 0
SKIPPED = 4  # the levels that a weight may reach from 0 without passing one that pays

Round: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""Called with a column's place in its part, the column x ``[experts, rows]``, and where to put its
levels, the same shape; returns their values."""


class Grid(Protocol):
    """The values that weights may take."""

    def rounding(self, part: slice, spread: Tensor) -> Round:
        """How to round some columns; ``spread`` is their U_ii, ``[experts, columns, 1]``."""


@dataclass(frozen=True, slots=True)
class LowHigh:
    """0 and two values of a row, to the nearest of which a weight goes; ties go to 0.

    Attributes:
        low: the value of level -1, <= 0, ``[experts, rows]``.
        high: the value of level 1, >= 0, ``[experts, rows]``.
    """

    low: Tensor
    high: Tensor

    def rounding(self, part: slice, spread: Tensor) -> Round:
        # Where a value is 0, its level would be worth nothing.
        top = torch.where(self.high > 0, self.high / 2, torch.inf)
        bottom = torch.where(self.low < 0, self.low / 2, -torch.inf)

        def round_column(i: int, x: Tensor, levels: Tensor) -> Tensor:
            torch.gt(x, top, out=levels)
            minus = torch.lt(x, bottom, out=torch.empty_like(levels))
            values = levels * self.high + minus * self.low
            levels.sub_(minus)
            return values

        return round_column


@dataclass(frozen=True, slots=True)
class Prices:
    """What levels cost, in units of the error tr((W-Q) H (W-Q)^T), float32 ``[experts, rows]``.

    Attributes:
        first: of level 1 or -1 over 0.
        further: of each level beyond; ``FORBIDDEN`` where levels are ternary.
    """

    first: Tensor
    further: Tensor

    def of(self, levels: Tensor) -> Tensor:
        """The price of each row's levels ``[experts, columns, rows]``: ``[experts, rows]``."""
        nonzeros = (levels != 0).sum(1)
        return self.first * nonzeros + self.further * (levels.abs().sum(1) - nonzeros)


@dataclass(frozen=True, slots=True)
class Multiples:
    """Multiples q of v = row scale x column scale, -127 to 127, each at its price.

    The grid of the recipe ``rd``, whose kernels round to it on their own; tests hold them to this.

    With x > 0 (x < 0 is the same) level q > 0 costs (x - q v)^2 / U_ii^2 + first + (q - 1) further.
    The best of these is q = x / v - further U_ii^2 / (2 v^2), rounded; and it costs less than 0 if
    for some q

        x > (q v + U_ii^2 (first + (q - 1) further) / (q v)) / 2.

    Attributes:
        scale: ``[experts, rows]``.
        column_scale: ``[experts, columns]``.
        prices: of levels.
    """

    scale: Tensor
    column_scale: Tensor
    prices: Prices

    def rounding(self, part: slice, spread: Tensor) -> Round:
        value = self.scale[:, None] * self.column_scale[:, part, None]
        squared = spread * spread
        first, further = (p[:, None] * squared for p in (self.prices.first, self.prices.further))
        # Where the value is 0, the threshold is infinite or NaN, and no x is greater.
        threshold = (value + first / value) / 2
        for q in range(2, SKIPPED + 1):
            one = (q * value + (first + (q - 1) * further) / (q * value)) / 2
            threshold = torch.minimum(threshold, one)
        inverse, shift = 1 / value, 0.5 - further / (2 * value * value)

        def round_column(i: int, x: Tensor, levels: Tensor) -> Tensor:
            size = x.abs()
            torch.gt(size, threshold[:, i], out=levels)
            best = torch.addcmul(shift[:, i], size, inverse[:, i]).floor_().clamp_(1, MOST)
            levels.mul_(best.nan_to_num_()).copysign_(x)
            return levels * value[:, i]

        return round_column
