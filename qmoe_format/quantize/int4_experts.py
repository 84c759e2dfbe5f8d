"""The recipe ``int4-experts``: 4 bits for experts, one scale per output (arXiv 2211.10017).

As in the code that was published with it (FasterTransformer, ``cutlass_preprocessors.cc``): with a
scale of max |w| / 8, rounded to nearest and clipped to -8 to 7, so that the greatest magnitude is
exact if it is negative, and one step smaller if it is positive.
"""

from __future__ import annotations

from torch import Tensor

from qmoe_format.quantize.group_rounding import round_batch, round_symmetric
from qmoe_format.quantize.level_weights import Quantized


def quantize_int4_experts(weights: Tensor) -> Quantized:
    """See ``Recipe.quantize``; a row is one group."""
    return round_batch(weights, 4, round_symmetric(4, 8))
