"""Arrays of the caller, CuPy's or torch's, taken as they are: no copy, on the stream it works on.

CuPy has no bfloat16: its ``uint16`` arrays are bit patterns of bf16, as in all of this package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda
from qmoe_format.gpu.plan import Operand

NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int32": "int32"}


class Cupy:
    """CuPy's arrays on one device."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.cupy = cuda.module()

    def dtype(self, array: Any) -> str:
        """``bf16``, ``fp16``, ``fp32``, or another type's own name."""
        name = str(array.dtype.name)
        return "bf16" if name == "uint16" else _short(name)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """An array to be written. Raises ``QMoEError``: ``memory``."""
        name = "uint16" if dtype == "bf16" else NAMES[dtype]
        with self.cupy.cuda.Device(self.device), cuda.device_memory():
            return self.cupy.empty(tuple(shape), name)

    def stream(self) -> Any:
        """The current stream."""
        with self.cupy.cuda.Device(self.device):
            return self.cupy.cuda.get_current_stream()


class Torch:
    """torch's tensors on one device."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.torch = sys.modules["torch"]

    def dtype(self, array: Any) -> str:
        """``bf16``, ``fp16``, ``fp32``, or another type's own name."""
        return _short(str(array.dtype).removeprefix("torch."))

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor to be written. Raises ``QMoEError``: ``memory``."""
        with cuda.device_memory():
            return self.torch.empty(
                tuple(shape), dtype=getattr(self.torch, NAMES[dtype]), device=f"cuda:{self.device}"
            )

    def stream(self) -> Any:
        """The current stream, as one of CuPy's."""
        pointer = self.torch.cuda.current_stream(self.device).cuda_stream
        return cuda.module().cuda.Stream.from_external(_Stream(pointer))


@dataclass(frozen=True, slots=True)
class _Stream:
    """A CUDA stream as libraries pass them to each other; not every torch's own class can that."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


Library = Cupy | Torch


def library(array: Any, name: str, device: int) -> Library:
    """Whose ``array`` is.

    Raises ``QMoEError``: ``argument`` if it is of another kind or not on GPU ``device``.
    """
    home: Library
    if "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor):
        if not array.is_cuda:
            raise QMoEError(
                "argument",
                f"{name} is on {array.device}, the weights on GPU {device}: "
                f"{name}.to('cuda:{device}')",
            )
        where, home = array.device.index, Torch(device)
    elif isinstance(array, cuda.module().ndarray):
        where, home = array.device.id, Cupy(device)
    else:
        raise QMoEError(
            "argument",
            f"{name} is a {type(array).__module__}.{type(array).__qualname__}: it has to be a CuPy "
            "array or a torch tensor on the GPU (cupy.asarray, cupy.from_dlpack, tensor.cuda())",
        )
    if where != device:
        raise QMoEError(
            "argument", f"{name} is on GPU {where}, the weights on GPU {device}: copy one of them"
        )
    return home


def operand(
    home: Library, array: Any, name: str, shape: Sequence[int], dtypes: Sequence[str]
) -> Operand:
    """``array`` for a kernel, checked. ``shape``: -1 stands for any number.

    Raises ``QMoEError``: ``argument`` for another library, device, shape or type, or gaps in it.
    """
    if type(library(array, name, home.device)) is not type(home):
        raise QMoEError("argument", f"{name} and x are of two libraries, CuPy and torch")
    fits = len(array.shape) == len(shape) and all(
        want in (-1, size) for want, size in zip(shape, array.shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise QMoEError("argument", f"{name} has the shape {tuple(array.shape)}, not ({want})")
    dtype = home.dtype(array)
    if dtype not in dtypes:
        raise QMoEError(
            "argument", f"{name} has elements of type {array.dtype}, not {' or '.join(dtypes)}"
        )
    contiguous = array.is_contiguous() if isinstance(home, Torch) else array.flags.c_contiguous
    if not contiguous:
        raise QMoEError(
            "argument",
            f"{name} is not contiguous: give {name}.contiguous() (torch) or "
            f"cupy.ascontiguousarray({name})",
        )
    return Operand(array, dtype)


def _short(name: str) -> str:
    return next((short for short, long in NAMES.items() if long == name), name)
