"""What ``generate --stats`` says of experts that do not all fit into memory."""

from __future__ import annotations

from typing import Any

from qmoe_format.cli.formatting import size


def cache_line(model: Any, tokens: int) -> str:
    """One line about the experts of a model that has read and generated ``tokens``."""
    from qmoe_format.runtime.expert_memory import expert_cache

    cache = expert_cache(model)
    if model.device.type != "cpu":
        return "experts: all in the memory of the device"
    if cache is None:
        return "experts: mapped, the system keeps in memory what it has room for"
    found = cache.counters
    return (
        f"experts: {size(cache.bytes)} of {size(cache.budget)} in memory;"
        f" {found.hits:,} hits, {found.misses:,} misses, {found.evictions:,} evictions;"
        f" {size(found.bytes_read)} read, {size(found.bytes_read / max(tokens, 1))} a token;"
        f" {found.prefetched:,} prefetched, {found.wasted_prefetches:,} of them in vain;"
        f" waited {found.seconds_waited:.1f} s"
    )
