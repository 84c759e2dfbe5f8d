"""What a quantiser makes of a batch of matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError

SCALE_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class TernaryWeights:
    """A batch of quantised matrices: weight = row scale of its trit [x column scale].

    Attributes:
        trits: int8 ``[experts, rows, columns]`` of -1, 0 and 1; 0 wherever the value is 0.
        row_scale: the scales' type, ``[experts, rows, 1, 2]`` of low <= 0 and high >= 0, or
            ``[experts, rows, 1, 1]`` of s >= 0 (low = -s, high = s).
        column_scale: the scales' type, ``[experts, columns]``, or None.
    """

    trits: Tensor
    row_scale: Tensor
    column_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 ``[experts, rows, columns]``, the numbers that a reader of the file gets."""
        low_high = self.row_scale[:, :, 0].float()
        low, high = -low_high[..., :1], low_high[..., -1:]
        if low_high.shape[-1] == 2:
            low = low_high[..., :1]
        weights = torch.where(self.trits > 0, high, 0.0) + torch.where(self.trits < 0, low, 0.0)
        return (
            weights if self.column_scale is None else weights * self.column_scale[:, None].float()
        )


@dataclass(frozen=True, slots=True)
class Quantized:
    """Ternary weights, and how they came about.

    Attributes:
        weights: of a batch of experts.
        damping: of each expert's Hessian, a fraction of its mean diagonal; None without one.
        fallback: why an expert had to do without its Hessian, or None.
    """

    weights: TernaryWeights
    damping: list[float | None]
    fallback: list[str | None]


def check_weights(weights: Tensor) -> None:
    """Refuse what no recipe takes.

    Raises:
        QMoEError: ``argument`` for another shape or type; ``value`` for NaN or infinity.
    """
    if weights.ndim != 3 or not weights.dtype.is_floating_point or weights.itemsize < 2:
        raise QMoEError(
            "argument",
            f"weights are {weights.dtype} {list(weights.shape)}; a recipe needs floats of 16 to 64 "
            "bits in [experts, rows, columns]",
        )
    for number, expert in enumerate(weights):
        bad = ~torch.isfinite(expert)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            where = f"expert {number}, " if len(weights) > 1 else ""
            raise QMoEError(
                "value",
                f"{where}row {row}, column {column}: the weight is "
                f"{float(expert[row, column])}; repair the model",
            )


def scale_type(name: str) -> torch.dtype:
    """The torch type of a scale type's name; ``argument`` for another name."""
    if name not in SCALE_TYPES:
        raise QMoEError("argument", f"scale_dtype {name!r} is not one of {', '.join(SCALE_TYPES)}")
    return SCALE_TYPES[name]
