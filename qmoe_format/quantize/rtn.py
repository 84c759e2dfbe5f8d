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

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_format.errors import QMoEError

SCALE_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BLOCK_ELEMENTS = 1 << 18  # so few stay in the cache


@dataclass(frozen=True, slots=True)
class TernaryWeights:
    """A batch of quantised matrices; trit 0 is 0, +1 is the row's high, -1 its low.

    Attributes:
        trits: int8 ``[experts, rows, columns]`` of -1, 0 and 1; 0 wherever the value is 0.
        scales: the scales' type, ``[experts, rows, groups, 2]`` of low <= 0 and high >= 0.
    """

    trits: Tensor
    scales: Tensor


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
    if weights.ndim != 3 or not weights.dtype.is_floating_point or weights.itemsize < 2:
        raise QMoEError(
            "argument",
            f"weights are {weights.dtype} {list(weights.shape)}; round_to_nearest needs floats of "
            "16 to 64 bits in [experts, rows, columns]",
        )
    if scale_dtype not in SCALE_TYPES:
        raise QMoEError(
            "argument", f"scale_dtype {scale_dtype!r} is not one of {', '.join(SCALE_TYPES)}"
        )
    experts, rows, columns = weights.shape
    # float32 holds every bfloat16 and float16 number and its half.
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    trits = weights.new_empty((experts, rows, columns), dtype=torch.int8)
    scales = weights.new_zeros((experts, rows, 1, 2), dtype=SCALE_TYPES[scale_dtype])
    block = max(1, BLOCK_ELEMENTS // max(1, columns))
    for expert in range(experts if columns else 0):
        for start in range(0, rows, block):
            part = slice(start, start + block)
            rows_of_block = weights[expert, part].to(wide)
            _round_rows(rows_of_block, trits[expert, part], scales[expert, part, 0])
        bad = ~torch.isfinite(scales[expert]).flatten(1).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise _unusable(weights[expert, row], expert, row, scale_dtype)
    return TernaryWeights(trits, scales)


def _round_rows(w: Tensor, trits: Tensor, scales: Tensor) -> None:
    """Fill int8 ``trits`` [rows, columns] and ``scales`` [rows, 2] from ``w`` [rows, columns]."""
    # NaN and infinity pass through the extremes. Adding 0 makes -0 a +0: which zero a minimum
    # returns depends on the order of evaluation, and the file's bytes must not.
    scales[:, 0] = w.amin(1).clamp(max=0) + 0.0
    scales[:, 1] = w.amax(1).clamp(min=0) + 0.0
    low, high = scales.to(w.dtype).unbind(1)
    # A scale that has become 0 in its type is worth no trit.
    low = torch.where(low < 0, low / 2, -torch.inf)
    high = torch.where(high > 0, high / 2, torch.inf)
    # With an int8 result torch's comparisons are several times faster than with a bool one.
    torch.gt(w, high[:, None], out=trits)
    trits -= torch.lt(w, low[:, None], out=torch.empty_like(trits))


def _unusable(row: Tensor, expert: int, number: int, scale_dtype: str) -> QMoEError:
    bad = ~torch.isfinite(row)
    if bad.any():
        column = int(bad.nonzero()[0])
        return QMoEError(
            "value",
            f"expert {expert}, row {number}, column {column}: the weight is {float(row[column])}; "
            "repair the model",
        )
    return QMoEError(
        "value",
        f"expert {expert}, row {number}: the weights, up to {float(row.abs().max()):g}, are beyond "
        f"{scale_dtype}; rescale the model",
    )
