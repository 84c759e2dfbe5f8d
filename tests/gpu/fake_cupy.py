"""As much of CuPy as the package uses, on numpy and the shim: two fake GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from qmoe_format.gpu.launch import Kernel, Launch
from tests.gpu import shim


class OutOfMemoryError(MemoryError):
    """Like ``cupy.cuda.memory.OutOfMemoryError``."""


class CUDARuntimeError(RuntimeError):
    """Like ``cupy.cuda.runtime.CUDARuntimeError``."""


class Array(np.ndarray):
    """An array on a GPU, as are its views."""

    gpu: int

    def __array_finalize__(self, base: Any) -> None:
        self.gpu = base.gpu if isinstance(base, Array) else 0

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=self.gpu)

    def get(self) -> np.ndarray:
        """On the CPU."""
        return np.array(self)

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)


@dataclass
class Stream:
    """A stream on which everything is done at once."""

    ptr: int = 0
    capturing: bool = False
    waits: int = 0

    def synchronize(self) -> None:
        self.waits += 1

    def is_capturing(self) -> bool:
        return self.capturing


class Pinned(np.ndarray):
    """Page-locked memory."""

    @property
    def ptr(self) -> int:
        return int(self.ctypes.data)


class FakeCupy(ModuleType):
    """The module. A test may change the number of GPUs, their age and their free memory."""

    ndarray = Array

    def __init__(self) -> None:
        super().__init__("cupy")
        self.gpus = 2
        self.capability = "90"
        self.free = 1 << 30
        self.current = 0
        self.stream = Stream()
        self.launched: list[Launch] = []
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=self.count,
            getDevice=lambda: self.current,
            memcpyAsync=lambda to, source, size, _kind, _stream: ctypes.memmove(to, source, size),
            memcpyHostToDevice=1,
        )
        event = SimpleNamespace(record=lambda _: None, synchronize=lambda: None, done=True)
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=self.device,
            Event=lambda **_: event,
            get_current_stream=lambda _=-1: self.stream,
            alloc_pinned_memory=lambda size: np.zeros(size, np.uint8).view(Pinned),
        )

    def get_default_memory_pool(self) -> Any:
        """A pool that keeps nothing."""
        return SimpleNamespace(free_all_blocks=lambda: None)

    def count(self) -> int:
        """Number of GPUs; if negative, there is no driver."""
        if self.gpus < 0:
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return self.gpus

    def device(self, number: int | None = None) -> Any:
        """A GPU, current within ``with``."""
        number = self.current if number is None else number

        @contextmanager
        def current() -> Iterator[None]:
            before, self.current = self.current, number
            yield
            self.current = before

        manager = current()
        return _Device(
            number,
            self.capability,
            {"MultiProcessorCount": 2, "MaxSharedMemoryPerBlockOptin": 227 << 10},
            (self.free, 1 << 30),
            manager,
        )

    def empty(self, shape: Any, dtype: Any) -> Array:
        """An array of garbage, to be written."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > self.free:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        array: Array = np.full(size, 0xC7, np.uint8).view(dtype).reshape(shape).view(Array)
        array.gpu = self.current
        return array

    def zeros(self, shape: Any, dtype: Any) -> Array:
        """An array of zeros."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def asarray(self, values: Any) -> Array:
        """A copy on the current GPU."""
        array = self.empty(np.shape(values), np.asarray(values).dtype)
        array[...] = values
        return array

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:
        """Kernels that run on the shim."""
        assert options == ("--std=c++17",)

        def kernel(name: str) -> Any:
            return Function(self, code, name)

        return SimpleNamespace(get_function=kernel)


@dataclass
class _Device:
    id: int
    compute_capability: str
    attributes: dict[str, int]
    mem_info: tuple[int, int]
    manager: Any

    def synchronize(self) -> None: ...

    def __enter__(self) -> None:
        self.manager.__enter__()

    def __exit__(self, *_: object) -> None:
        self.manager.__exit__(None, None, None)


class Function:
    """A kernel that, as on a GPU, refuses more shared memory than was asked for."""

    def __init__(self, cupy: FakeCupy, code: str, name: str) -> None:
        self.cupy, self.code, self.name = cupy, code, name
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int],
        arguments: Any,
        *,
        shared_mem: int,
        stream: Any,
    ) -> None:
        assert isinstance(stream.ptr, int)
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "more than was asked for"
        plain = tuple(map(_plain, arguments))
        launch = Launch(Kernel(self.name, self.code, block[0], shared_mem), grid, plain)
        self.cupy.launched.append(launch)
        shim.execute(launch)


def _plain(argument: Any) -> Any:
    """What the shim takes: an address is that of no array."""
    if isinstance(argument, np.uint64):
        assert argument == 0
        return None
    return argument.view(np.ndarray) if isinstance(argument, np.ndarray) else argument
