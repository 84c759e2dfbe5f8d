"""Mixtral's names (arXiv 2401.04088): gated experts of three matrices with numbers.

``w1`` (gate) and ``w3`` (up) are [intermediate, hidden], ``w2`` (down) is [hidden, intermediate].
"""

from qmoe_format.checkpoints.expert_stacks import Adapter

ADAPTER = Adapter(
    model_types=("mixtral", "phimoe"),
    head="block_sparse_moe.experts",
    tensor="{head}.{number}.{matrix}.weight",
    matrices=("w1", "w2", "w3"),
    router="block_sparse_moe.gate.weight",
)
