"""How much memory the experts of a loaded model may take on a CPU."""

from __future__ import annotations

from typing import Any

from qmoe_format.errors import QMoEError
from qmoe_format.machine import available_memory
from qmoe_format.runtime.expert_cache import ExpertCache
from qmoe_format.runtime.experts import compressed_modules

# Of the memory that is available once the other weights are there. The rest is for activations, and
# a mapped file that only just fits is read again and again.
_MAPPED, _CACHED = 0.8, 0.7


def limit_expert_memory(model: Any, budget: int | None = None) -> ExpertCache | None:
    """Let a model keep its experts within ``budget`` bytes, by default if memory is short.

    Args:
        model: from ``load_model``, on a CPU.
        budget: None: leave the experts mapped if all fit into available memory.

    Returns:
        The cache; None if the experts stay mapped.

    Raises:
        QMoEError: ``argument`` if the budget is below 1.
    """
    if budget is not None and budget < 1:
        raise QMoEError("argument", f"experts cannot do with {budget} bytes", "give at least 1")
    layers = [module.compressed.stacks for _, module in compressed_modules(model)]
    if not layers:
        return None
    file = layers[0][0].file
    if budget is None:
        experts = sum(file.tensors[each.name].stored_bytes for stacks in layers for each in stacks)
        available = available_memory()
        if available is None or experts <= _MAPPED * available:
            return None
        budget = max(1, int(_CACHED * available))
    cache = ExpertCache(file, budget)
    for stacks in layers:
        layer = cache.layer([each.name for each in stacks])
        for each in stacks:
            each.cached = layer
    return cache


def expert_cache(model: Any) -> ExpertCache | None:
    """The cache that a model's experts are in; None if they are not in one."""
    for _, module in compressed_modules(model):
        layer = module.compressed.output.cached
        return layer.cache if layer else None
    return None
