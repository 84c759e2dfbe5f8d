"""What this machine offers: cores, memory, devices, optional packages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qmoe_format.errors import QMoEError


def cores() -> int:
    """How many processor cores this process may use."""
    return len(usable_cores())


def usable_cores() -> frozenset[int]:
    """Their numbers."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def require(*modules: str, extra: str = "convert") -> None:
    """Import optional packages, which ``import qmoe_format`` does without.

    Args:
        extra: the package's extra that has them.

    Raises:
        QMoEError: ``dependency`` if one is missing.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise QMoEError(
                "dependency",
                f"the package {module} cannot be imported ({error})",
                f"run: pip install 'qmoe-format[{extra}]'",
            ) from error


def check_device(device: Any) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        QMoEError: ``argument``.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # not everything that torch calls a device can do this
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QMoEError(
            "argument", f"device {str(device)!r} cannot be used ({reason})", "try cpu or cuda"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says so; torch has no exception of its own for the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def flushing_thread() -> ThreadPoolExecutor:
    """A thread in which torch treats numbers below 1.2e-38 as 0.

    A softmax produces many of them, and each is slow to compute with. The mode belongs to a thread
    and to those that torch starts from it.
    """
    import torch

    return ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))


def release_memory() -> None:
    """Return freed memory to the system: glibc keeps it otherwise, in pieces, per thread."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
