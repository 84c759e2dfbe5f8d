"""Which experts are packed, and that it changes nothing but speed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from qmoe_format import QMoEFile, codec
from qmoe_format.codec import EncodedMatrix, encode_matrix
from qmoe_format.runtime import expert_memory, load_model
from qmoe_format.runtime.expert_memory import expert_cache, hot_experts
from qmoe_format.runtime.experts import CompressedExperts
from qmoe_format.runtime.grouped_linear import Group, grouped_linear
from qmoe_format.runtime.hot_experts import HotExperts
from qmoe_format.runtime.lazy_stack import LazyStack
from qmoe_format.runtime.tuning import Tuning
from tests.runtime.conftest import Converted
from tests.runtime.files import EXPERTS, HIDDEN, random

WORTH = 8  # tokens that pay for packing


@pytest.fixture(scope="module")
def matrix() -> EncodedMatrix:
    levels = np.random.default_rng(0).integers(-1, 2, (8, 256), dtype=np.int8)
    return encode_matrix(levels, np.full((8, 1), 0x3F80, np.uint16))


@pytest.fixture(scope="module")
def size(matrix: EncodedMatrix) -> int:
    return codec.pack(matrix).nbytes


def test_what_is_used_enough_is_packed_once(matrix: EncodedMatrix, size: int) -> None:
    hot = HotExperts(10 * size)
    for _ in range(WORTH - 1):
        assert hot.find(("a", 0), matrix, 1, 1) is None
    packed = hot.find(("a", 0), matrix, 1, 1)
    assert packed
    assert hot.find(("a", 0), matrix, 1, 1) is packed
    assert hot.find(("a", 1), matrix, 1, 1) is None
    assert hot.find(("b", 0), matrix, WORTH, 1) is not packed
    assert hot.bytes == 2 * size
    counters = hot.counters
    assert (counters.hot, counters.cold, counters.packed, counters.evicted) == (1, 8, 2, 0)


def test_many_tokens_are_worth_packing_without_room(matrix: EncodedMatrix) -> None:
    hot = HotExperts(0)
    first = hot.find(("a", 0), matrix, WORTH, 1)
    assert first
    assert hot.find(("a", 0), matrix, WORTH, 1) is not first
    assert hot.find(("a", 0), matrix, 1, 1) is None
    assert hot.bytes == 0


def test_experts_of_a_token_are_there_all_or_not(matrix: EncodedMatrix, size: int) -> None:
    hot = HotExperts(10 * size)
    first, second = (hot.find(("a", expert), matrix, WORTH, 1) for expert in (0, 1))
    assert hot.kept([("a", 1), ("a", 0)]) == [second, first]
    assert hot.counters.hot == 2
    assert hot.kept([("a", 1), ("a", 2)]) is None
    assert hot.counters.hot == 2


def test_what_is_used_much_less_makes_room(matrix: EncodedMatrix, size: int) -> None:
    hot = HotExperts(2 * size + 100)
    for expert, tokens in ((0, 100), (1, 10)):
        assert hot.find(("a", expert), matrix, tokens, 1)
    for _ in range(3):  # not used twice as much as either
        assert hot.find(("a", 2), matrix, 5, 1) is None
    for _ in range(2):  # one look at the first, one at the second
        found = hot.find(("a", 2), matrix, 5, 1)
    assert found
    assert hot.counters.evicted == 1
    assert hot.bytes == 2 * size
    assert hot.find(("a", 0), matrix, 1, 1)
    assert hot.find(("a", 1), matrix, 1, 1) is None


def test_old_uses_fade(matrix: EncodedMatrix, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmoe_format.runtime.hot_experts._HALF_LIFE", 10)
    hot = HotExperts(size + 100)
    hot.find(("a", 0), matrix, 1000, 1)
    calls = 0
    while hot.find(("a", 1), matrix, 2, 1) is None:
        calls += 1
    assert 10 < calls < 100


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=80), st.integers(0, 6))
@settings(deadline=None, max_examples=30)
def test_the_budget_holds(
    matrix: EncodedMatrix, size: int, uses: list[tuple[int, int]], room: int
) -> None:
    hot = HotExperts(room * size)
    for expert, tokens in uses:
        hot.find(("a", expert), matrix, tokens, 1)
        assert hot.bytes <= hot.budget
        assert hot.bytes == sum(each.nbytes for each in hot._kept.values())


def test_threads(matrix: EncodedMatrix, size: int) -> None:
    hot = HotExperts(3 * size)

    def use(number: int) -> None:
        hot.find(("a", number % 5), matrix, 9, 1)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(300)))
    assert hot.bytes == sum(each.nbytes for each in hot._kept.values()) <= hot.budget


@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_products_are_the_same_packed_or_not(file: QMoEFile, tokens: int) -> None:
    """Up to the order of float32 sums; and near those with x that is not rounded."""
    x = random(tokens, HIDDEN)

    def product(hot: HotExperts | None, times: int = 1) -> torch.Tensor:
        stack = LazyStack(file, "gate")
        stack.hot = hot
        for _ in range(times):
            y = grouped_linear([stack], x, [Group(1, 0, tokens)], Tuning())
        return y

    kept, never = HotExperts(1 << 30), HotExperts(0)
    y = product(kept, 2 * WORTH)
    torch.testing.assert_close(y, product(never), rtol=1e-4, atol=1e-5)
    exact = product(None)
    if codec.packable(file.encoded("gate", 1)):
        assert kept.bytes
        assert not torch.equal(y, exact)
        torch.testing.assert_close(y, exact, rtol=0.1, atol=0.03 * float(exact.abs().max()))
    else:
        assert not kept.bytes
        assert torch.equal(y, exact)


def silu_gate(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("inputs", [("gate", "up"), ("gate_up",)])
def test_one_token_takes_one_kernel(
    file: QMoEFile, inputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its experts are packed; the result is the same."""
    whole = Mock(wraps=codec.multiply_gated)
    monkeypatch.setattr(codec, "multiply_gated", whole)
    hot = HotExperts(1 << 30)
    packable = codec.packable(file.encoded("gate", 1))

    def layer(silu: bool) -> CompressedExperts:
        stacks = [LazyStack(file, name) for name in (*inputs, "down")]
        for stack in stacks:
            stack.hot = hot
        return CompressedExperts(tuple(stacks[:-1]), stacks[-1], silu_gate=silu)

    fast, slow = layer(True), layer(False)
    x, weights = random(1, HIDDEN), torch.tensor([[0.7, 0.3, 0.5]])
    for index in ([1, 4, EXPERTS], [EXPERTS, 4, 0], [EXPERTS] * 3):
        chosen = torch.tensor([index])
        with torch.no_grad():
            for _ in range(WORTH):
                want = slow.forward(x, chosen, weights, silu_gate)
            for _ in range(2):
                before = hot.counters.hot, whole.call_count
                y = fast.forward(x, chosen, weights, silu_gate)
                torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
                experts = sum(each < EXPERTS for each in index)
                used = packable * (len(inputs) + 1) * experts
                assert (hot.counters.hot, whole.call_count) == (
                    before[0] + used,
                    before[1] + bool(used),
                )
            half = fast.forward(x.bfloat16(), chosen, weights.bfloat16(), silu_gate)
        assert half.dtype == torch.bfloat16
        assert (half - want).abs().max() <= 0.05 * want.abs().max()
        chosen_twice = chosen.expand(2, -1)
        calls = whole.call_count
        fast.forward(x.expand(2, -1), chosen_twice, weights.expand(2, -1), silu_gate)
        fast.forward(x.clone().requires_grad_(), chosen, weights, silu_gate)
        assert whole.call_count == calls


