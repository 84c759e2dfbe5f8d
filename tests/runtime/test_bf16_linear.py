"""Linear layers in bf16 with one token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qmoe_format
from qmoe_format.runtime.bf16_linear import Bf16Linear, speed_up_linear
from tests.runtime.conftest import Converted
from tests.runtime.files import random


def layer(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=bias, dtype=torch.bfloat16)
    made.weight.data = random(rows, columns).bfloat16()
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product by the kernel."""
    made: list[int] = []
    multiply = Bf16Linear._multiply

    def counted(self: Bf16Linear, x: torch.Tensor) -> torch.Tensor:
        made.append(self.out_features)
        return multiply(self, x)

    monkeypatch.setattr(Bf16Linear, "_multiply", counted)
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 1040), (701, 1001), (3, 40000), (20001, 5)])
def test_products(
    rows: int,
    columns: int,
    bias: bool,
    threads: int,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    one = layer(rows, columns, bias)
    x = random(1, 1, columns, seed=1).bfloat16()
    want = x.double() @ one.weight.double().T
    if one.bias is not None:
        want += one.bias.double()
    speed_up_linear(one)
    with torch.no_grad():
        y = one(x)
    assert calls == [rows]
    assert (y.shape, y.dtype) == ((1, 1, rows), torch.bfloat16)
    torch.testing.assert_close(y.double(), want.detach(), rtol=2**-8, atol=1e-4 * columns**0.5)


def test_when_torch_multiplies(calls: list[int]) -> None:
    """Several tokens, other types, and where a gradient is wanted."""
    one = layer(300, 300)
    want = {
        tokens: one(random(tokens, 300).bfloat16()).detach() for tokens in (0, 2, 1)
    }  # with gradients of the weights
    speed_up_linear(one)
    for tokens, y in want.items():
        assert torch.equal(one(random(tokens, 300).bfloat16()), y)
    with torch.no_grad():
        for tokens in (0, 2):
            assert torch.equal(one(random(tokens, 300).bfloat16()), want[tokens])
    assert not calls
    one.weight.requires_grad_(False)
    x = random(1, 300).bfloat16().requires_grad_()
    one(x).sum().backward()
    assert x.grad is not None
    assert not calls
    one.float()(random(1, 300))
    assert not calls


def test_which_layers() -> None:
    class Own(nn.Linear):
        pass

    own = Own(300, 300, dtype=torch.bfloat16)
    model = nn.ModuleList([layer(300, 300), layer(8, 300), nn.Linear(300, 300), own])
    speed_up_linear(model)
    assert [type(each) for each in model] == [Bf16Linear, nn.Linear, nn.Linear, Own]
    assert model[0].weight is model.state_dict(keep_vars=True)["0.weight"]


def test_a_model(converted: Callable[[str], Converted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmoe_format.runtime.bf16_linear._LEAST", 1)
    file = converted("mixtral").file
    ids = torch.arange(3, 13)[None]
    model = qmoe_format.load_model(file, dtype=torch.bfloat16)
    kinds = {type(each) for each in model.modules() if isinstance(each, nn.Linear)}
    assert kinds == {Bf16Linear}
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        logits = model(ids[:, :1], past_key_values=cache).logits
        for each in model.modules():
            if isinstance(each, Bf16Linear):
                each.__class__ = nn.Linear  # type: ignore[assignment]
        cache = model(ids, use_cache=True).past_key_values
        torch.testing.assert_close(
            logits, model(ids[:, :1], past_key_values=cache).logits, rtol=0.05, atol=0.02
        )
