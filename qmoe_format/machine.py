"""What this machine has, and giving memory back to it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qmoe_format.errors import QMoEError


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_device(device: Any) -> None:
    """``argument`` for a device that torch cannot use here."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # which not all that torch calls devices can
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise QMoEError(
            "argument", f"device {str(device)!r} cannot be used ({reason}); try cpu or cuda"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing; torch has no type of its own for the CPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def flushing_thread() -> ThreadPoolExecutor:
    """A thread in which torch takes numbers below 1.2e-38 for 0.

    A softmax has many of them, and processors are slow with each. The mode is a thread's own, and
    goes over to those that torch starts from it.
    """
    import torch

    return ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))


def release_memory() -> None:
    """Give to the system what was freed: glibc keeps it, in pieces and for each thread."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
