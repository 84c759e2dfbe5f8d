"""CUDA, by way of CuPy: imported when it is first needed, and only here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from qmoe_format.errors import QMoEError
from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.plan import Device

OLDEST = 75  # compute capability 7.5: what CUDA 13 still compiles for
DEFAULT_SHARED = 48 << 10  # shared memory of a block, beyond which a kernel has to ask for it


def require() -> Any:
    """The module ``cupy``, with a device to run on.

    Raises ``QMoEError``: ``dependency`` without CuPy, ``device`` without a GPU or its driver.
    """
    cupy = module()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise QMoEError(
            "device",
            f"CuPy finds no GPU ({error}): look whether nvidia-smi lists one and whether its "
            "driver is as new as CuPy's CUDA; qmoe_format.codec does the same on a CPU",
        ) from error
    if not count:
        raise QMoEError("device", "there is no GPU; qmoe_format.codec does the same on a CPU")
    return cupy


def available() -> bool:
    """Whether there is CuPy, and a GPU that is new enough."""
    try:
        cupy = require()
    except QMoEError:
        return False
    devices = map(cupy.cuda.Device, range(cupy.cuda.runtime.getDeviceCount()))
    return any(int(device.compute_capability) >= OLDEST for device in devices)


@cache
def module() -> Any:
    """The module ``cupy``. Raises ``QMoEError``: ``dependency`` if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are two CuPys, or no driver
            import cupy
    except ImportError as error:
        raise QMoEError(
            "dependency",
            "the GPU kernels run through CuPy, which is not installed: "
            "pip install 'qmoe-format[cuda13]', or [cuda12], whichever the driver supports",
        ) from error
    return cupy


@cache
def device(number: int) -> Device:
    """What a plan has to know of a device.

    Raises ``QMoEError``: ``device`` if there is no such one or it is too old.
    """
    cupy = require()
    count = cupy.cuda.runtime.getDeviceCount()
    if not 0 <= number < count:
        raise QMoEError("device", f"there is no GPU {number}: they are numbered 0 to {count - 1}")
    gpu = cupy.cuda.Device(number)
    if int(gpu.compute_capability) < OLDEST:
        raise QMoEError(
            "device",
            f"GPU {number} has compute capability {int(gpu.compute_capability) / 10}, "
            f"the kernels need {OLDEST / 10} (Turing, 2018) or more",
        )
    attributes = gpu.attributes
    return Device(attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])


@contextmanager
def device_memory() -> Iterator[None]:
    """Turn an allocation that fails into ``QMoEError`` ``memory``. CuPy's or torch's."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("OutOfMemoryError", "CUDARuntimeError"):
            raise
        if "memory" not in str(error).lower():
            raise
        raise QMoEError(
            "memory",
            f"the GPU has not enough memory: {error}. Upload fewer experts, or free what others "
            "hold (cupy.get_default_memory_pool().free_all_blocks(), torch.cuda.empty_cache())",
        ) from error


def launch(number: int, stream: Any, launches: Sequence[Launch]) -> None:
    """Put ``launches`` on ``stream`` (CuPy's) of device ``number``. Does not wait for them.

    Arguments are CuPy arrays, torch tensors or numpy scalars. Kernels are compiled when they are
    first launched, and kept by CuPy in a folder.
    """
    with module().cuda.Device(number), stream:
        for one in launches:
            kernel = _kernel(number, one.source, one.kernel)
            if one.shared_bytes > DEFAULT_SHARED:
                kernel.max_dynamic_shared_size_bytes = one.shared_bytes
            arguments = tuple(map(_argument, one.arguments))
            kernel(one.grid, one.block, arguments, shared_mem=one.shared_bytes)


@cache
def _kernel(number: int, source: str, name: str) -> Any:
    """A kernel compiled and loaded; device ``number`` is current."""
    compiled = module().RawModule(code=source, options=("--std=c++17",))
    try:
        return compiled.get_function(name)
    except (ImportError, RuntimeError) as error:
        if not any(what in str(error).lower() for what in ("nvrtc", "cuda headers")):
            raise
        raise QMoEError(
            "dependency",
            f"CuPy does not find what it compiles kernels with ({error}): for CUDA 12 "
            "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12, for CUDA 13 "
            "nvidia-cuda-nvrtc nvidia-cuda-runtime",
        ) from error


def _argument(argument: Any) -> Any:
    # CuPy passes an address as well as an array; it does not know torch's tensors.
    pointer = getattr(argument, "data_ptr", None)
    return argument if pointer is None else np.uint64(pointer())
