"""Weights as small integers with scales of groups of columns (SPEC.md section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """A batch of quantized matrices: weight = (code - zero point) x scale of its group.

    On the grid ``log`` it is scale x 2^-code for codes below h = 2^(bits - 1), otherwise
    -(scale x 2^(h - code)).

    Attributes:
        codes: uint8 ``[experts, rows, columns]``, below 2^bits.
        scales: of each expert, bfloat16 ``[rows, groups]``.
        zero_points: of each expert, uint8 ``[rows, groups]``; None: all are 2^(bits - 1).
        bits: 2, 3, 4 or 8.
        grid: ``linear`` or ``log``.
        group_sizes: of each expert, 32, 64 or 128 columns; 0 for the whole row.
    """

    codes: Tensor
    scales: Sequence[Tensor]
    zero_points: Sequence[Tensor] | None
    bits: int
    grid: str
    group_sizes: Sequence[int]

    def dequantize(self) -> Tensor:
        """float32 ``[experts, rows, columns]``, the values that a reader of the file gets."""
        weights = torch.empty(self.codes.shape, device=self.codes.device)
        for expert, codes in enumerate(self.codes):
            size, half = self.group_sizes[expert], 1 << (self.bits - 1)
            if self.grid == "log":
                powers = torch.ldexp(torch.ones(half), -torch.arange(half))
                steps = torch.cat([powers, -powers]).to(codes.device)[codes.int()]
            elif self.zero_points is None:
                steps = codes.float() - half
            else:
                steps = codes.float() - by_column(self.zero_points[expert], size, codes)
            weights[expert] = steps * by_column(self.scales[expert], size, codes)
        return weights

    def counts(self) -> list[int]:
        """How many levels each matrix has."""
        return [1 << self.bits] * len(self.codes)


def by_column(values: Tensor, group_size: int, like: Tensor) -> Tensor:
    """What groups have, ``[rows, groups]``, for each column of ``like``: float32, broadcastable."""
    wide = values.float()
    return wide.repeat_interleave(group_size, 1)[:, : like.shape[1]] if group_size else wide
