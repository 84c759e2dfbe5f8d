"""The registry of recipes, the ways to quantize.

A recipe is one module with a function from weights to ``Quantized``. To add one, write the function
and list it in ``RECIPES``. It is imported when first used: names and summaries need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        function: ``module:function``, called with the weights, then with the statistics if
            ``calibrated``, then with the rate if ``rated``, and with ``choices`` as keywords.
        calibrated: whether it needs ``Statistics``, and so calibration text.
        rated: whether it needs a ``Rate``, and statistics with row importances.
        choices: what else a user may choose: the values of some keywords.
        encoding: of the matrices in a file, ``int-dict`` or ``int-group``.
    """

    name: str
    summary: str
    function: str
    calibrated: bool = False
    rated: bool = False
    choices: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    encoding: str = "int-dict"

    def quantize(
        self,
        weights: Tensor,
        statistics: Statistics | None = None,
        rate: Rate | None = None,
        **choices: object,
    ) -> Quantized:
        """Quantize a batch of matrices.

        Args:
            weights: float16, bfloat16, float32 or float64 ``[experts, rows, columns]``.
            statistics: of the experts' calibration tokens, for a calibrated recipe.
            rate: what a bit is worth, for a rated recipe.
            choices: as its function takes them.

        Raises:
            QMoEError: ``argument`` for other shapes and dtypes, without the statistics or the
                rate that the recipe needs, or for a choice that it does not have; ``value`` for
                weights that are NaN, infinite, or out of bfloat16's range.
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
        self.check_choices(choices)
        module, _, function = self.function.partition(":")
        quantized: Quantized = getattr(import_module(module), function)(*arguments, **choices)
        return quantized

    def check_choices(self, choices: Mapping[str, object]) -> None:
        """Refuse what cannot be chosen with this recipe.

        Raises:
            QMoEError: ``argument``.
        """
        for name, value in choices.items():
            if name not in self.choices:
                those = [each.name for each in RECIPES.values() if name in each.choices]
                advice = f"use it with {' or '.join(those)}" if those else "leave it out"
                raise QMoEError("argument", f"recipe {self.name!r} has no {name!r}", advice)
            if value not in self.choices[name]:
                problem = f"recipe {self.name!r} does not have {name} {value!r}"
                advice = f"choose one of {', '.join(map(str, self.choices[name]))}"
                raise QMoEError("argument", problem, advice)


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
            "the least error for the bits, with as many levels as pay",
            "qmoe_format.quantize.rd:quantize_rd",
            calibrated=True,
            rated=True,
            choices={"levels": (3,), "effort": ("low", "medium", "high")},
        ),
        Recipe(
            "gptq",
            "GPTQ on 2, 3 or 4 bits between each row's extremes",
            "qmoe_format.quantize.gptq_int:quantize_gptq",
            calibrated=True,
            choices={"bits": (2, 3, 4)},
            encoding="int-group",
        ),
        Recipe(
            "moqe",
            "2, 3, 4 or 8 bits, one scale a row, as in MoQE; needs no text",
            "qmoe_format.quantize.moqe:quantize_moqe",
            choices={"bits": (2, 3, 4, 8), "grid": ("linear", "log")},
            encoding="int-group",
        ),
        Recipe(
            "finequant",
            "4 or 8 bits, groups as small as pays, as in FineQuant; needs no text",
            "qmoe_format.quantize.finequant:quantize_finequant",
            choices={"bits": (4, 8)},
            encoding="int-group",
        ),
        Recipe(
            "int4-experts",
            "4 bits, one scale a row, as in Who Says Elephants Can't Run; needs no text",
            "qmoe_format.quantize.int4_experts:quantize_int4_experts",
            encoding="int-group",
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
