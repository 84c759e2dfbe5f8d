"""The stored tensors of one module, by the last part of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qmoe_format.checkpoints.native.packed_tensor import refusal
from qmoe_format.checkpoints.tensor_info import TensorInfo

# Tensors that say how a weight's inputs, outputs or the KV cache are quantized.
_OF_ACTIVATIONS = frozenset((
    "input_scale", "input_global_scale", "input_zero_point", "input_scale_ub", "activation_scale",
    "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "qscale_act",
))  # fmt: skip
_SCALES = ("{}_scale_inv", "{}_scale")
_SCALES_OF_WEIGHT = ("scale", "qscale_weight")


@dataclass(slots=True)
class Module:
    """Tensors that share all of their names but the last part.

    Attributes:
        name: what they share, without the dot after it.
        tensors: by the last part of the name.
        claimed: last parts that became part of a packed tensor.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    claimed: set[str] = field(default_factory=set)

    def full(self, leaf: str) -> str:
        """The name of a tensor by its last part."""
        return f"{self.name}.{leaf}" if self.name else leaf

    def require(self, leaf: str, dtypes: Iterable[str], beside: str) -> TensorInfo:
        """The tensor ``leaf``, which ``beside`` needs, of one of some dtypes.

        Raises:
            QMoEError: ``checkpoint`` if it is missing or of another dtype.
        """
        info = self.tensors.get(leaf)
        if info is None:
            raise refusal(self.full(leaf), f"missing, but needed to decode {self.full(beside)!r}")
        if info.dtype not in dtypes:
            raise refusal(info.name, f"is {info.dtype} instead of {' or '.join(dtypes)}")
        return info

    def scale_of(self, leaf: str) -> TensorInfo | None:
        """The scales of a weight, under any of their names.

        Raises:
            QMoEError: ``checkpoint`` if there is more than one.
        """
        leaves = [pattern.format(leaf) for pattern in _SCALES]
        if leaf == "weight":
            leaves += _SCALES_OF_WEIGHT
        found = [self.tensors[each] for each in leaves if each in self.tensors]
        if len(found) > 1:
            raise refusal(found[0].name, f"there is {found[1].name!r}, too")
        return found[0] if found else None

    def claim(self, leaf: str, *parts: TensorInfo) -> tuple[str, ...]:
        """Note that ``parts`` make up the weight ``leaf``; the names of what to ignore with it."""
        prefix = "" if leaf == "weight" else f"{leaf}_"
        ignored = [
            each
            for each in self.tensors
            if each.startswith(prefix) and each.removeprefix(prefix) in _OF_ACTIVATIONS
        ]
        self.claimed.update(ignored, (info.name.rpartition(".")[2] for info in parts))
        return tuple(map(self.full, ignored))
