"""How much memory the experts of a loaded model may take on a CPU."""

from __future__ import annotations

from typing import Any

from qmoe_format.errors import QMoEError
from qmoe_format.machine import available_memory
from qmoe_format.runtime.expert_cache import ExpertCache
from qmoe_format.runtime.experts import compressed_modules
from qmoe_format.runtime.hot_experts import HotExperts

# Of the memory that is available once the other weights are there. The rest is for activations, and
# a mapped file that only just fits is read again and again.
_MAPPED, _CACHED, _WITH_PACKED = 0.8, 0.7, 0.5


def place_experts(model: Any, budget: int | None = None, *, exact: bool = False) -> None:
    """Decide where a model's experts are kept on a CPU, by default by the memory there is.

    They stay mapped if they fit, and are packed as far as there is room beside them; otherwise a
    cache reads them when they are needed.

    Args:
        model: with compressed experts, on a CPU.
        budget: bytes of experts in memory, packed ones included.
        exact: whether products are exact, so that none are packed.

    Raises:
        QMoEError: ``argument`` if the budget is below 1.
    """
    if budget is not None and budget < 1:
        raise QMoEError("argument", f"experts cannot do with {budget} bytes", "give at least 1")
    layers = [module.compressed.stacks for _, module in compressed_modules(model)]
    stacks = [stack for layer in layers for stack in layer]
    if not stacks:
        return
    file = stacks[0].file
    experts = sum(file.tensors[each.name].stored_bytes for each in stacks)
    limited, spare = budget is not None, 0
    if budget is not None:
        spare = budget - experts
    elif (available := available_memory()) is not None:
        limited = experts > _MAPPED * available
        budget = max(1, int(_CACHED * available))
        spare = int(_WITH_PACKED * available) - experts
    cache = ExpertCache(file, min(budget, experts)) if budget and limited else None
    hot = None if exact else HotExperts(max(0, spare))
    for layer in layers:
        cached = cache and cache.layer([each.name for each in layer])
        for each in layer:
            each.cached, each.hot = cached, hot


def expert_cache(model: Any) -> ExpertCache | None:
    """The cache that a model's experts are in; None if they are not in one."""
    for _, module in compressed_modules(model):
        layer = module.compressed.output.cached
        return layer.cache if layer else None
    return None


def hot_experts(model: Any) -> HotExperts | None:
    """What keeps a model's packed experts; None if products are exact."""
    return next((each.compressed.output.hot for _, each in compressed_modules(model)), None)
