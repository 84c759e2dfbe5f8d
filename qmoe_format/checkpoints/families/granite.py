"""Granite: one tensor holds a matrix of all experts of a layer.

``input_linear`` is [experts, 2 × intermediate, hidden], the gate's rows above those of up;
``output_linear`` is [experts, hidden, intermediate].
"""

from qmoe_format.checkpoints.family import Family

FAMILY = Family(
    model_types=("granitemoe",),
    experts="block_sparse_moe.experts",
    router="block_sparse_moe.router.weight",
    tensor="{prefix}.{matrix}.weight",
    inputs=("input_linear",),
    output="output_linear",
    renamed=(
        (".block_sparse_moe.experts", ".block_sparse_moe"),
        (".router.weight", ".router.layer.weight"),
    ),
)
