"""Switch Transformers (arXiv 2101.03961): top-1, ReLU.

``wi`` is [d_ff, d_model], ``wo`` [d_model, d_ff]. Sparse layers are ``layer.1`` of a block in the
encoder and ``layer.2`` in the decoder.
"""

import re

from qmoe_format.checkpoints.stacks import NUMBER, Adapter

ADAPTER = Adapter(
    family="Switch Transformers",
    model_types=("switch_transformers",),
    expert=re.compile(
        rf"(?P<head>(?:.+\.)?mlp\.experts)\.expert_{NUMBER}\.(?P<matrix>wi|wo)\.weight"
    ),
    members="{head}.expert_{{}}.{matrix}.weight",
    matrices=("wi", "wo"),
    router=re.compile(r"(?P<layer>(?:.+\.)?mlp\.)router\.classifier\.weight"),
    expert_count="num_experts",
)
