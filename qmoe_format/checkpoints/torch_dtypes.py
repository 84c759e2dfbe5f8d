"""Torch's element types and the format's, and a tensor's bytes as a numpy array."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# numpy has no such numbers: their bits travel as unsigned integers, as in qmoe_format.dtypes.
_BITS = {
    torch.bfloat16: torch.uint16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


def to_storage(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's elements in row-major order, in the storage dtype; no copy if contiguous."""
    tensor = tensor.contiguous()
    if bits := _BITS.get(tensor.dtype):
        tensor = tensor.view(bits)
    array: npt.NDArray[Any] = tensor.numpy()
    return array
