"""What recipes take and return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.group_weights import GroupWeights

SCALE = torch.bfloat16  # the type of scales in a file


@dataclass(frozen=True, slots=True)
class LevelWeights:
    """A batch of quantized matrices: weight = level x row scale [x column scale].

    Attributes:
        levels: int8 ``[experts, rows, columns]``, -127 to 127; 0 wherever the value is 0.
        row_scale: bfloat16 ``[experts, rows, 2]`` of low <= 0, for levels below 0 (low times their
            magnitude), and high >= 0; or ``[experts, rows, 1]`` of s >= 0 (low = -s, high = s).
        column_scale: bfloat16 ``[experts, columns]``, or None.
    """

    levels: Tensor
    row_scale: Tensor
    column_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 ``[experts, rows, columns]``, the values that a reader of the file gets."""
        scales, sizes = self.row_scale.float(), self.levels.abs()
        high = scales[..., -1:]
        low = scales[..., :1] if scales.shape[-1] == 2 else -high
        weights = torch.where(self.levels > 0, high, low) * sizes + 0.0  # no zero is negative
        if self.column_scale is None:
            return weights
        return weights * self.column_scale[:, None].float()

    def counts(self) -> list[int]:
        """How many levels each matrix has, between its largest magnitude and minus that."""
        if not self.levels.numel():
            return [1] * len(self.levels)
        return (2 * self.levels.abs().amax((1, 2)).int() + 1).tolist()


@dataclass(frozen=True, slots=True)
class Quantized:
    """What a recipe returns.

    Attributes:
        weights: the batch.
        damping: of each expert's Hessian, as a fraction of its mean diagonal; None without one.
        fallback: why an expert was quantized without its Hessian, or None.
    """

    weights: LevelWeights | GroupWeights
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


def kurtosis(weights: Tensor) -> list[float | None]:
    """The fourth central moment over the squared variance of each matrix, 3 for normal weights.

    The larger, the more is to be had from levels beyond three. None where all weights are equal.
    """
    found: list[float | None] = []
    for matrix in weights:
        squares = (matrix.double() - matrix.double().mean()).square()
        variance = float(squares.mean())
        found.append(float(squares.square().mean()) / variance**2 if variance else None)
    return found


def normalized(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in a range in which no float32 square overflows, ready for GPTQ.

    Args:
        weights: ``[experts, rows, columns]``.

    Returns:
        Each W^T over its largest magnitude, float32 ``[experts, columns, rows]``; and those
        magnitudes, float64 ``[experts]``, 1 for an all-zero matrix.
    """
    largest = largest_magnitudes(weights)
    scaled = (weights.double() / largest[:, None, None]).float()
    return scaled.transpose(1, 2).contiguous(), largest


def largest_magnitudes(weights: Tensor) -> Tensor:
    """Of each matrix, 1 for an all-zero one: float64 ``[experts]``."""
    largest = weights.abs().amax((1, 2)).double()
    return torch.where(largest > 0, largest, 1.0)
