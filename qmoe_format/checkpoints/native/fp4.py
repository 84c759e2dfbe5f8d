"""Two e2m1 numbers a byte, the first in its low half: MXFP4 and NVFP4.

MXFP4 has a power of two for 32 weights of a row; NVFP4 an FP8 scale for 16 and one for the matrix.
The libraries that define these formats: transformers' ``convert_moe_packed_tensors`` (gpt-oss) and
``Fp8Dequantize`` (DeepSeek-V4), compressed-tensors' mxfp4- and nvfp4-pack-quantized, ModelOpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, uint8

from qmoe_format.checkpoints.native.module import Module
from qmoe_format.checkpoints.native.packed_tensor import (
    E8M0_DTYPES,
    Floats,
    PackedTensor,
    refusal,
    to_array,
)
from qmoe_format.checkpoints.tensor_info import TensorInfo

_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_POSITIVE, -_POSITIVE])
PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
"""The two numbers of a byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4(PackedTensor):
    """Weights in groups of ``group`` columns."""

    group: int

    def _decode(self, tensors: Mapping[str, Tensor], out: Floats) -> None:
        from qmoe_format.checkpoints.native.kernels.rows import decode_nibbles

        scales = self._scales(tensors["scale"])
        if "divisor" in tensors:
            with np.errstate(divide="ignore", invalid="ignore"):
                scales = scales / self._scales(tensors["divisor"]).item()
        elif "factor" in tensors:
            scales = scales * self._scales(tensors["factor"]).item()
        self._check_finite(scales)
        codes = to_array(tensors["codes"], uint8)
        decode_nibbles(codes, PAIRS, np.zeros_like(scales), scales, self.group, out)


class GptOss(PackedTensor):
    """The experts of gpt-oss, whose codes [columns, groups, 16] are transposed."""

    __slots__ = ()

    def _decode(self, tensors: Mapping[str, Tensor], out: Floats) -> None:
        from qmoe_format.checkpoints.native.kernels.columns import decode_nibbles_transposed

        scales = self._scales(tensors["scale"])
        decode_nibbles_transposed(to_array(tensors["codes"]), PAIRS, scales, out)


def fp4(module: Module, leaf: str, scale: TensorInfo) -> Fp4:
    """The weight ``leaf`` of a module, uint8 or int8, whose scales are FP8 or E8M0.

    Raises:
        QMoEError: ``checkpoint`` if its parts do not fit each other.
    """
    codes = module.tensors[leaf]
    if scale.dtype in E8M0_DTYPES:
        group, title, factors = 32, "mxfp4", {}
    else:
        group, title = 16, "nvfp4"
        packed = leaf == "weight_packed"
        other = module.require(
            "weight_global_scale" if packed else f"{leaf}_scale_2", ("F32",), leaf
        )
        if other.elements != 1:
            raise refusal(other.name, f"has shape {list(other.shape)}, not a single number")
        factors = {"divisor" if packed else "factor": other}
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if not 2 <= len(shape) <= 3 or (*scale.shape[:-1], group * scale.shape[-1]) != shape:
        raise refusal(
            scale.name,
            f"has shape {list(scale.shape)}, which does not fit {codes.name!r} of shape "
            f"{list(codes.shape)} ({title}: one for {group} weights)",
        )
    stored = {"codes": codes, "scale": scale, **factors}
    return Fp4(
        name=module.full(leaf.removesuffix("_packed")),
        shape=shape,
        stored={kind: info.name for kind, info in stored.items()},
        ignored=module.claim(leaf.removesuffix("_packed"), *stored.values()),
        format=title,
        group=group,
    )


def gpt_oss(module: Module, leaf: str) -> GptOss:
    """The experts whose codes are the tensor ``leaf``, ``…_blocks``, of a module.

    Raises:
        QMoEError: ``checkpoint`` if its scales are missing or do not fit.
    """
    name = leaf.removesuffix("_blocks")
    codes = module.tensors[leaf]
    scale = module.require(f"{name}_scales", ("U8",), leaf)
    if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape != (*scale.shape, 16):
        raise refusal(
            codes.name,
            f"is {codes.dtype} {list(codes.shape)} with scales {list(scale.shape)}, not uint8 "
            "[experts, rows, groups, 16] with [experts, rows, groups]",
        )
    experts, rows, groups, _ = codes.shape
    return GptOss(
        name=module.full(name),
        shape=(experts, 32 * groups, rows),
        stored={"codes": codes.name, "scale": scale.name},
        ignored=module.claim(name, codes, scale),
        format="mxfp4",
    )
