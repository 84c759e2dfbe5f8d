"""The model families that can be converted, by ``model_type`` of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmoe_format.checkpoints.expert_stacks import Adapter
from qmoe_format.checkpoints.families import gate_up_down, gpt_oss, granite, mixtral, switch
from qmoe_format.errors import QMoEError

ADAPTERS: Mapping[str, Adapter] = {
    model_type: module.ADAPTER
    for module in (gate_up_down, gpt_oss, granite, mixtral, switch)
    for model_type in module.ADAPTER.model_types
}


def adapter_for(config: Mapping[str, Any]) -> Adapter:
    """The adapter of a model's configuration; ``checkpoint`` if its family is not known."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ADAPTERS:
        return ADAPTERS[model_type]
    raise QMoEError(
        "checkpoint",
        f"config.json: model_type {model_type!r} is not a family that can be converted; those are "
        f"{', '.join(sorted(ADAPTERS))}",
    )
