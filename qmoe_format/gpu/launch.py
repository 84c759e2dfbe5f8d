"""Kernel launches: what one is, and how it is compiled and put on a GPU's stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda

DEFAULT_SHARED = 48 << 10  # bytes of shared memory beyond which a kernel has to ask for them


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and the blocks it runs in.

    Attributes:
        name: of the ``extern "C"`` function in ``source``.
        source: the whole CUDA text, defines included.
        threads: per block.
        shared_bytes: dynamic shared memory per block.
    """

    name: str
    source: str
    threads: int
    shared_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, as data: tests execute the same launches on a CPU.

    Attributes:
        kernel: what is launched.
        blocks: how many, or how many in each of three dimensions.
        arguments: CuPy arrays, torch tensors and numpy scalars, in the kernel's order; None for
            an array that it does not use.
    """

    kernel: Kernel
    blocks: int | tuple[int, int, int]
    arguments: tuple[Any, ...]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks in each dimension."""
        return (self.blocks, 1, 1) if isinstance(self.blocks, int) else self.blocks


def execute(launches: Sequence[Launch], device: int, stream: Any) -> None:
    """Enqueue ``launches`` on ``stream`` (CuPy's) of GPU ``device`` without waiting for them.

    A kernel is compiled when it is first launched; CuPy keeps the result in its cache folder.

    Raises:
        QMoEError: ``dependency`` if CuPy cannot compile.
    """
    with cuda.module().cuda.Device(device), stream:
        for launch in launches:
            kernel = launch.kernel
            function = _compiled(device, kernel.source, kernel.name, kernel.shared_bytes)
            arguments = tuple(map(_argument, launch.arguments))
            function(launch.grid, (kernel.threads,), arguments, shared_mem=kernel.shared_bytes)


@cache
def _compiled(device: int, source: str, name: str, shared_bytes: int) -> Any:
    """The function, loaded on ``device``, which is the current one."""
    compiled = cuda.module().RawModule(code=source, options=("--std=c++17",))
    try:
        function = compiled.get_function(name)
    except (ImportError, RuntimeError) as error:
        if not any(what in str(error).lower() for what in ("nvrtc", "cuda headers")):
            raise
        raise QMoEError(
            "dependency",
            f"CuPy does not find the compiler or its headers ({error})",
            "run: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 for CUDA 12, "
            "nvidia-cuda-nvrtc nvidia-cuda-runtime for CUDA 13",
        ) from error
    if shared_bytes > DEFAULT_SHARED:
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def _argument(argument: Any) -> Any:
    # CuPy does not know torch's tensors, but takes an address in place of an array.
    if argument is None:
        return np.uint64(0)
    pointer = getattr(argument, "data_ptr", None)
    return argument if pointer is None else np.uint64(pointer())
