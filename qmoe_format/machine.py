"""What this machine offers: cores, memory, devices, optional packages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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


def available_memory() -> int | None:
    """Bytes that this process may take without pushing others out; None where nothing tells."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":") for line in lines)
        available = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    for group in ("", "/memory"):  # version 2, version 1
        with contextlib.suppress(OSError, KeyError, ValueError):
            available = min(available, _left_in(Path(f"/sys/fs/cgroup{group}")))
    return max(available, 0)


def _left_in(group: Path) -> int:
    """Bytes that a container's control group leaves, not counting cached files."""
    old = group.name == "memory"
    limit = int((group / ("memory.limit_in_bytes" if old else "memory.max")).read_text("ascii"))
    used = int((group / ("memory.usage_in_bytes" if old else "memory.current")).read_text("ascii"))
    lines = (group / "memory.stat").read_text("ascii").splitlines()
    stat = dict(line.split() for line in lines)
    return limit - used + int(stat["total_inactive_file" if old else "inactive_file"])


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
