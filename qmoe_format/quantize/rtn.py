"""Round to nearest on the grid of low, 0 and high of each row.

QMoE's grid (arXiv 2310.16795, section 3) and the rounding that it starts from; its GPTQ
(arXiv 2210.17323) rounds with the same formula, but corrects the columns to come. For a row w:

    high = max(w, 0)          low = min(w, 0)
    w_c > high / 2  ->  +1    w_c < low / 2  ->  -1    otherwise  ->  0

Low and high are rounded to the scale's type first, and the thresholds are half of the rounded
values: each weight goes to the nearest of the three numbers that a reader of the file will get, a
tie to 0. Where the scale's type holds every weight (bfloat16 or float16 of the same) rounding
changes nothing; for a wider checkpoint the other order would send some weights to the farther
number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError
from qmoe_format.quantize.ternary import Quantized, TernaryWeights, check_weights, scale_type

BLOCK_ELEMENTS = 1 << 18  # so few stay in the cache


def quantize_rtn(weights: Tensor, scale_dtype: str) -> Quantized:
    """``round_to_nearest`` as a recipe."""
    ternary = round_to_nearest(weights, scale_dtype)
    none = [None] * len(weights)
    return Quantized(ternary, list(none), list(none))


def round_to_nearest(weights: Tensor, scale_dtype: str = "BF16") -> TernaryWeights:
    """Round a batch of matrices; each row by itself, so batching changes nothing.

    Args:
        weights: bfloat16, float16, float32 or float64 ``[experts, rows, columns]``.
        scale_dtype: ``BF16``, ``F16`` or ``F32``.

    Returns:
        Trits and scales with one group a row. An all-zero row has scales and trits of 0.

    Raises:
        QMoEError: ``argument`` for another shape or type; ``value`` if a weight is NaN or
            infinite, or beyond the scale's type.
    """
    check_weights(weights)
    scales = min_max(weights, scale_dtype)
    experts, rows, columns = weights.shape
    trits = weights.new_empty((experts, rows, columns), dtype=torch.int8)
    # float32 holds every bfloat16 and float16 number and its half.
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    block = max(1, BLOCK_ELEMENTS // max(1, columns))
    for expert in range(experts):
        for start in range(0, rows, block):
            part = slice(start, start + block)
            _round(weights[expert, part].to(wide), scales[expert, part], trits[expert, part])
    return TernaryWeights(trits, scales[:, :, None])


def min_max(weights: Tensor, scale_dtype: str) -> Tensor:
    """Low and high of each row, ``[experts, rows, 2]`` of the scale's type.

    Raises:
        QMoEError: ``argument``; ``value`` if one is beyond the scale's type.
    """
    dtype = scale_type(scale_dtype)
    experts, rows, columns = weights.shape
    # Adding 0 makes -0 a +0: which zero a minimum returns depends on the order of evaluation, and
    # the file's bytes must not.
    if columns:
        low, high = weights.amin(2).clamp(max=0) + 0.0, weights.amax(2).clamp(min=0) + 0.0
    else:
        low = high = weights.new_zeros((experts, rows))
    scales = torch.stack([low, high], 2).to(dtype)
    bad = ~torch.isfinite(scales).all(2)
    if bad.any():
        expert, row = bad.nonzero()[0].tolist()
        raise QMoEError(
            "value",
            f"expert {expert}, row {row}: the weights, up to "
            f"{float(weights[expert, row].abs().max()):g}, are beyond {scale_dtype}; rescale the "
            "model",
        )
    return scales


def _round(w: Tensor, scales: Tensor, trits: Tensor) -> None:
    """Fill int8 ``trits`` [rows, columns] from ``w`` [rows, columns] and ``scales`` [rows, 2]."""
    low, high = scales.to(w.dtype).unbind(1)
    # A scale that has become 0 in its type is worth no trit.
    low = torch.where(low < 0, low / 2, -torch.inf)
    high = torch.where(high > 0, high / 2, torch.inf)
    # With an int8 result torch's comparisons are several times faster than with a bool one.
    torch.gt(w, high[:, None], out=trits)
    trits -= torch.lt(w, low[:, None], out=torch.empty_like(trits))
