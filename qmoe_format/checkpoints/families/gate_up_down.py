"""The names most families have taken: gated experts, each with the names of a dense layer.

``gate_proj`` and ``up_proj`` are [intermediate, hidden], ``down_proj`` is [hidden, intermediate].
Shared experts, which see every token, are no experts here: they have other names and stay as they
are.
"""

from qmoe_format.checkpoints.expert_stacks import Adapter

ADAPTER = Adapter(
    model_types=("deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"),
    head="mlp.experts",
    tensor="{head}.{number}.{matrix}.weight",
    matrices=("down_proj", "gate_proj", "up_proj"),
    router="mlp.gate.weight",
)
