"""What tests of whole models have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qmoe_format.checkpoints.model import model_class
from tests.tiny_models import load_config

PADDED = {
    "input_ids": torch.tensor([[5, 9, 17, 33, 8, 21, 3, 40], [0, 0, 0, 12, 50, 7, 7, 30]]),
    "attention_mask": torch.tensor([[1] * 8, [0] * 3 + [1] * 5]),
}
"""Two sequences, the second padded on the left."""


def from_pretrained(folder: Path, **options: Any) -> Any:
    return model_class(load_config(folder)).from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    """Of ``PADDED``, where nothing is padded: [tokens, vocabulary]."""
    model = getattr(model, "thinker", model)  # that of Qwen3-Omni which returns text
    inputs = dict(PADDED)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = PADDED["input_ids"].clamp(min=3)
        found: torch.Tensor = model(**inputs).logits
        return found.flatten(0, 1)
    found = model(**inputs).logits
    return found[PADDED["attention_mask"].bool()]


def generated(model: Any, **options: Any) -> list[list[int]]:
    """Greedy, 12 tokens."""
    tokens: list[list[int]] = model.generate(
        **PADDED, do_sample=False, max_new_tokens=12, min_new_tokens=12, **options
    ).tolist()
    return tokens
