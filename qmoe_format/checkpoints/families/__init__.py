"""The model families, by ``model_type`` of ``config.json``: every module here has a ``FAMILY``.

To add one:
1. Compare the names in its checkpoint with transformers' modeling file; write ``NAME.py`` here.
2. If the experts' names and arithmetic are those of a family that is here, add its ``model_type``
   there instead.
3. Add a tiny configuration to ``CONFIGS`` in ``tests/tiny_models.py``.
4. Run ``pytest -k famil``: it converts, calibrates, unpacks and runs the tiny model.
5. Name it in the README, where the input is described.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from qmoe_format.checkpoints.family import Family
from qmoe_format.errors import QMoEError

FAMILIES: Mapping[str, Family] = {
    model_type: family
    for module in pkgutil.iter_modules(__path__)
    for family in [importlib.import_module(f"{__name__}.{module.name}").FAMILY]
    for model_type in family.model_types
}


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of the model with this ``config.json``.

    Raises:
        QMoEError: ``checkpoint`` if it is not known.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise QMoEError(
        "checkpoint",
        f"config.json: model_type {model_type!r} is not supported",
        f"use a model of one of the types {', '.join(sorted(FAMILIES))}",
    )
