"""Tensors that are kept as they are: checked before the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.checkpoints.torch_dtypes import TORCH_DTYPES
from qmoe_format.conversion.passthrough import check_passthrough
from tests.refusals import refusal

Make = Callable[..., Path]
WRONG = [
    (dtype, wrong)
    for dtype in TORCH_DTYPES.values()
    for wrong in (math.nan, math.inf, -math.inf)
    # Integers have none, F8_E4M3 no infinity.
    if dtype.is_floating_point and not torch.tensor(wrong).to(dtype).double().isfinite()
]


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_finite_elements_of_every_type(switch: Make, dtype: torch.dtype) -> None:
    def change(state: dict[str, Any]) -> None:
        state["shared.weight"] = torch.arange(7).to(dtype)
        state["empty"] = torch.zeros(0, 3).to(dtype)

    with open_checkpoint(switch(change)) as checkpoint:
        check_passthrough(checkpoint)


@pytest.mark.parametrize(("dtype", "wrong"), WRONG, ids=str)
def test_others(switch: Make, dtype: torch.dtype, wrong: float) -> None:
    """Wherever they are."""
    for place in (0, 4, 6):

        def change(state: dict[str, Any], place: int = place) -> None:
            values = torch.arange(7.0)
            values[place] = wrong
            state["shared.weight"] = values.to(dtype)

        with open_checkpoint(switch(change, name=f"at-{place}")) as checkpoint:
            said = refusal(lambda: check_passthrough(checkpoint, chunk_elements=3), "value")
            assert "tensor 'shared.weight': an element is NaN or infinite" in said
