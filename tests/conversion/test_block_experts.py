"""A block's experts and their tokens; gate and up in one matrix are as if they were two."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.conversion.parallel import Resources
from qmoe_format.quantize.rate import weighted_energies
from tests.conversion.conftest import EXPERTS, HIDDEN, NORMS, TOKENS, Block
from tests.tiny_models import save_model

EVERY = range(EXPERTS)
BLOCK = "model.layers.0.block_sparse_moe"
W1, W2, W3 = (f"{BLOCK}.experts.{name}" for name in ("w1", "w2", "w3"))
INPUT, OUTPUT = (f"{BLOCK}.{name}_linear.weight" for name in ("input", "output"))
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def everything(experts: BlockExperts) -> list[Tensor]:
    """All that is computed from the tokens of all experts."""
    weights, outputs = experts.weights(EVERY), torch.zeros(TOKENS, HIDDEN)
    experts.add_outputs(weights, EVERY, outputs)
    energies, importance = experts.measure(weights, EVERY, NORMS)
    return [
        outputs,
        *energies.values(),
        importance,
        *(
            tensor
            for found in experts.statistics(weights, EVERY).values()
            for tensor in (found.sums, found.tokens)
        ),
    ]


def test_one_matrix_is_weighed_like_two(block: Block) -> None:
    both = block("mixtral"), block("granitemoe")
    separate, fused = (
        experts.by_stack(experts.measure(experts.weights(EVERY), EVERY, NORMS)[1])
        for experts in both
    )
    assert not separate[W1].allclose(separate[W3])
    close(fused[INPUT], torch.cat([separate[W1], separate[W3]], 1))
    close(fused[OUTPUT], separate[W2])
    two, one = (experts.statistics(experts.weights(EVERY), EVERY) for experts in both)
    close(one[INPUT].sums, two[W3].sums)
    for field in ("sums", "tokens"):
        close(getattr(one[OUTPUT], field), getattr(two[W2], field))


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_importance_reaches_the_quantizer(block: Block, family: str) -> None:
    experts = block(family)
    weights = experts.weights(EVERY)
    assert all(not s.row_importance.any() for s in experts.statistics(weights, EVERY).values())
    experts.importance = torch.rand(EXPERTS, experts.importance_columns)
    some = [2, 0]
    rows = experts.by_stack(experts.importance[some])
    for matrix, statistics in experts.statistics(experts.weights(some), some).items():
        close(statistics.importance().float(), rows[matrix])


def test_one_matrix_has_the_outputs_and_energies_of_two(block: Block) -> None:
    (returned, gate, down, up, *_), (same, fused, down_too, *_) = (
        everything(block(family)) for family in ("mixtral", "granitemoe")
    )
    close(returned, same)
    assert returned.abs().min() > 0
    close(fused, torch.cat([gate, up], 1))
    close(down_too, down)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_energies_are_those_of_the_hessians(block: Block, family: str) -> None:
    experts = block(family)
    weights = experts.weights(EVERY)
    energies, experts.importance = experts.measure(weights, EVERY, NORMS)
    for matrix, statistics in experts.statistics(weights, EVERY).items():
        expected = weighted_energies(weights[matrix], statistics)
        close(energies[matrix], expected)


@pytest.mark.parametrize(
    ("model_type", "in_turns"),
    [("granitemoe", False), ("gpt_oss", True), ("inkling2_text", True)],
)
def test_rows_of_gate_and_up(tmp_path: Path, model_type: str, in_turns: bool) -> None:
    with open_checkpoint(save_model(tmp_path, model_type)) as checkpoint:
        layer = checkpoint.layers[0]
    product = torch.randn(3, layer.inputs[0].rows)
    gate, up = layer.split_rows(product, 2)
    assert gate.equal(product[:, 0::2] if in_turns else product[:, : product.shape[1] // 2])
    assert layer.join_rows([gate, up]).equal(product)


def test_a_few_tokens_at_a_time(block: Block) -> None:
    few = Resources(1, chunk_elements=1, chunk_tokens=3)
    parts = everything(block("mixtral", few)), everything(block("mixtral"))
    for pieces, whole in zip(*parts, strict=True):
        close(pieces, whole)


def test_outputs_are_the_sum_over_a_tokens_experts(block: Block, routed: Any) -> None:
    experts = block("mixtral")
    weights = experts.weights(EVERY)
    wanted = torch.zeros(TOKENS, HIDDEN)
    for token, (chosen, gates) in enumerate(zip(routed.experts, routed.weights, strict=True)):
        x = routed.inputs[token]
        for expert, gate in zip(chosen.tolist(), gates, strict=True):
            w1, w2, w3 = (weights[name][expert] for name in (W1, W2, W3))
            wanted[token] += gate * (w2 @ (torch.nn.functional.silu(w1 @ x) * (w3 @ x)))
    close(everything(experts)[0], wanted)


def test_the_cap_takes_tokens_of_all_of_the_text(block: Block, routed: Any) -> None:
    free, capped = block("mixtral", token_cap=100.0), block("mixtral", token_cap=0.25)
    limit = -(-2 * int(routed.counted.sum()) // (4 * EXPERTS))
    for expert in EVERY:
        every = free.tokens(expert)
        assert len(every[0]) > limit
        spread = torch.arange(limit) * len(every[0]) // limit
        for kept, all_of_them in zip(capped.tokens(expert), every, strict=True):
            assert kept.equal(all_of_them[spread])


def test_all_experts_see_all_tokens(block: Block, routed: Any) -> None:
    """Those of other experts weigh as much as one token; what the block returns stays the same."""
    own, every = block("mixtral"), block("mixtral", all_experts=True)
    square = routed.weights.square().mean()
    for expert in EVERY:
        (mine, gates), (seen, weights) = own.tokens(expert), every.tokens(expert)
        assert seen[: len(mine)].equal(mine)
        assert weights[: len(mine)].equal(gates)
        assert seen.sort().values.equal(routed.counted.nonzero().flatten())
        close(weights[len(mine) :].square().sum(), square)
    (returned, *_), (same, *_) = everything(own), everything(every)
    assert same.equal(returned)


@pytest.mark.parametrize("cap", [0.25, 1.2])
def test_an_experts_own_tokens_go_before_others(block: Block, routed: Any, cap: float) -> None:
    limit = math.ceil(cap * 2 * int(routed.counted.sum()) / EXPERTS)
    few, free = block("mixtral", token_cap=cap, all_experts=True), block("mixtral")
    for expert in EVERY:
        (mine, gates), (seen, weights) = free.tokens(expert), few.tokens(expert)
        assert len(seen) == limit
        rest = routed.counted.index_fill(0, mine, False).nonzero().flatten()
        number = min(limit, len(mine))
        place, other = (
            torch.arange(count) * len(items) // max(1, count)
            for items, count in ((mine, number), (rest, limit - number))
        )
        assert seen.equal(torch.cat([mine[place], rest[other]]))
        assert weights[:number].equal(gates[place])


def test_an_expert_that_no_token_goes_to(block: Block, routed: Any) -> None:
    """Shown all tokens, it has Hessians, and matters as if it had one of them."""
    routed.tokens_of = lambda expert: (torch.empty(0, dtype=torch.int64), torch.empty(0))
    experts = block("mixtral", all_experts=True)
    weights = experts.weights(EVERY)
    found = experts.statistics(weights, EVERY)[W2]
    assert found.tokens.tolist() == [int(routed.counted.sum())] * EXPERTS
    counted = NORMS[routed.counted]
    weight = routed.weights.square().mean() * (1 / counted.square()).mean() / len(counted)
    _, importance = experts.measure(weights, EVERY, NORMS)
    close(experts.by_stack(importance)[W2], weight.expand(EXPERTS, 1))


@pytest.mark.parametrize(
    ("resources", "sizes"),
    [
        (Resources(1), [3]),
        (Resources(2, group_bytes=1), [2, 1]),
        (Resources(1, group_bytes=1), [1, 1, 1]),
        (Resources(2, group_bytes=1, large_expert=1), [1, 1, 1]),
    ],
)
def test_groups_keep_all_threads_busy(block: Block, resources: Resources, sizes: list[int]) -> None:
    assert [len(group) for group in block("mixtral", resources).groups()] == sizes
