"""Models of transformers whose experts stay compressed (needs torch and transformers).

    from qmoe_format.runtime import load_model, load_tokenizer

    model = load_model("model.qmoe")
    tokenizer = load_tokenizer("model.qmoe")

Importing this also lets ``from_pretrained`` load the folders that ``qmoe unpack --compressed``
writes, and ``save_pretrained`` write them. For such models, ``place_experts`` does what
``expert_memory`` and ``exact`` do for ``load_model``.
"""

from qmoe_format.machine import require

require("torch", "safetensors", "transformers")

from qmoe_format.runtime.expert_memory import place_experts  # noqa: E402
from qmoe_format.runtime.loading import load_model  # noqa: E402
from qmoe_format.runtime.plugin import QMoEConfig  # noqa: E402
from qmoe_format.runtime.tokenizer import load_tokenizer  # noqa: E402

__all__ = ["QMoEConfig", "load_model", "load_tokenizer", "place_experts"]
