"""Hugging Face checkpoints, read one tensor at a time.

``open_checkpoint(folder)`` builds transformers' model of it, without weights, and learns from that
which tensors are experts and how they compute. Reading is lazy: memory does not grow with the
model. Needs torch, transformers and safetensors.
"""

from qmoe_format.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qmoe_format.checkpoints.expert_stacks import ExpertStack, LayerStacks
from qmoe_format.checkpoints.tensor_info import TensorInfo

__all__ = ["Checkpoint", "ExpertStack", "LayerStacks", "TensorInfo", "open_checkpoint"]
