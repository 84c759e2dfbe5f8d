"""Hugging Face checkpoints, read one tensor at a time.

``open_checkpoint(folder)`` finds the weights, learns from ``config.json`` which family the model
belongs to, and from the ``Family`` which tensors are experts. Reading is lazy: memory does not grow
with the model. It needs torch and safetensors; the records of the families do not.
"""

from qmoe_format.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qmoe_format.checkpoints.expert_stacks import ExpertStack, TensorInfo
from qmoe_format.checkpoints.families import FAMILIES, family_for
from qmoe_format.checkpoints.family import Family
from qmoe_format.checkpoints.layers import check_layers

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "ExpertStack",
    "Family",
    "TensorInfo",
    "check_layers",
    "family_for",
    "open_checkpoint",
]
