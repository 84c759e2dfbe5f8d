"""The recipe ``rtn``: round to nearest on the grid of low, 0 and high of each row.

This is QMoE's grid (arXiv 2310.16795, section 3) and the rounding it starts from; its GPTQ
(arXiv 2210.17323) rounds by the same formula, but corrects later columns. For a row w:

    high = max(w, 0)          low = min(w, 0)
    w_c > high / 2  ->  +1    w_c < low / 2  ->  -1    otherwise  ->  0

Low and high are rounded to the scale dtype first, and the thresholds are half of the rounded
values: each weight goes to the nearest of the three values that a reader of the file gets, and ties
go to 0. If the checkpoint's dtype is wider than the scales', thresholds from the unrounded values
would send some weights to the farther one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.level_weights import SCALE, LevelWeights, Quantized, check_weights

BLOCK_ELEMENTS = 1 << 18  # float32 values that fit in the cache


def quantize_rtn(weights: Tensor) -> Quantized:
    """``round_to_nearest`` as a recipe."""
    ternary = round_to_nearest(weights)
    return Quantized(ternary, [None] * len(weights), [None] * len(weights))


def round_to_nearest(weights: Tensor) -> LevelWeights:
    """Round a batch of matrices; each row independently, so batching changes nothing.

    Args:
        weights: bfloat16, float16, float32 or float64 ``[experts, rows, columns]``.

    Returns:
        Levels and scales, one group per row. An all-zero row has scales and levels of 0.

    Raises:
        QMoEError: ``argument`` for another shape or dtype; ``value`` if a weight is NaN, infinite,
            or out of the scale dtype's range.
    """
    check_weights(weights)
    scales = min_max(weights)
    experts, rows, columns = weights.shape
    levels = weights.new_empty((experts, rows, columns), dtype=torch.int8)
    # float32 holds every bfloat16 and float16 value and its half.
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    block = max(1, BLOCK_ELEMENTS // max(1, columns))
    for expert in range(experts):
        for start in range(0, rows, block):
            part = slice(start, start + block)
            _round(weights[expert, part].to(wide), scales[expert, part], levels[expert, part])
    return LevelWeights(levels, scales)


def min_max(weights: Tensor) -> Tensor:
    """Low and high of each row, ``[experts, rows, 2]`` in bfloat16.

    Raises:
        QMoEError: ``argument``; ``value`` if one is out of the scale dtype's range.
    """
    experts, rows, columns = weights.shape
    # Adding 0 turns -0 into +0: which zero a minimum returns depends on the order of evaluation,
    # and the file's bytes must not.
    if columns:
        low, high = weights.amin(2).clamp(max=0) + 0.0, weights.amax(2).clamp(min=0) + 0.0
    else:
        low = high = weights.new_zeros((experts, rows))
    scales = torch.stack([low, high], 2).to(SCALE)
    bad = ~torch.isfinite(scales).all(2)
    if bad.any():
        expert, row = bad.nonzero()[0].tolist()
        largest = float(weights[expert, row].abs().max())
        raise QMoEError(
            "value",
            f"expert {expert}, row {row}: weights up to {largest:g} are beyond bfloat16",
            "rescale the model",
        )
    return scales


def _round(w: Tensor, scales: Tensor, levels: Tensor) -> None:
    """Fill int8 ``levels`` [rows, columns] from ``w`` [rows, columns] and ``scales`` [rows, 2]."""
    low, high = scales.to(w.dtype).unbind(1)
    # Where a scale has been rounded to 0, its level would be worth nothing.
    low = torch.where(low < 0, low / 2, -torch.inf)
    high = torch.where(high > 0, high / 2, torch.inf)
    # torch compares several times faster into int8 than into bool.
    torch.gt(w, high[:, None], out=levels)
    levels -= torch.lt(w, low[:, None], out=torch.empty_like(levels))
