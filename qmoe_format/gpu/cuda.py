"""CuPy and the GPUs that it finds. CuPy is imported here only, when it is first needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from qmoe_format.errors import QMoEError

OLDEST = 75  # compute capability 7.5 (Turing, 2018), the oldest that CUDA 13 compiles for


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What the choice of kernels depends on.

    Attributes:
        multiprocessors: how many there are.
        shared_bytes: the most shared memory that one block can have.
        capability: compute capability, times ten.
    """

    multiprocessors: int
    shared_bytes: int
    capability: int


def require() -> Any:
    """Import CuPy and check that it finds a GPU.

    Returns:
        The module ``cupy``.

    Raises:
        QMoEError: ``dependency`` without CuPy; ``device`` without a GPU or a driver for it.
    """
    cupy = module()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise QMoEError(
            "device",
            f"CuPy finds no GPU ({error})",
            "check that nvidia-smi lists one and that its driver is as new as CuPy's CUDA, or use "
            "qmoe_format.codec on the CPU",
        ) from error
    if not count:
        raise QMoEError("device", "there is no GPU", "use qmoe_format.codec on the CPU")
    return cupy


def available() -> bool:
    """Whether CuPy is installed and finds a GPU that is new enough."""
    try:
        cupy = require()
    except QMoEError:
        return False
    devices = map(cupy.cuda.Device, range(cupy.cuda.runtime.getDeviceCount()))
    return any(int(device.compute_capability) >= OLDEST for device in devices)


@cache
def module() -> Any:
    """The module ``cupy``, whether or not there is a GPU.

    Raises:
        QMoEError: ``dependency`` if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a second CuPy, or a missing driver
            import cupy
    except ImportError as error:
        raise QMoEError(
            "dependency",
            "the GPU kernels need CuPy, which is not installed",
            "run: pip install 'qmoe-format[cuda13]', or [cuda12] for an older driver",
        ) from error
    return cupy


@cache
def limits(device: int) -> DeviceLimits:
    """The limits of GPU ``device``.

    Raises:
        QMoEError: ``device`` if there is no such GPU or it is too old.
    """
    cupy = require()
    count = cupy.cuda.runtime.getDeviceCount()
    if not 0 <= device < count:
        raise QMoEError("device", f"there is no GPU {device}", f"choose from 0 to {count - 1}")
    gpu = cupy.cuda.Device(device)
    capability = int(gpu.compute_capability)
    if capability < OLDEST:
        raise QMoEError(
            "device",
            f"GPU {device} has compute capability {capability / 10}",
            f"use one of {OLDEST / 10} (Turing, 2018) or higher",
        )
    attributes = gpu.attributes
    return DeviceLimits(
        attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"], capability
    )


def release() -> None:
    """Give back to the GPU what CuPy keeps of it unused: torch has a pool of its own."""
    module().get_default_memory_pool().free_all_blocks()


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn a failed allocation, CuPy's or torch's, into ``QMoEError("memory")``."""
    try:
        yield
    except Exception as error:
        # A kernel's "illegal memory access" is another matter.
        runtime = type(error).__name__ == "CUDARuntimeError"
        wanted = "cudaErrorMemoryAllocation" in str(error)
        if type(error).__name__ != "OutOfMemoryError" and not (runtime and wanted):
            raise
        raise QMoEError(
            "memory",
            f"the GPU does not have enough memory ({error})",
            "upload fewer experts, or free unused memory "
            "(cupy.get_default_memory_pool().free_all_blocks(), torch.cuda.empty_cache())",
        ) from error
