"""The paper's recipe (QMoE, arXiv 2310.16795, section 3): GPTQ on each row's low, 0 and high.

Low and high are the row's minimum and maximum, the Hessian is damped by a tenth of its mean
diagonal, columns keep their order, and tokens count alike. Where the Hessian is of no use weights
are rounded to the nearest, as with a Hessian of the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.quantize.gptq import gptq
from qmoe_format.quantize.hessian import Statistics, factored
from qmoe_format.quantize.rtn import min_max, quantize_rtn
from qmoe_format.quantize.ternary import Quantized, TernaryWeights, check_weights

DAMPING = 0.1


def quantize_qmoe(weights: Tensor, scale_dtype: str, statistics: Statistics) -> Quantized:
    """Quantise a batch of experts' matrices ``[experts, rows, columns]``.

    Raises:
        QMoEError: as ``round_to_nearest``.
    """
    check_weights(weights)
    if not weights.numel():
        return quantize_rtn(weights, scale_dtype)
    scales = min_max(weights, scale_dtype)
    ready = factored(statistics, torch.full((len(weights),), DAMPING))
    # GPTQ's decisions do not depend on the unit; of weights near 1 no square overflows.
    largest = weights.abs().amax((1, 2)).double()
    largest = torch.where(largest > 0, largest, 1.0)[:, None]
    low, high = (scales.double() / largest[..., None]).float().unbind(2)
    trits = gptq(
        (weights.double() / largest[..., None]).float().transpose(1, 2).contiguous(),
        ready.factor,
        low.contiguous(),
        high.contiguous(),
    )
    trits = trits.transpose(1, 2).to(torch.int8).contiguous()
    return Quantized(TernaryWeights(trits, scales[:, :, None]), ready.damping, ready.fallback)
