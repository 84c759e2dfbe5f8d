"""How kernels are compiled, and when compiled ones are used again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

inlined = njit(nogil=True, forceinline=True)
"""Decorator of functions that become part of the kernels that call them."""

_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).digest()


class _CacheFiles(CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.locator.get_source_stamp = lambda: _SOURCES


class _Cache(FunctionCache):  # type: ignore[misc]
    """Compiled code on disk, until any source in this folder changes.

    Numba's own cache looks only at the file of the kernel, not at those of the functions inlined
    into it.
    """

    _impl_class = _CacheFiles


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator of functions that Python calls."""
    compiled = njit(nogil=True)(function)
    compiled._cache = _Cache(function)
    return compiled
