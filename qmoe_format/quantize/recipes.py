"""Quantizers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.quantize.rtn import TernaryWeights


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to quantise.

    Attributes:
        name: what a user types.
        summary: one line for people.
        quantize: weights ``[experts, rows, columns]`` and the scales' type to ternary weights.
    """

    name: str
    summary: str
    quantize: Callable[[Tensor, str], TernaryWeights]

    def scale_dtype(self, dtype: str) -> str:
        """The scales' type for a checkpoint's: float16 keeps its own, which is exact."""
        return "F16" if dtype == "F16" else "BF16"


def _round_to_nearest(weights: Tensor, scale_dtype: str) -> TernaryWeights:
    from qmoe_format.quantize.rtn import round_to_nearest

    return round_to_nearest(weights, scale_dtype)


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in [
        Recipe(
            "rtn",
            "each weight to the nearest of its row's minimum, 0 and maximum; needs no text",
            _round_to_nearest,
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
