"""Kernel launches: what one is, and how it is compiled and put on a GPU's stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda
from qmoe_format.gpu.cuda import DeviceLimits

DEFAULT_SHARED = 48 << 10  # bytes of shared memory beyond which a kernel has to ask for them


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and the blocks it runs in.

    Attributes:
        name: of the ``extern "C"`` function in ``source``.
        source: the whole CUDA text, defines included.
        threads: per block.
        shared_bytes: dynamic shared memory per block.
        together: as many blocks as possible should be on a multiprocessor, although they leave less
            of its memory to the L1 cache.
    """

    name: str
    source: str
    threads: int
    shared_bytes: int = 0
    together: bool = False

    def blocks(self, size: int, limits: DeviceLimits) -> int:
        """How many there should be for ``size`` threads' work if each may do more than its own."""
        return max(1, min(limits.multiprocessors * 8, -(-size // self.threads)))


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


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Stands in launches that are prepared for what each call brings: an array, or a number.

    Attributes:
        shape, dtype: of the array.
        whole: the array that it is a part of.
        first: its first element there.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "int32"
    whole: Given | None = None
    first: int = 0

    def reshape(self, rows: int, _: int) -> Given:
        """The same array with so many rows."""
        columns = math.prod(self.shape) // rows
        return Given((rows, columns), self.dtype, self.whole or self, self.first)

    def __getitem__(self, rows: slice) -> Given:
        _, *others = self.shape
        first = self.first + rows.start * math.prod(others)
        return Given((rows.stop - rows.start, *others), self.dtype, self.whole or self, first)


class Prepared:
    """Launches on a GPU with everything at hand but what each call brings.

    A launch should take the host little longer than CuPy needs for it.

    Args:
        launches: what to launch.
        given: what their arguments have in place of what ``run`` is given.
        device: number of the GPU.

    Raises:
        QMoEError: ``dependency`` if CuPy cannot compile.
    """

    def __init__(self, launches: Sequence[Launch], given: Sequence[Given], device: int) -> None:
        places = {id(each): place for place, each in enumerate(given)}
        self._device = device
        self._runtime = cuda.module().cuda.runtime
        self._launches = []
        for launch in launches:
            kernel, late = launch.kernel, []
            for at, argument in enumerate(launch.arguments):
                if isinstance(argument, Given):
                    late.append((at, places[id(argument.whole or argument)], argument.first))
            arguments = list(map(_argument, launch.arguments))
            with cuda.module().cuda.Device(device):
                function = _compiled(device, kernel)
            shape = (launch.grid, (kernel.threads,))
            self._launches.append((function, shape, kernel.shared_bytes, arguments, late))

    def run(self, given: Sequence[Any], stream: Any) -> None:
        """Enqueue all with arrays and numbers ``given`` on ``stream``, without waiting for them."""
        if self._runtime.getDevice() == self._device:
            self._enqueue(given, stream)
        else:
            with cuda.module().cuda.Device(self._device):
                self._enqueue(given, stream)

    def _enqueue(self, given: Sequence[Any], stream: Any) -> None:
        for function, shape, shared_bytes, fixed, late in self._launches:
            arguments = fixed.copy()
            for at, which, first in late:
                value = given[which].reshape(-1)[first:] if first else given[which]
                arguments[at] = _argument(value)
            function(*shape, arguments, shared_mem=shared_bytes, stream=stream)


def execute(launches: Sequence[Launch], device: int, stream: Any) -> None:
    """Enqueue ``launches`` on ``stream`` of GPU ``device`` without waiting for them.

    A kernel is compiled when it is first launched; CuPy keeps the result in its cache folder.

    Args:
        launches: what to launch.
        device: number of the GPU.
        stream: CuPy's, or what has an address ``ptr`` as they have.

    Raises:
        QMoEError: ``dependency`` if CuPy cannot compile.
    """
    Prepared(launches, (), device).run((), stream)


@cache
def _compiled(device: int, kernel: Kernel) -> Any:
    """The function, loaded on ``device``, which is the current one."""
    compiled = cuda.module().RawModule(code=kernel.source, options=("--std=c++17",))
    try:
        function = compiled.get_function(kernel.name)
    except (ImportError, RuntimeError) as error:
        if not any(what in str(error).lower() for what in ("nvrtc", "cuda headers")):
            raise
        raise QMoEError(
            "dependency",
            f"CuPy does not find the compiler or its headers ({error})",
            "run: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 for CUDA 12, "
            "nvidia-cuda-nvrtc nvidia-cuda-runtime for CUDA 13",
        ) from error
    if kernel.shared_bytes > DEFAULT_SHARED:
        function.max_dynamic_shared_size_bytes = kernel.shared_bytes
    if kernel.together:
        function.preferred_shared_memory_carveout = 100  # percent
    return function


def _argument(argument: Any) -> Any:
    # CuPy does not know torch's tensors, but takes an address in place of an array.
    if argument is None:
        return np.uint64(0)
    pointer = getattr(argument, "data_ptr", None)
    return argument if pointer is None else np.uint64(pointer())
