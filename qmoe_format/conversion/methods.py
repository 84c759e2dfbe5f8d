"""Which recipe quantizes which stack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from qmoe_format.errors import QMoEError
from qmoe_format.quantize import Recipe
from qmoe_format.quantize import recipe as find_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.quantize.hessian import Statistics
    from qmoe_format.quantize.level_weights import Quantized
    from qmoe_format.quantize.rate import Rate


@dataclass(frozen=True, slots=True)
class Method:
    """A recipe and what a user chose about it.

    Attributes:
        recipe: of ``qmoe_format.quantize.RECIPES``.
        choices: values of some of the recipe's ``choices``.

    Raises:
        QMoEError: ``argument`` for a choice that the recipe does not have.
    """

    recipe: Recipe
    choices: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe.check_choices(self.choices)

    def __str__(self) -> str:
        return ":".join([self.recipe.name, *(str(value) for value in self.choices.values())])

    def quantize(
        self, weights: Tensor, statistics: Statistics | None = None, rate: Rate | None = None
    ) -> Quantized:
        """See ``Recipe.quantize``."""
        return self.recipe.quantize(weights, statistics, rate, **self.choices)


@dataclass(frozen=True, slots=True)
class Rule:
    """A method for the stacks whose names match a pattern of the shell."""

    pattern: str
    method: Method

    @classmethod
    def parse(cls, text: str, *, calibrated: bool) -> Rule:
        """Read ``PATTERN=RECIPE[:CHOICE...]``, such as ``*.down_proj=gptq:3``.

        Choices are values of the recipe's ``choices``. ``int-group`` stands for ``gptq`` with
        calibration text, and for ``moqe`` without it or with a choice that only that has.

        Raises:
            QMoEError: ``argument``.
        """
        pattern, _, method = text.rpartition("=")
        name, *values = method.split(":")
        if not pattern or not name:
            advice = "write PATTERN=RECIPE or PATTERN=RECIPE:CHOICE, such as '*.down_proj=gptq:3'"
            raise QMoEError("argument", f"rule {text!r} is not understood", advice)
        if name == "int-group":
            name = "gptq" if calibrated and not {"8", "linear", "log"} & {*values} else "moqe"
        try:
            recipe = find_recipe(name)
            choices = dict(_choice(recipe, value) for value in values)
            if len(choices) < len(values):
                raise QMoEError("argument", "two choices are of one kind", "leave out one of them")
            return cls(pattern, Method(recipe, choices))
        except QMoEError as error:
            raise error.at(f"rule {text!r}") from error


def _choice(recipe: Recipe, text: str) -> tuple[str, object]:
    """The choice that has this value."""
    value = int(text) if text.isdecimal() else text
    for name, values in recipe.choices.items():
        if value in values:
            return name, value
    known = "; ".join(f"{n} {', '.join(map(str, v))}" for n, v in recipe.choices.items())
    advice = f"choose one of {known}" if known else "leave it out"
    raise QMoEError("argument", f"recipe {recipe.name!r} has no choice {text!r}", advice)


@dataclass(frozen=True, slots=True)
class Methods:
    """The method of every stack: the last rule that matches its name, or the default."""

    default: Method
    rules: Sequence[Rule] = ()

    @property
    def all(self) -> list[Method]:
        """The default and those of rules."""
        return [self.default, *(rule.method for rule in self.rules)]

    @property
    def rated(self) -> bool:
        """Whether one of them weighs error against bits."""
        return any(method.recipe.rated for method in self.all)

    def of(self, name: str) -> Method:
        """The method of the stack of this name."""
        for rule in reversed(self.rules):
            if fnmatchcase(name, rule.pattern):
                return rule.method
        return self.default

    def check(self, names: Iterable[str]) -> None:
        """Refuse rules that match none of the stacks' names.

        Raises:
            QMoEError: ``argument``.
        """
        known = list(names)
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.pattern) for name in known):
                advice = f"the experts' stacks are {', '.join(known[:4])} ..."
                raise QMoEError("argument", f"no stack matches {rule.pattern!r}", advice)
