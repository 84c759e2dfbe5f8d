"""The names that most families use: gated experts, each with the matrices of a dense layer.

``gate_proj`` and ``up_proj`` are [intermediate, hidden], ``down_proj`` is [hidden, intermediate].
Shared experts, which see every token, have other names and stay as they are.
"""

from qmoe_format.checkpoints.family import Family

FAMILY = Family(
    model_types=("deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"),
    experts="mlp.experts",
    router="mlp.gate.weight",
    tensor="{prefix}.{number}.{matrix}.weight",
    inputs=("gate_proj", "up_proj"),
    output="down_proj",
)
