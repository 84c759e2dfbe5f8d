"""Granite's names: one tensor holds a matrix of all experts of a layer.

``input_linear`` is [experts, 2 × intermediate, hidden], the rows of the gate above those of up;
``output_linear`` is [experts, hidden, intermediate].
"""

from qmoe_format.checkpoints.expert_stacks import Adapter

ADAPTER = Adapter(
    model_types=("granitemoe",),
    head="block_sparse_moe",
    tensor="{head}.{matrix}.weight",
    matrices=("input_linear", "output_linear"),
    router="block_sparse_moe.router.layer.weight",
)
