"""The two trained models that lie beside the repository, with all experts ternary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qmoe_format
from tests.runtime.models import from_pretrained

PROMPTS = [
    "In the beginning God created the heaven and the earth.",
    "And David took the head of the Philistine, and brought it to Jerusalem; but he put",
    "For God so loved",
]


@pytest.mark.parametrize("name", ["switch-mini", "mixtral-mini"])
@torch.no_grad()
def test_logits_and_generations_of_the_dequantized_model(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    file = qmoe_format.convert(shared_data / name, tmp_path / "m.qmoe")
    dense = from_pretrained(qmoe_format.unpack(file, tmp_path / "dense"), dtype=torch.float32)
    model = qmoe_format.load_model(file, dtype=torch.float32)
    tokenizer = qmoe_format.load_tokenizer(file)
    tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    real = inputs["attention_mask"].bool()
    decoded = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    found, expected = (each(**inputs, **decoded).logits[real] for each in (model, dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    options = {"do_sample": False, "max_new_tokens": 30}
    assert torch.equal(model.generate(**inputs, **options), dense.generate(**inputs, **options))
