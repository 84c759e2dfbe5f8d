"""AWQ's 4-bit integers in the order of its matrix product (version ``gemm``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qmoe_format.checkpoints.native.module import Module
from qmoe_format.checkpoints.native.packed_tensor import (
    FLOAT_DTYPES,
    Floats,
    PackedTensor,
    refusal,
    to_array,
    unpack,
)
from qmoe_format.checkpoints.native.quantization import Quantization

FORMATS = ("", "gemm", "auto_round:auto_awq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(PackedTensor):
    """Weights in groups of ``group`` columns."""

    group: int

    def _decode(self, tensors: Mapping[str, Tensor], out: Floats) -> None:
        from qmoe_format.checkpoints.native.kernels.columns import AWQ_ORDER, decode_awq

        scales = self._scales(tensors["scale"])
        packed = unpack(to_array(tensors["zeros"], torch.uint32), 4, self.shape[0])
        in_order = packed.reshape(len(packed), -1, 8)[..., list(AWQ_ORDER)]
        zeros = in_order.reshape(packed.shape).astype(np.float32)
        decode_awq(to_array(tensors["codes"], torch.uint32), self.group, zeros, scales, out)


def awq(module: Module, quantization: Quantization) -> Awq:
    """The ``qweight`` of a module.

    Raises:
        QMoEError: ``checkpoint`` if its parts do not fit each other, or if the configuration names
            another layout.
    """
    leaf = "qweight"
    called = quantization.word("packing_format", "version", "checkpoint_format", "format")
    bits = quantization.settings.get("bits", quantization.settings.get("w_bit", 4))
    if called not in FORMATS or bits != 4:
        raise refusal(
            module.full(leaf),
            f"config.json says that it is AWQ {called!r} of {bits} bits; only 'gemm' of 4 bits is "
            "supported",
            "convert the model to that, or to a float type",
        )
    codes = module.require(leaf, ("I32",), leaf)
    zeros = module.require("qzeros", ("I32",), leaf)
    scale = module.require("scales", FLOAT_DTYPES, leaf)
    columns, words = codes.shape if len(codes.shape) == 2 else (0, 0)
    groups = scale.shape[0] if scale.shape else 0
    if (
        not groups
        or columns % groups
        or zeros.shape != (groups, words)
        or scale.shape != (groups, 8 * words)
    ):
        raise refusal(
            codes.name,
            f"it, qzeros and scales have shapes {list(codes.shape)}, {list(zeros.shape)} and "
            f"{list(scale.shape)}, which do not fit each other as in AWQ's version 'gemm'",
        )
    return Awq(
        name=module.full("weight"),
        shape=(8 * words, columns),
        stored={"codes": codes.name, "zeros": zeros.name, "scale": scale.name},
        ignored=module.claim("weight", codes, zeros, scale),
        format="awq int4",
        group=columns // groups,
    )
