"""gpt-oss: one tensor holds a matrix of all experts of a layer, transposed; each has a bias.

``gate_up_proj`` is [experts, hidden, 2 × intermediate] in the checkpoint, columns of gate and up
alternating; ``down_proj`` is [experts, intermediate, hidden].
"""

from qmoe_format.checkpoints.family import Family

FAMILY = Family(
    model_types=("gpt_oss",),
    experts="mlp.experts",
    router="mlp.router.weight",
    tensor="{prefix}.{matrix}",
    inputs=("gate_up_proj",),
    output="down_proj",
    transposed=True,
    biases=("down_proj_bias", "gate_up_proj_bias"),
    activation=None,
)
