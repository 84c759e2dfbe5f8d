"""What recipes take and return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError

SCALE_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class LevelWeights:
    """A batch of quantized matrices: weight = row scale of its level [x column scale].

    Attributes:
        levels: int8 ``[experts, rows, columns]`` of -1, 0 and 1; 0 wherever the value is 0.
        row_scale: in the scale dtype, ``[experts, rows, 1, 2]`` of low <= 0 and high >= 0, or
            ``[experts, rows, 1, 1]`` of s >= 0 (low = -s, high = s).
        column_scale: in the scale dtype, ``[experts, columns]``, or None.
    """

    levels: Tensor
    row_scale: Tensor
    column_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 ``[experts, rows, columns]``, the values that a reader of the file gets."""
        scales = self.row_scale[:, :, 0].float()
        high = scales[..., -1:]
        low = scales[..., :1] if scales.shape[-1] == 2 else -high
        weights = torch.where(self.levels > 0, high, 0.0) + torch.where(self.levels < 0, low, 0.0)
        if self.column_scale is None:
            return weights
        return weights * self.column_scale[:, None].float()


@dataclass(frozen=True, slots=True)
class Quantized:
    """What a recipe returns.

    Attributes:
        weights: the batch.
        damping: of each expert's Hessian, as a fraction of its mean diagonal; None without one.
        fallback: why an expert was quantized without its Hessian, or None.
    """

    weights: LevelWeights
    damping: list[float | None]
    fallback: list[str | None]


def check_weights(weights: Tensor) -> None:
    """Refuse what no recipe takes.

    Raises:
        QMoEError: ``argument`` for another shape or dtype; ``value`` for NaN or infinity.
    """
    if weights.ndim != 3 or not weights.dtype.is_floating_point or weights.itemsize < 2:
        raise QMoEError(
            "argument",
            f"weights are {weights.dtype} {list(weights.shape)}",
            "pass floats of 16 to 64 bits, [experts, rows, columns]",
        )
    for number, expert in enumerate(weights):
        bad = ~torch.isfinite(expert)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            where = f"expert {number}, " if len(weights) > 1 else ""
            value = float(expert[row, column])
            raise QMoEError(
                "value",
                f"{where}row {row}, column {column}: the weight is {value}",
                "repair the model",
            )


def scale_type(name: str) -> torch.dtype:
    """The torch dtype of a scale dtype's name.

    Raises:
        QMoEError: ``argument`` for another name.
    """
    if name not in SCALE_TYPES:
        known = ", ".join(SCALE_TYPES)
        raise QMoEError("argument", f"scale_dtype {name!r} is unknown", f"choose one of {known}")
    return SCALE_TYPES[name]


def normalized(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in a range in which no float32 square overflows, ready for GPTQ.

    Args:
        weights: ``[experts, rows, columns]``.

    Returns:
        Each W^T over its largest magnitude, float32 ``[experts, columns, rows]``; and those
        magnitudes, float64 ``[experts]``, 1 for an all-zero matrix.
    """
    largest = weights.abs().amax((1, 2)).double()
    largest = torch.where(largest > 0, largest, 1.0)
    scaled = (weights.double() / largest[:, None, None]).float()
    return scaled.transpose(1, 2).contiguous(), largest
