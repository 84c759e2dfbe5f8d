"""Decorators of kernels and of what becomes part of them; the cache of compiled kernels."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path

from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic, overload


@lru_cache
def _sources(*folders):
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).digest()


class _CacheFiles(CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, function):
        super().__init__(function)
        here, there = Path(__file__).parent, Path(function.__code__.co_filename).parent
        self.locator.get_source_stamp = lambda: _sources(here, there)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Compiled code on disk, until any source in this folder or in the kernel's own changes.

    Numba's own cache looks only at the file of the kernel, not at those of the functions inlined
    into it. And it fails where the disk does, though nothing depends on it.
    """

    _impl_class = _CacheFiles

    def load_overload(self, signature, target):
        try:
            return super().load_overload(signature, target)
        except Exception:  # reading a damaged pickle raises almost anything
            with suppress(OSError):
                self.flush()

    def save_overload(self, signature, compiled):
        with suppress(OSError):
            super().save_overload(signature, compiled)


def kernel(function):
    """A function that Python calls.

    Where neither ``NUMBA_CACHE_DIR`` nor the folder of the source nor that of the user's caches can
    be written, each process compiles it anew.
    """
    compiled = njit(nogil=True)(function)
    with suppress(RuntimeError):
        compiled._cache = _Cache(function)
    return compiled


def callback(function):
    """A kernel of an address, int64, for ``threads.share``; compiled when it is first asked for.

    Returns a function that returns the kernel, as ctypes calls it.
    """

    @lru_cache
    def compiled():
        made = CFunc(function, ((types.int64,), types.void), {}, {})
        with suppress(RuntimeError):
            made._cache = _Cache(function)  # type: ignore[attr-defined]
        made.compile()
        return made.ctypes

    return compiled


called = njit(nogil=True, forceinline=False)
"""A function that kernels call."""
inlined = njit(nogil=True, forceinline=True)
"""A function that becomes part of the kernels that call it."""


def optional(otherwise):
    """``inlined``, with another function for calls whose first argument is None.

    Numba sees from types which one is meant. ``if x is None`` would be compiled for every x, and
    the types of both branches would have to agree.
    """

    def decorate(function):
        def stub(*_):
            raise NotImplementedError

        def choose(first, *_):
            return otherwise if isinstance(first, types.NoneType) else function

        overload(stub, strict=False, jit_options={"nogil": True, "forceinline": True})(choose)
        return stub

    return decorate


def instruction(signature):
    """A function of the LLVM builder and values, to be called by kernels.

    Args:
        signature: Numba types of the arguments -> signature.
    """

    def decorate(function):
        def generate(context, builder, signature, values):
            result = function(builder, *values)
            return context.get_dummy_value() if result is None else result

        @intrinsic
        @wraps(function)  # Numba reads the names of arguments
        def typed(_, *kinds):
            return signature(*kinds), generate

        return typed

    return decorate


@instruction(lambda: types.void())
def keep_apart(builder):
    """Have the calling function called, not inlined: all loops in one would lack registers."""
    builder.function.attributes.add("noinline")
