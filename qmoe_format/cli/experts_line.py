"""What ``--stats`` says of a model's experts."""

from __future__ import annotations

from typing import Any

from qmoe_format.cli.formatting import size


def experts_line(model: Any, tokens: int) -> str:
    """What was done with the experts since the last such line, for ``tokens`` read and written."""
    from qmoe_format.runtime.expert_cache import CacheCounters
    from qmoe_format.runtime.expert_memory import expert_cache, hot_experts
    from qmoe_format.runtime.hot_experts import HotCounters

    if model.device.type != "cpu":
        return "experts: all in the memory of the device"
    parts = ["experts: mapped, the system keeps in memory what it has room for"]
    if cache := expert_cache(model):
        found, cache.counters = cache.counters, CacheCounters()
        parts = [
            f"experts: {size(cache.bytes)} of {size(cache.budget)} in memory",
            f"{found.hits:,} hits, {found.misses:,} misses, {found.evictions:,} evictions",
            f"{size(found.bytes_read)} read, {size(found.bytes_read / max(tokens, 1))} a token",
            f"{found.prefetched:,} prefetched, {found.wasted_prefetches:,} of them in vain",
            f"waited {found.seconds_waited:.1f} s",
        ]
    if hot := hot_experts(model):
        done, hot.counters = hot.counters, HotCounters()
        parts += [
            f"packed: {size(hot.bytes)} of {size(hot.budget)}",
            f"{done.hot:,} products with packed matrices, {done.cold:,} with stored ones",
            f"{done.packed:,} packed, {done.evicted:,} evicted",
        ]
    return "; ".join(parts)
