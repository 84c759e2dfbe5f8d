"""gpt-oss: one tensor holds a matrix of all experts of a layer, transposed; each has a bias.

``gate_up_proj`` is [experts, hidden, 2 × intermediate] on disk, columns of gate and up in turn;
``down_proj`` is [experts, intermediate, hidden].
"""

from qmoe_format.checkpoints.expert_stacks import Adapter

ADAPTER = Adapter(
    model_types=("gpt_oss",),
    head="mlp.experts",
    tensor="{head}.{matrix}",
    matrices=("down_proj", "gate_up_proj"),
    router="mlp.router.weight",
    transposed=True,
    biases=("down_proj_bias", "gate_up_proj_bias"),
)
