"""The registry of recipes, the ways to quantize.

A recipe is one module with a function from weights to ``Quantized``. To add one, write the function
and list it in ``RECIPES``. It is imported when first used: names and summaries need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.quantize.hessian import Statistics
    from qmoe_format.quantize.level_weights import Quantized
    from qmoe_format.quantize.rate import Rate


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to quantize.

    Attributes:
        name: what a user types.
        summary: one line for people.
        function: ``module:function``, called with the weights as ``quantize`` is, then
            with the statistics if ``calibrated``, then with the rate if ``rated``.
        calibrated: whether it needs ``Statistics``, and so calibration text.
        rated: whether it needs a ``Rate``, and statistics with row importances.
    """

    name: str
    summary: str
    function: str
    calibrated: bool = False
    rated: bool = False

    def quantize(
        self,
        weights: Tensor,
        statistics: Statistics | None = None,
        rate: Rate | None = None,
    ) -> Quantized:
        """Quantize a batch of matrices.

        Args:
            weights: float16, bfloat16, float32 or float64 ``[experts, rows, columns]``.
            statistics: of the experts' calibration tokens, for a calibrated recipe.
            rate: what a bit is worth, for a rated recipe.

        Raises:
            QMoEError: ``argument`` for other shapes and dtypes, or without the statistics or the
                rate that the recipe needs; ``value`` for weights that are NaN, infinite, or out of
                bfloat16's range.
        """
        arguments: list[object] = [weights]
        for needed, argument, what in (
            (self.calibrated, statistics, "statistics"),
            (self.rated, rate, "a rate"),
        ):
            if needed and argument is None:
                raise QMoEError("argument", f"recipe {self.name!r} needs {what}", f"pass {what}")
            if needed:
                arguments.append(argument)
        module, _, function = self.function.partition(":")
        quantized: Quantized = getattr(import_module(module), function)(*arguments)
        return quantized


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "rtn",
            "each weight to the nearest of its row's minimum, 0 and maximum; needs no text",
            "qmoe_format.quantize.rtn:quantize_rtn",
        ),
        Recipe(
            "qmoe",
            "GPTQ on the same three values, as in the QMoE paper",
            "qmoe_format.quantize.qmoe:quantize_qmoe",
            calibrated=True,
        ),
        Recipe(
            "rd",
            "the least error for the bits, with scales of rows and columns",
            "qmoe_format.quantize.rd:quantize_rd",
            calibrated=True,
            rated=True,
        ),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        QMoEError: ``argument`` if it is unknown.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[[0.9, 0.1, -1.0, 0.2]]])
        >>> recipe("rtn").quantize(weights).weights.levels.tolist()
        [[[1, 0, -1, 0]]]
    """
    if name not in RECIPES:
        known = ", ".join(sorted(RECIPES))
        raise QMoEError("argument", f"recipe {name!r} is unknown", f"choose one of {known}")
    return RECIPES[name]
