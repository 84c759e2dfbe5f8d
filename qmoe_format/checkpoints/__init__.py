"""Hugging Face checkpoints, read one tensor at a time.

Reading needs torch and safetensors; an ``Adapter``, which knows names only, does not.

``open_checkpoint(folder)`` finds the weights, learns from ``config.json`` which family the model is
of, and lets that family's adapter say which tensors are experts. Reading is lazy: memory does not
grow with the model.
"""

from qmoe_format.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qmoe_format.checkpoints.expert_stacks import Adapter, ExpertStack, TensorInfo
from qmoe_format.checkpoints.families import ADAPTERS, adapter_for
from qmoe_format.checkpoints.layers import check_layers

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Checkpoint",
    "ExpertStack",
    "TensorInfo",
    "adapter_for",
    "check_layers",
    "open_checkpoint",
]
