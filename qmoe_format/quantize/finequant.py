"""The recipe ``finequant``: groups as small as each matrix needs (FineQuant, arXiv 2308.09723).

Outliers make the scale of a whole row too coarse for its other weights. The paper finds the
granularity of each matrix from its weights alone: it makes groups smaller while that shrinks their
ranges. This is the simplest reading of it: from a row to 128, 64 and 32 columns, as long as each
step brings the mean over all groups of max |w|, to which errors are proportional, below ``SHRINKS``
of what it was.

(With independent normal weights, groups of 128 have 0.75 of a long row's maximum, and those of 64
and 32 have 0.9 of the one before.)
"""

from __future__ import annotations

from torch import Tensor

from qmoe_format.quantize.group_rounding import (
    check_choice,
    group_maxima,
    round_batch,
    round_symmetric,
)
from qmoe_format.quantize.level_weights import Quantized, check_weights

SHRINKS = 0.9
GROUP_SIZES = (128, 64, 32)


def quantize_finequant(weights: Tensor, bits: int = 4) -> Quantized:
    """See ``Recipe.quantize``.

    Args:
        bits: 4 or 8; the largest magnitude is the largest integer, 7 or 127.
    """
    check_choice("finequant", "bits", bits, (4, 8))
    check_weights(weights)
    sizes = [granularity(matrix) for matrix in weights]
    return round_batch(weights, bits, round_symmetric(bits, 2 ** (bits - 1) - 1), sizes)


def granularity(weights: Tensor) -> int:
    """The group size for a matrix ``[rows, columns]``; 0 for whole rows."""
    chosen = 0
    if not weights.numel():
        return chosen
    size = weights.abs()
    before = size.amax(1).double().mean()
    for group_size in GROUP_SIZES:
        if group_size >= weights.shape[1]:
            continue
        mean = group_maxima(size, group_size).double().mean()
        if not mean < SHRINKS * before:
            break
        chosen, before = group_size, mean
    return chosen
