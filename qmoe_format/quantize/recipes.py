"""Quantisers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.quantize.hessian import Statistics
    from qmoe_format.quantize.rd import Rate
    from qmoe_format.quantize.ternary import Quantized


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to quantise.

    Attributes:
        name: what a user types.
        summary: one line for people.
        calibrated: whether it needs ``Statistics``, so calibration text.
        rated: whether it takes a ``Rate``; its statistics weigh rows by importance.
    """

    name: str
    summary: str
    calibrated: bool = False
    rated: bool = False

    def scale_dtype(self, dtype: str) -> str:
        """The scales' type for a checkpoint's: float16 keeps its own, which is exact."""
        return "F16" if dtype == "F16" else "BF16"

    def quantize(
        self,
        weights: Tensor,
        scale_dtype: str,
        statistics: Statistics | None = None,
        rate: Rate | None = None,
    ) -> Quantized:
        """Quantise a batch of experts' matrices ``[experts, rows, columns]``.

        Raises:
            QMoEError: ``argument`` for other shapes and types, and without the statistics or the
                rate that the recipe needs; ``value`` for weights that are NaN, infinite, or beyond
                the scale's type.
        """
        if not self.calibrated:
            from qmoe_format.quantize.rtn import quantize_rtn

            return quantize_rtn(weights, scale_dtype)
        if statistics is None:
            raise QMoEError(
                "argument",
                f"recipe {self.name!r} needs statistics; give those of calibration tokens",
            )
        if not self.rated:
            from qmoe_format.quantize.qmoe import quantize_qmoe

            return quantize_qmoe(weights, scale_dtype, statistics)
        if rate is None:
            raise QMoEError("argument", f"recipe {self.name!r} needs a rate; give rate=Rate(...)")
        from qmoe_format.quantize.rd import quantize_rd

        return quantize_rd(weights, scale_dtype, statistics, rate)


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in [
        Recipe(
            "rtn",
            "each weight to the nearest of its row's minimum, 0 and maximum; needs no text",
        ),
        Recipe("qmoe", "GPTQ on the same three values, as in the QMoE paper", calibrated=True),
        Recipe(
            "rd",
            "the least error for the bits, with scales of rows and columns",
            calibrated=True,
            rated=True,
        ),
    ]
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; ``argument`` if there is none."""
    if name not in RECIPES:
        raise QMoEError(
            "argument", f"recipe {name!r} is not known; there are {', '.join(sorted(RECIPES))}"
        )
    return RECIPES[name]
