"""From a checkpoint's names to the parameters of transformers' model, as transformers loads them.

Its rules say which tensors of a checkpoint, under old names or new ones, make up a parameter: one
under another name, several one below the other, a matrix of each expert, a part of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qmoe_format.errors import QMoEError


@dataclass(slots=True)
class Load:
    """How transformers makes a parameter, or several of them.

    Attributes:
        parameter: the first one's name in the model.
        sources: the checkpoint's tensors, in order, by the rule's pattern that they match; a single
            tensor that is only renamed has the pattern ``""``.
        converter: transformers' rule; None if a tensor is only renamed.
    """

    parameter: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    converter: WeightConverter | None = None

    @property
    def names(self) -> list[str]:
        """All tensors of the checkpoint that it needs."""
        return [name for names in self.sources.values() for name in names]

    def run(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by name, from the tensors that ``read`` returns."""
        if self.converter is None:
            return {self.parameter: read(self.names[0])}  # transformers ignores the others
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.parameter, name, pattern, read(name))
        made = converter.convert(self.parameter, model=model, config=model.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
        }


class NameMap:
    """The rules of one model.

    Attributes:
        shapes: of the model's parameters and persistent buffers, by name.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._state = model.state_dict()
        self.shapes: Mapping[str, torch.Size] = {name: t.shape for name, t in self._state.items()}
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {p: rule for rule in self._converters for p in rule.source_patterns}

    def parameter(self, name: str) -> tuple[str, WeightConverter | None, str]:
        """What a tensor of the checkpoint goes into.

        Returns:
            The first parameter that is made of it, which the model need not have; the rule if it is
            more than another name; and which of the rule's patterns it matches.
        """
        base = self.model.base_model_prefix
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, base, self._state
        )
        if target not in self._state and name in self._state:
            return name, None, ""
        return target, self._by_pattern[pattern] if pattern else None, pattern or ""

    def loads(self, names: Iterable[str]) -> dict[str, Load]:
        """Group tensors by the parameter that they go into."""
        found: dict[str, Load] = {}
        for name in sorted(names, key=dot_natural_key):
            target, converter, pattern = self.parameter(name)
            load = found.setdefault(target, Load(target, converter=converter))
            load.sources.setdefault(pattern, []).append(name)
        return found

    def made(self, load: Load, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Size]:
        """Names and shapes of the parameters that a load makes of tensors of these shapes.

        Raises:
            QMoEError: ``checkpoint`` if it cannot.
        """
        try:
            with torch.device("meta"):
                made = load.run(self.model, lambda name: torch.empty(tuple(shapes[name])))
        except Exception as error:  # transformers' rules expect good tensors
            first, *others = load.names
            more = f" and {len(others)} more" if others else ""
            raise QMoEError(
                "checkpoint",
                f"transformers cannot make {load.parameter!r} of {first!r} {list(shapes[first])}"
                f"{more} ({' '.join(str(error).split())})",
                "download the whole checkpoint again",
            ) from error
        return {name: tensor.shape for name, tensor in made.items()}
