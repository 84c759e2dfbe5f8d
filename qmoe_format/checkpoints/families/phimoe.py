"""Phi-3.5-MoE: Mixtral's names in the checkpoint, another router in transformers."""

from dataclasses import replace

from qmoe_format.checkpoints.families import mixtral

FAMILY = replace(
    mixtral.FAMILY,
    model_types=("phimoe",),
    router="mlp.router.weight",
    renamed=(*mixtral.FAMILY.renamed, (".router.weight", ".gate.weight")),
)
