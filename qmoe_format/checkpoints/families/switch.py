"""Switch Transformers (arXiv 2101.03961): top-1, ReLU.

``wi`` is [d_ff, d_model], ``wo`` [d_model, d_ff]. Sparse layers are ``layer.1`` of a block in the
encoder and ``layer.2`` in the decoder.
"""

from qmoe_format.checkpoints.expert_stacks import Adapter

ADAPTER = Adapter(
    model_types=("switch_transformers",),
    head="mlp.experts",
    tensor="{head}.expert_{number}.{matrix}.weight",
    matrices=("wi", "wo"),
    router="mlp.router.classifier.weight",
)
