"""The recipe ``gptq``: GPTQ on integers between each row's extremes (arXiv 2210.17323).

A row's values are evenly spaced from its minimum, or 0, to its maximum, or 0, and its zero point
makes 0 one of them. As in QMoE's rows of 2 bits (arXiv 2310.16795), the damping is a tenth of the
Hessian's mean diagonal and columns keep their order. An expert without a usable Hessian is rounded
to nearest, which is what GPTQ does with the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.quantize.gptq import gptq
from qmoe_format.quantize.grids import Round
from qmoe_format.quantize.group_rounding import check_choice, stored_scales
from qmoe_format.quantize.group_weights import GroupWeights
from qmoe_format.quantize.hessian import Statistics, factored
from qmoe_format.quantize.level_weights import Quantized, check_weights, normalized

DAMPING = 0.1


@dataclass(frozen=True, slots=True)
class Integers:
    """Integers 0 to ``most``, each worth itself less the zero point, times the scale.

    Attributes:
        scale: >= 0, ``[experts, rows]``; where it is 0, so are all values.
        zero_point: an integer, ``[experts, rows]``.
        most: the largest integer.
    """

    scale: Tensor
    zero_point: Tensor
    most: int

    def rounding(self, part: slice, spread: Tensor) -> Round:
        inverse = torch.where(self.scale > 0, 1 / self.scale, 0)

        def round_column(i: int, x: Tensor, levels: Tensor) -> Tensor:
            torch.addcmul(self.zero_point, x, inverse, out=levels)
            levels.round_().clamp_(0, self.most)
            return (levels - self.zero_point) * self.scale

        return round_column


def quantize_gptq(weights: Tensor, statistics: Statistics, bits: int = 4) -> Quantized:
    """See ``Recipe.quantize``; a row is one group.

    Args:
        bits: 2, 3 or 4.
    """
    check_choice("gptq", "bits", bits, (2, 3, 4))
    check_weights(weights)
    experts, rows, columns = weights.shape
    most = 2**bits - 1
    low = high = weights.new_zeros((experts, rows), dtype=torch.float64)
    if columns:
        low, high = weights.amin(2).double().clamp(max=0), weights.amax(2).double().clamp(min=0)
    scales = stored_scales((high - low) / most)
    zero_points = torch.where(scales > 0, -low / scales.double(), 0).round_().clamp_(0, most)
    codes = weights.new_empty(weights.shape, dtype=torch.uint8)
    damping: list[float | None] = [None] * experts
    fallback: list[str | None] = [None] * experts
    if weights.numel():
        ready = factored(statistics, torch.full((experts,), DAMPING))
        scaled, largest = normalized(weights)  # the unit changes no decision of GPTQ
        scale = (scales.double() / largest[:, None]).float()
        levels = gptq(scaled, ready.factor, Integers(scale, zero_points.float(), most))
        codes.copy_(levels.transpose(1, 2))
        damping, fallback = ready.damping, ready.fallback
    return Quantized(
        GroupWeights(
            codes,
            list(scales[..., None]),
            list(zero_points.to(torch.uint8)[..., None]),
            bits,
            "linear",
            [0] * experts,
        ),
        damping,
        fallback,
    )
