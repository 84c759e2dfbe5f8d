"""Models whose blocks hand on which positions a token may attend to, as GLM-5's do.

In a sequence no longer than that choice, all positions are chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qmoe_format.checkpoints.family import Family
from qmoe_format.errors import QMoEError


def _pass_through(block: Any, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
    config = getattr(block.self_attn, "config", None)
    if config is None or "shared" not in config.indexer_types:  # no block uses what it is handed
        return hidden, None
    sequences, length = hidden.shape[:2]
    chosen = config.index_topk
    if length > chosen:
        raise QMoEError(
            "argument",
            f"a sequence has {length} tokens, but blocks of this model attend to {chosen} at most, "
            "chosen by the block before",
            f"give --sequence-length {chosen}",
        )
    every = torch.arange(length, device=hidden.device)
    return hidden, every.expand(sequences, length, length)


FAMILY = Family(
    model_types=("glm5_next_text", "glm_moe_dsa", "hy_v4", "mistral_large4_text"),
    pass_through=_pass_through,
)
