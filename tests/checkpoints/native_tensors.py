"""Stored tensors for tests of native formats, and decoding them as a checkpoint does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qmoe_format.checkpoints.native import PackedTensor, find_packed
from qmoe_format.checkpoints.native.packed_tensor import row
from qmoe_format.checkpoints.tensor_info import TensorInfo

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """What a weight file says about them."""
    return {
        name: TensorInfo(name, DTYPES[tensor.dtype], tuple(tensor.shape), 0)
        for name, tensor in tensors.items()
    }


def find(quantization: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, PackedTensor]:
    """``find_packed`` for a model with this ``quantization_config``."""
    return find_packed({"quantization_config": quantization}, infos(tensors))


def decode(
    quantization: Mapping[str, Any], tensors: Mapping[str, Tensor], index: int | None = None
) -> Tensor:
    """The only packed weight among some tensors; it must account for all of them."""
    (packed,) = find(quantization, tensors).values()
    assert sorted(packed.parts) == sorted(tensors)
    if index is None:
        decoded = packed.decode(tensors.__getitem__)
    else:
        decoded = packed.decode_expert(lambda name, *which: row(tensors[name], *which), index)
    assert decoded.dtype == torch.float32
    assert decoded.is_contiguous()
    assert tuple(decoded.shape) == (packed.shape if index is None else packed.shape[1:])
    return decoded


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two float32 tensors have the same bits, but for those of NaNs."""
    assert ours.dtype == theirs.dtype == torch.float32
    equal = ours.view(torch.int32) == theirs.contiguous().view(torch.int32)
    return ours.shape == theirs.shape and bool((equal | ours.isnan() & theirs.isnan()).all())


def codes(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    """Random bits in every element."""
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator)
    return flat.to(torch.uint8).view(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random scales from 2^-9 to 2^-3, a few of them negative or zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.exp2(-3 - 6 * torch.rand(shape, generator=generator))
    signs = torch.randint(-1, 12, shape, generator=generator).clamp(max=1)
    return (values * signs).to(dtype)


def exponents(*shape: int, seed: int = 0) -> Tensor:
    """Random E8M0 scales as uint8, the least and the greatest included."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 255, shape, generator=generator)
    return found.to(torch.uint8)
