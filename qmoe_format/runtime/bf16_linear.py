"""Linear layers in bf16, for one token on a CPU.

What surrounds the experts reads each weight once a token, at best at the speed of memory. torch's
products of one row come near that in float32; in bf16 they take about as long for half the bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qmoe_format.codec.threads import share

_LEAST = 1 << 16  # weights: products of fewer are as fast in torch
_PER_THREAD = 1 << 19  # weights that keep a thread busy for much longer than it takes to start it
_PARTS = 4  # of the rows, for each thread


class Bf16Linear(nn.Linear):
    """``nn.Linear`` with a faster product of one token; sums are float32, as in torch."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        fast = (
            x.numel() == self.in_features
            and x.dtype == weight.dtype == torch.bfloat16
            and x.device.type == weight.device.type == "cpu"
            and weight.is_contiguous()
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        )
        return self._multiply(x) if fast else super().forward(x)

    def _multiply(self, x: Tensor) -> Tensor:
        from qmoe_format.runtime.kernels.bf16 import multiply_bf16

        rows, columns = self.weight.shape
        values, y = x.to(torch.float32).contiguous(), torch.empty(rows, dtype=torch.float32)
        threads = min(torch.get_num_threads(), 1 + rows * columns // _PER_THREAD)
        parts = 1 if threads == 1 else _PARTS * threads
        addresses = [self.weight.data_ptr(), rows, columns, values.data_ptr(), y.data_ptr()]
        share(multiply_bf16(), np.array([0, parts, *addresses]), threads)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], rows)


def speed_up_linear(model: Any) -> None:
    """Let a model's own linear layers in bf16 on a CPU be ``Bf16Linear``."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= _LEAST:
            weight = module.weight
            if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
                module.__class__ = Bf16Linear
