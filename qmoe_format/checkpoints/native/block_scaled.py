"""A byte a weight, FP8 or int8, and a scale for each block of a grid.

A block may be 128 × 128 weights, 1 × 32 (MXFP8), a row, or the whole matrix. The libraries that
define these formats: transformers' ``Fp8Dequantize`` and compressed-tensors' naive-, float-, int-
and mxfp8-quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qmoe_format.checkpoints.native.module import Module
from qmoe_format.checkpoints.native.packed_tensor import (
    E8M0_DTYPES,
    FLOAT_DTYPES,
    Floats,
    PackedTensor,
    refusal,
    to_array,
)
from qmoe_format.checkpoints.native.quantization import Quantization
from qmoe_format.checkpoints.tensor_info import TensorInfo

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_ADVICE = "set 'weight_block_size' in quantization_config of config.json to the size of a block"
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScaled(PackedTensor):
    """Weights of ``grid`` blocks, each of ``block`` rows and columns or, at the edges, fewer."""

    grid: Pair
    block: Pair

    def _decode(self, tensors: Mapping[str, Tensor], out: Floats) -> None:
        from qmoe_format.checkpoints.native.kernels.rows import decode_bytes

        codes = tensors["codes"]
        every = torch.arange(256, dtype=torch.uint8).view(codes.dtype)
        scales = self._scales(tensors["scale"]).reshape(self.grid)
        zeros = np.zeros_like(scales)
        if "zero" in tensors:
            zeros[:] = to_array(tensors["zero"]).reshape(self.grid)
        values = every.float().numpy()
        decode_bytes(to_array(codes, torch.uint8), values, zeros, scales, *self.block, out)


def block_scaled(
    module: Module, leaf: str, scale: TensorInfo, quantization: Quantization
) -> BlockScaled:
    """The weight ``leaf`` of a module, of dtype FP8 or I8.

    Raises:
        QMoEError: ``checkpoint`` if its scales do not fit it.
    """
    codes = module.tensors[leaf]
    fp8 = codes.dtype in FP8_DTYPES
    module.require(scale.name.rpartition(".")[2], FLOAT_DTYPES + (E8M0_DTYPES if fp8 else ()), leaf)
    if not 2 <= len(codes.shape) <= 3:
        raise refusal(codes.name, f"is {codes.dtype} of shape {list(codes.shape)}, not a matrix")
    grid = _grid(codes, scale, quantization)
    exponents = scale.dtype in E8M0_DTYPES
    if exponents and (grid[0], 32 * grid[1]) == codes.shape[-2:]:
        block = (1, 32)
    else:
        configured = quantization.block(module.name) or (None, None)
        block = (
            _edge(codes, scale, codes.shape[-2], grid[0], configured[0]),
            _edge(codes, scale, codes.shape[-1], grid[1], configured[1]),
        )
    stored, parts = {"codes": codes.name, "scale": scale.name}, [codes, scale]
    if not fp8 and (zero := module.tensors.get(f"{leaf}_zero_point")):
        if zero.dtype != "I8" or zero.shape != scale.shape:
            raise refusal(
                zero.name,
                f"is {zero.dtype} {list(zero.shape)}, but its scale has {list(scale.shape)}",
            )
        stored["zero"] = zero.name
        parts.append(zero)
    return BlockScaled(
        name=codes.name,
        shape=codes.shape,
        stored=stored,
        ignored=module.claim(leaf, *parts),
        format="int8" if not fp8 else "mxfp8" if exponents and block == (1, 32) else "fp8",
        grid=grid,
        block=block,
    )


def _grid(codes: TensorInfo, scale: TensorInfo, quantization: Quantization) -> Pair:
    """How many blocks there are below and beside each other in a matrix."""
    experts, (rows, columns) = codes.shape[:-2], codes.shape[-2:]
    if scale.elements == 1 or (experts and scale.shape == experts):
        return 1, 1
    # fbgemm stores experts as [in, out] and has a scale for each output.
    if quantization.method == "fbgemm_fp8" and experts:
        if scale.shape in ((*experts, 1, columns), (*experts, columns, 1)):
            return 1, columns
    elif scale.shape == (rows,):
        return rows, 1
    elif len(scale.shape) == len(codes.shape) and scale.shape[:-2] == experts:
        return scale.shape[-2], scale.shape[-1]
    # ModelOpt keeps the dimensions that it has reduced.
    elif len(scale.shape) == 4 and scale.shape[1::2] == (1, 1) and not experts:
        return scale.shape[0], scale.shape[2]
    raise refusal(
        scale.name,
        f"has shape {list(scale.shape)}, which does not fit {codes.name!r} of shape "
        f"{list(codes.shape)}",
    )


def _edge(
    codes: TensorInfo, scale: TensorInfo, size: int, count: int, configured: int | None
) -> int:
    """How many of the ``size`` rows or columns each of ``count`` blocks has.

    The configuration decides where it fits: only it tells how many the last block lacks. A matrix
    that is smaller than a block may be two (gate and up, each with a scale).
    """
    if configured and count == -(-size // configured):
        return configured
    if count and size % count == 0 and (not configured or count in (1, size) or size <= configured):
        return size // count
    raise refusal(
        scale.name,
        f"has shape {list(scale.shape)}, from which the blocks of {codes.name!r} of shape "
        f"{list(codes.shape)} do not follow"
        + (f" (a block of config.json has {configured})" if configured else ""),
        _ADVICE,
    )
