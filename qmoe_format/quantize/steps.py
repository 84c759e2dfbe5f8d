"""Where the recipe ``rd`` takes its inner steps."""

from __future__ import annotations

from types import ModuleType

import torch


def steps_on(device: torch.device) -> ModuleType:
    """``cpu_steps`` or ``gpu_steps``, which have the same functions."""
    if device.type == "cpu":
        from qmoe_format.quantize import cpu_steps

        return cpu_steps
    from qmoe_format.quantize import gpu_steps

    return gpu_steps
