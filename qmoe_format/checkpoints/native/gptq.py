"""GPTQ's integers of 2, 3, 4 or 8 bits: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

Codes are packed along the inputs, zero points along the outputs. Version 1 of the format stores
zero points less one. GPTQModel, which defines it, subtracts from and adds to whole words (except
for 3 bits, where values straddle words): a zero point of 0 borrows from its neighbor and pays back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
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

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
VERSIONS = {
    "gptq": 1,
    "gptq_v2": 2,
    "auto_round:auto_gptq": 1,
    "auto_round:gptqmodel": 2,
    "auto_round": 2,
}
"""Versions of the format by what configurations call them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(PackedTensor):
    """Weights of ``bits`` bits in ``groups`` groups of ``group`` columns, or as ``g_idx`` says."""

    bits: int
    version: int
    groups: int
    group: int

    def _decode(self, tensors: Mapping[str, Tensor], out: Floats) -> None:
        from qmoe_format.checkpoints.native.kernels.columns import decode_gptq

        rows, columns = self.shape
        chosen: npt.NDArray[Any] = np.arange(columns, dtype=np.int32) // np.int32(self.group)
        if "groups" in tensors:
            chosen = to_array(tensors["groups"])
            if columns and not 0 <= chosen.min() <= chosen.max() < self.groups:
                raise refusal(
                    self.stored["groups"], f"names a group that is not one of {self.groups}"
                )
            chosen = chosen.astype(np.int32)
        words = to_array(tensors["zeros"], torch.uint32)
        if self.version == 1 and self.bits in _ONES:
            words = words + np.uint32(_ONES[self.bits])
        zeros = unpack(words, self.bits, rows)
        if self.version == 1 and self.bits not in _ONES:
            zeros = zeros + 1 & (1 << self.bits) - 1
        scales, codes = self._scales(tensors["scale"]), to_array(tensors["codes"], torch.uint32)
        decode_gptq(codes, self.bits, chosen, zeros.astype(np.float32), scales, out)


def gptq(module: Module, quantization: Quantization) -> Gptq:
    """The ``qweight`` of a module.

    Raises:
        QMoEError: ``checkpoint`` if its parts do not fit each other, or if the configuration names
            a version that is not known.
    """
    leaf = "qweight"
    called = quantization.word("packing_format", "checkpoint_format", "format") or "gptq"
    if called not in VERSIONS:
        raise refusal(
            module.full(leaf),
            f"config.json calls its format {called!r}, which is not supported",
            f"convert the model to one of {', '.join(VERSIONS)}, or to a float type",
        )
    codes = module.require(leaf, ("I32",), leaf)
    zeros = module.require("qzeros", ("I32",), leaf)
    scale = module.require("scales", FLOAT_DTYPES, leaf)
    parts = {"codes": codes, "zeros": zeros, "scale": scale}
    shapes = [list(part.shape) for part in parts.values()]
    if not all(len(shape) == 2 for shape in shapes):
        raise refusal(codes.name, f"it, qzeros and scales have shapes {shapes}, not matrices")
    groups, rows = scale.shape
    columns = None
    if "g_idx" in module.tensors:
        parts["groups"] = order = module.require("g_idx", ("I32", "I64"), leaf)
        columns = order.elements
    fitting = [
        bits
        for bits in (2, 3, 4, 8)
        if zeros.shape == (groups, -(-rows * bits // 32))
        and codes.shape[1] == rows
        and codes.shape[0] == -(-(columns or codes.shape[0] * 32 // bits) * bits // 32)
    ]
    configured = quantization.settings.get("bits")
    bits = configured if configured in fitting else fitting[0] if len(fitting) == 1 else None
    if not isinstance(bits, int):
        raise refusal(
            codes.name,
            f"it, qzeros and scales have shapes {shapes}"
            + (f", g_idx has {columns}" if columns else "")
            + f", which do not make weights of {configured or '2, 3, 4 or 8'} bits",
        )
    group = quantization.group_size(module.name)
    if columns is None:
        columns = codes.shape[0] * 32 // bits
        if -(-columns // (group or columns)) != groups:
            raise refusal(
                codes.name,
                f"there are {groups} groups of scales for {columns} columns, but no g_idx, and "
                f"config.json has groups of {group or 'all'}",
            )
    return Gptq(
        name=module.full("weight"),
        shape=(rows, columns),
        stored={kind: info.name for kind, info in parts.items()},
        ignored=module.claim("weight", *parts.values()),
        format=f"gptq int{bits}",
        bits=bits,
        version=VERSIONS[called],
        groups=groups,
        group=group or columns,
    )
