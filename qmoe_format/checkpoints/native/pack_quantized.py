"""compressed-tensors' pack-quantized: integers of 1 to 8 bits without gaps in int32 words.

Each row is packed for itself, lowest bits first. A value ``q`` is stored as ``q + 2^(bits - 1)``;
so are zero points, packed along the first dimension. Releases before 0.20 also wrote
``weight_g_idx``, the group of each column.
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

_PLAIN = np.arange(16, dtype=np.float32)
_PAIRS = np.stack([_PLAIN[np.arange(256) & 15], _PLAIN[np.arange(256) >> 4]], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackQuantized(PackedTensor):
    """Weights of ``bits`` bits, ``group`` columns of a row with the same scale."""

    bits: int
    group: int
    scale_shape: tuple[int, int]

    def _decode(self, tensors: Mapping[str, Tensor], out: Floats) -> None:
        from qmoe_format.checkpoints.native.kernels.rows import decode_bits, decode_nibbles

        if tuple(tensors["shape"].tolist()) != self.shape:
            raise refusal(
                self.stored["shape"],
                f"holds {tensors['shape'].tolist()}, but the packed weight and its scales make "
                f"{list(self.shape)}",
                "quantize the model in groups",
            )
        rows, groups = out.shape[0], self.scale_shape[1]
        scales = self._scales(tensors["scale"]).reshape(self.scale_shape)
        scales = np.ascontiguousarray(np.broadcast_to(scales, (rows, groups)))
        zeros = np.full_like(scales, 1 << (self.bits - 1))
        if "zero" in tensors:
            zeros += self._zeros(tensors["zero"], groups)
        codes = tensors["codes"]
        chosen = self._groups(tensors)
        if self.bits == 4 and chosen is None and self.group % 2 == 0:
            packed = to_array(codes, torch.uint8)
            decode_nibbles(packed, _PAIRS, zeros, scales, self.group, out)
        else:
            if chosen is None:
                chosen = np.arange(out.shape[1], dtype=np.int32) // np.int32(self.group)
            decode_bits(to_array(codes, torch.uint32), self.bits, chosen, zeros, scales, out)

    def _zeros(self, stored: Tensor, groups: int) -> npt.NDArray[Any]:
        """Signed zero points [rows or 1, groups]."""
        if stored.dtype == torch.int8:
            return to_array(stored).reshape(self.scale_shape)
        words = np.ascontiguousarray(to_array(stored, torch.uint32).T)
        return unpack(words, self.bits, self.shape[0]).T - (1 << (self.bits - 1))

    def _groups(self, tensors: Mapping[str, Tensor]) -> npt.NDArray[Any] | None:
        """int32 [columns]: the group of each; None if they are in order."""
        if "groups" not in tensors:
            return None
        chosen = to_array(tensors["groups"])
        if (chosen == -1).any():  # as the library writes when columns were not reordered
            return None
        count = self.scale_shape[1]
        if not np.array_equal(np.sort(chosen), np.repeat(np.arange(count), self.group)):
            raise refusal(
                self.stored["groups"],
                f"does not put {self.group} columns into each of {count} groups",
            )
        return chosen.astype(np.int32)


def pack_quantized(module: Module, quantization: Quantization) -> PackQuantized:
    """The ``weight_packed`` of a module, of dtype I32.

    Raises:
        QMoEError: ``checkpoint`` if its parts do not fit each other or the configuration.
    """
    leaf = "weight_packed"
    codes = module.require(leaf, ("I32",), leaf)
    scale = module.require("weight_scale", FLOAT_DTYPES, leaf)
    shape = module.require("weight_shape", ("I32", "I64"), leaf)
    scheme = quantization.scheme(module.name)
    bits, group = scheme.get("num_bits"), quantization.group_size(module.name)
    if type(bits) is not int or not 1 <= bits <= 8:
        raise refusal(
            codes.name,
            f"config.json gives {bits!r} as the number of its bits",
            "correct 'config_groups' in quantization_config of config.json",
        )
    if len(codes.shape) != 2 or shape.shape != (2,):
        raise refusal(codes.name, f"has shape {list(codes.shape)}, not rows and words")
    rows, words = codes.shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    columns = groups * group if group else words * 32 // bits
    fits = scale.shape in ((rows, groups), (1,), ()) and (groups == 1 or group)
    if not fits or -(-columns * bits // 32) != words:
        raise refusal(
            codes.name,
            f"has shape {list(codes.shape)} and scales of shape {list(scale.shape)}, which do not "
            f"make rows of {bits} bits a weight in groups of {group or 'all'} columns",
        )
    parts = {"codes": codes, "scale": scale, "shape": shape}
    if zero := module.tensors.get("weight_zero_point"):
        if (zero.dtype, zero.shape) not in (
            ("I32", (-(-rows * bits // 32), groups)),
            ("I8", scale.shape),
        ):
            raise refusal(zero.name, f"is {zero.dtype} {list(zero.shape)}, which does not fit")
        parts["zero"] = zero
    elif not scheme.get("symmetric", True):
        module.require("weight_zero_point", ("I32",), leaf)
    if "weight_g_idx" in module.tensors:
        order = module.require("weight_g_idx", ("I32", "I64"), leaf)
        if order.shape != (columns,):
            raise refusal(order.name, f"has shape {list(order.shape)}, not [{columns}]")
        parts["groups"] = order
    return PackQuantized(
        name=module.full("weight"),
        shape=(rows, columns),
        stored={kind: info.name for kind, info in parts.items()},
        ignored=module.claim("weight", *parts.values()),
        format=f"int{bits}",
        bits=bits,
        group=group or columns,
        scale_shape=(rows, groups) if scale.elements > 1 else (1, 1),
    )
