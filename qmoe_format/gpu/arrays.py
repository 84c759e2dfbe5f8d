"""The caller's arrays, CuPy's or torch's: used as they are, on the current stream of their library.

CuPy has no bfloat16. In this package, its uint16 arrays hold the bit patterns of bf16.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda

FLOATS = ("bf16", "fp16", "fp32")
# dtypes by the names of element types in CUDA.
_CUPY = {"bf16": "uint16", "fp16": "float16", "fp32": "float32"}
_CUPY |= {"int32": "int32", "int64": "int64"}
_TORCH = {**_CUPY, "bf16": "bfloat16"}
_ELEMENT_TYPES = {
    **{name: element for element, name in _CUPY.items()},
    **{f"torch.{name}": element for element, name in _TORCH.items()},
}


@cache
def element_type(dtype: Any) -> str:
    """``bf16``, ``fp16``, ``fp32``, ``int32`` or ``int64``; the name of any other dtype."""
    return _ELEMENT_TYPES.get(str(dtype), str(dtype))


@dataclass(frozen=True, slots=True)
class Library:
    """The library that the arrays of a call belong to, on one GPU.

    Attributes:
        device: number of the GPU.
        torch: the module ``torch``, or None for CuPy.
    """

    device: int
    torch: Any = None

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate an array of element type ``dtype``.

        Raises:
            QMoEError: ``memory``.
        """
        with cuda.out_of_memory():
            if self.torch:
                dtype, device = getattr(self.torch, _TORCH[dtype]), f"cuda:{self.device}"
                return self.torch.empty(shape, dtype=dtype, device=device)
            with cuda.module().cuda.Device(self.device):
                return cuda.module().empty(shape, _CUPY[dtype])

    def stream(self) -> Any:
        """The library's current stream: CuPy's, or of torch's the address as ``ptr``."""
        if self.torch:
            return _Address(self.torch.cuda.current_stream(self.device).cuda_stream)
        return cuda.module().cuda.get_current_stream(self.device)

    def check(
        self, array: Any, name: str, shape: Sequence[int], dtypes: Sequence[str] = FLOATS
    ) -> None:
        """Check that a kernel can take ``array``; -1 in ``shape`` stands for any number.

        Raises:
            QMoEError: ``argument`` for another library, GPU, shape or dtype, or a non-contiguous
                array.
        """
        if library_of(array, name, self.device) != self:
            raise QMoEError(
                "argument",
                f"{name}: belongs to another library than x",
                "give CuPy arrays only, or torch tensors only",
            )
        found = tuple(array.shape)
        if len(found) != len(shape) or any(
            want not in (-1, size) for want, size in zip(shape, found, strict=True)
        ):
            want = ", ".join("any" if size < 0 else str(size) for size in shape)
            raise QMoEError("argument", f"{name}: the shape is {found}, not ({want})")
        if element_type(array.dtype) not in dtypes:
            raise QMoEError(
                "argument", f"{name}: the dtype is {array.dtype}, not {' or '.join(dtypes)}"
            )
        if not (array.is_contiguous() if self.torch else array.flags.c_contiguous):
            raise QMoEError(
                "argument",
                f"{name}: the array is not contiguous",
                f"give {name}.contiguous() (torch) or cupy.ascontiguousarray({name})",
            )


class _Address(NamedTuple):
    ptr: int


def signature(array: Any) -> Any:
    """All that ``Library.check`` and the choice of kernels ask of an array, to be compared."""
    if array is None:
        return None
    try:
        if hasattr(array, "is_contiguous"):  # torch's
            return type(array), array.device, array.shape, array.dtype, array.is_contiguous()
        where = array.device.id
        return type(array), where, array.shape, array.dtype, array.flags.c_contiguous
    except AttributeError:
        return object()  # like no other


def library_of(array: Any, name: str, device: int) -> Library:
    """The library that ``array`` belongs to.

    Raises:
        QMoEError: ``argument`` if it is neither CuPy's nor torch's, or not on GPU ``device``.
    """
    torch = sys.modules.get("torch")
    if torch and isinstance(array, torch.Tensor):
        if not array.is_cuda:
            raise QMoEError(
                "argument",
                f"{name}: is on {array.device}, the weights on GPU {device}",
                f"give {name}.to('cuda:{device}')",
            )
        where, library = array.device.index, Library(device, torch)
    elif isinstance(array, cuda.module().ndarray):
        where, library = array.device.id, Library(device)
    else:
        raise QMoEError(
            "argument",
            f"{name}: is a {type(array).__module__}.{type(array).__qualname__}, not a CuPy array "
            "or a torch tensor on the GPU",
            "convert it with cupy.asarray, cupy.from_dlpack or tensor.cuda()",
        )
    if where != device:
        raise QMoEError(
            "argument",
            f"{name}: is on GPU {where}, the weights on GPU {device}",
            "copy one of them to the other's GPU",
        )
    return library
