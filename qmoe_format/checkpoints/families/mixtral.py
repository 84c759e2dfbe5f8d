"""Mixtral (arXiv 2401.04088): gated experts whose matrices have numbers.

``w1`` (gate) and ``w3`` (up) are [intermediate, hidden], ``w2`` (down) is [hidden, intermediate].
"""

from qmoe_format.checkpoints.family import Family

FAMILY = Family(
    model_types=("mixtral",),
    experts="mlp.experts",
    router="mlp.gate.weight",
    tensor="{prefix}.{number}.{matrix}.weight",
    inputs=("w1", "w3"),
    output="w2",
    renamed=((".mlp.", ".block_sparse_moe."),),
)
