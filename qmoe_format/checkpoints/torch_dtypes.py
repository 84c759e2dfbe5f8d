"""Torch's dtypes by their names in the format, and tensors as numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from qmoe_format.dtypes import STORAGE

_STORAGE: dict[str, torch.dtype] = {name: getattr(torch, d.name) for name, d in STORAGE.items()}
TORCH_DTYPES = _STORAGE | {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_storage(tensor: Tensor) -> npt.NDArray[Any]:
    """A CPU tensor as an array of the same shape and of the type that holds its bits in a file.

    It shares memory with ``tensor`` if that is contiguous.
    """
    bits = tensor.contiguous().view(_STORAGE[DTYPE_NAMES[tensor.dtype]])
    array: npt.NDArray[Any] = bits.numpy()
    return array
