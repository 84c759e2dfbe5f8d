"""Mixtral (arXiv 2401.04088): top-2, gated SiLU.

``w1`` (gate) and ``w3`` (up) are [intermediate, hidden], ``w2`` (down) is [hidden, intermediate].
"""

import re

from qmoe_format.checkpoints.stacks import NUMBER, Adapter

ADAPTER = Adapter(
    family="Mixtral",
    model_types=("mixtral",),
    expert=re.compile(
        rf"(?P<head>(?:.+\.)?block_sparse_moe\.experts)\.{NUMBER}\.(?P<matrix>w[123])\.weight"
    ),
    members="{head}.{{}}.{matrix}.weight",
    matrices=("w1", "w2", "w3"),
    router=re.compile(r"(?P<layer>(?:.+\.)?block_sparse_moe\.)gate\.weight"),
    expert_count="num_local_experts",
)