def test_gradients_belong_to_exact_products(file: QMoEFile) -> None:
    stack = LazyStack(file, "gate")
    groups = [Group(0, 0, 9)]
    x = random(9, HIDDEN).requires_grad_()
    exact = grouped_linear([stack], x, groups, Tuning())
    stack.hot = HotExperts(1 << 30)
    assert torch.equal(grouped_linear([stack], x, groups, Tuning()), exact)


def test_a_models_experts(
    converted: Callable[[str], Converted], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral_file = converted("mixtral").file
    monkeypatch.setattr(expert_memory, "HotExperts", HotExperts)
    monkeypatch.setattr(expert_memory, "available_memory", lambda: 1 << 30)
    ids = torch.arange(3, 23)[None]
    exact, rounded, small = (
        load_model(mixtral_file, dtype=torch.float32, **options)
        for options in ({"exact": True}, {}, {"expert_memory": 2000})
    )
    assert hot_experts(exact) is None
    with torch.no_grad():
        logits = [model(ids).logits for model in (exact, rounded, small)]
    hot = hot_experts(rounded)
    assert hot
    assert (1 << 28) < hot.budget < (1 << 29)
    assert hot.bytes
    assert expert_cache(rounded) is None
    assert expert_cache(small)
    none = hot_experts(small)
    assert none
    assert none.budget == 0
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-3, atol=1e-4)
    assert not torch.equal(*logits[:2])
    torch.testing.assert_close(*logits[:2], rtol=0.1, atol=0.1)
