"""The recipe ``moqe``: round to nearest, one scale per output (MoQE, arXiv 2310.02410).

``linear`` is the paper's better grid, with a scale of 2 max |w| / (2^bits - 1). On the grid ``log``
the largest magnitude is max |w|, and each further one half of that before; 0 is not among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.quantize.group_rounding import (
    Round,
    check_choice,
    group_maxima,
    round_batch,
    round_symmetric,
    stored_scales,
)
from qmoe_format.quantize.level_weights import Quantized


def quantize_moqe(weights: Tensor, bits: int = 3, grid: str = "linear") -> Quantized:
    """See ``Recipe.quantize``; a row is one group.

    Args:
        bits: 2, 3, 4 or 8.
        grid: ``linear`` or ``log``.
    """
    check_choice("moqe", "bits", bits, (2, 3, 4, 8))
    check_choice("moqe", "grid", grid, ("linear", "log"))
    round_rows = _round_log(bits) if grid == "log" else round_symmetric(bits, (2**bits - 1) / 2)
    return round_batch(weights, bits, round_rows, grid=grid)


def _round_log(bits: int) -> Round:
    half = 1 << (bits - 1)

    def round_rows(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        scales = stored_scales(group_maxima(w.abs(), group_size))
        # |w| = m scale 2^e with m from 1/2 to 1. Of 2^e and 2^(e - 1), 3/4 2^e is the middle.
        m, e = torch.frexp(w.abs() / scales.to(w.dtype))
        exponents = torch.where(m > 0.75, -e, 1 - e).clamp_(0, half - 1)
        exponents[w == 0] = half - 1
        return exponents + half * (w < 0), scales

    return round_rows
