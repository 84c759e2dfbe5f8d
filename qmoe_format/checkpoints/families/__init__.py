"""What cannot be derived from transformers' model, by the type of its configuration.

Every module here has a ``FAMILY``; a type without one has the default ``Family()``. To add one is
rarely needed: CONTRIBUTING.md says when.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from qmoe_format.checkpoints.expert_layers import ExpertLayer
from qmoe_format.checkpoints.family import Family

FAMILIES: Mapping[str, Family] = {
    model_type: family
    for module in pkgutil.iter_modules(__path__)
    for family in [importlib.import_module(f"{__name__}.{module.name}").FAMILY]
    for model_type in family.model_types
}


def family_for(config: Any) -> Family:
    """The family of a model or of a part of one, by its configuration."""
    return FAMILIES.get(config.model_type, Family())


def expert_layers(model: Any) -> Iterator[ExpertLayer]:
    """The experts in a model of transformers."""
    kinds: set[type[ExpertLayer]] = {family.layer for family in FAMILIES.values()}
    kinds.add(ExpertLayer)
    for path, module in list(model.named_modules()):
        for kind in kinds:
            if kind.matches(module):
                yield kind(path, module, model.config)
