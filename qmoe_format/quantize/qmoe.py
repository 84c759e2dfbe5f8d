"""The recipe ``qmoe``, the paper's (QMoE, arXiv 2310.16795, section 3).

GPTQ on each row's low, 0 and high, the minimum and maximum of its weights. The damping is a tenth
of the Hessian's mean diagonal, columns keep their order, and all tokens count alike. An expert
without a usable Hessian is rounded to nearest, which is what GPTQ does with the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmoe_format.quantize.gptq import gptq
from qmoe_format.quantize.grids import LowHigh
from qmoe_format.quantize.hessian import Statistics, factored
from qmoe_format.quantize.level_weights import LevelWeights, Quantized, check_weights, normalized
from qmoe_format.quantize.rtn import min_max, quantize_rtn

DAMPING = 0.1


def quantize_qmoe(weights: Tensor, statistics: Statistics) -> Quantized:
    """See ``Recipe.quantize``. The scales are those of ``round_to_nearest``."""
    check_weights(weights)
    if not weights.numel():
        return quantize_rtn(weights)
    scales = min_max(weights)
    ready = factored(statistics, torch.full((len(weights),), DAMPING))
    scaled, largest = normalized(weights)  # the unit changes no decision of GPTQ
    low, high = (scales.double() / largest[:, None, None]).float().unbind(2)
    levels = gptq(scaled, ready.factor, LowHigh(low.contiguous(), high.contiguous()))
    levels = levels.transpose(1, 2).to(torch.int8).contiguous()
    return Quantized(LevelWeights(levels, scales), ready.damping, ready.fallback)
