"""Every family: a model with compressed experts does what the same one with dense weights does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qmoe_format
from qmoe_format.checkpoints import FAMILIES
from tests.runtime.conftest import Converted
from tests.runtime.models import from_pretrained, generated, logits


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_like_the_dequantized_model(model_type: str, converted: Callable[[str], Converted]) -> None:
    files = converted(model_type)
    model = qmoe_format.load_model(files.file)
    dense = from_pretrained(files.dense)
    assert model.dtype == torch.float32
    with torch.no_grad():
        found, expected = logits(model), logits(dense)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert found.std() > 1e-3
    assert generated(model) == generated(dense)
    assert torch.equal(logits(from_pretrained(files.folder)), logits(model))
