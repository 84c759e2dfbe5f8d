"""Products with the experts of a stack, against the same products with their dense weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import qmoe_format
from qmoe_format import QMoEFile
from qmoe_format.codec import GroupedMatrix
from qmoe_format.runtime.grouped_linear import Group, choose_kernel, grouped_linear
from qmoe_format.runtime.lazy_stack import LazyStack
from qmoe_format.runtime.tuning import Tuning
from tests.refusals import refusal
from tests.runtime.files import EXPERTS, HIDDEN, INNER, Dense, random

TOKENS = (1, 5, 60)  # for each kernel, with integers in groups or 60 % zeros
MANY = TOKENS[-1]


def linear(stack: LazyStack, x: torch.Tensor, expert: int, **tuning: int) -> torch.Tensor:
    return grouped_linear([stack], x, [Group(expert, 0, len(x))], Tuning(**tuning))


def test_these_tokens_take_all_kernels(file: QMoEFile) -> None:
    matrix = LazyStack(file, "gate").matrix(0)
    assert [choose_kernel(n, matrix, Tuning()) for n in TOKENS] == ["matvec", "matmul", "dense"]


def test_a_stack_is_views_of_the_file(file: QMoEFile) -> None:
    stack = LazyStack(file, "gate")
    assert stack.shape == (EXPERTS, INNER, HIDDEN)
    assert stack.matrix(1) is stack.matrix(1)
    matrix = stack.matrix(1)
    stored = matrix.packed if isinstance(matrix, GroupedMatrix) else matrix.levels.mask.segments
    assert not stored.flags.owndata


def test_only_used_experts_are_read(file: QMoEFile, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    encoded = file.encoded

    def spy(name: str, expert: int) -> object:
        read.append((name, expert))
        return encoded(name, expert)

    monkeypatch.setattr(file, "encoded", spy)
    stack = LazyStack(file, "up")
    for _ in range(2):
        linear(stack, random(2, HIDDEN), 1)
    assert read == [("up", 1)]


@pytest.mark.parametrize("tokens", [0, 2, 17, *TOKENS])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_tokens(file: QMoEFile, dense: Dense, tokens: int, threads: int) -> None:
    x = random(tokens, HIDDEN)
    y = linear(LazyStack(file, "gate"), x, 2, threads=threads, weights_per_thread=1)
    torch.testing.assert_close(y, x @ dense["gate"][2].T)


def test_weights_are_decoded_in_tiles(file: QMoEFile, dense: Dense) -> None:
    rows = 4 * HIDDEN * 13  # of 40: the last tile has one
    x = random(MANY, HIDDEN).requires_grad_()
    y = linear(LazyStack(file, "gate"), x, 0, scratch_bytes=rows)
    torch.testing.assert_close(y, x @ dense["gate"][0].T)
    dy = random(MANY, INNER, seed=1)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ dense["gate"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_are_float32_for_every_dtype(
    file: QMoEFile, dense: Dense, dtype: torch.dtype, tokens: int
) -> None:
    x = random(tokens, HIDDEN).to(dtype)
    y = linear(LazyStack(file, "up"), x, 0)
    assert y.dtype == dtype
    want = x.float() @ dense["up"][0].T
    torch.testing.assert_close(y, want.to(dtype), rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-5)


def test_groups_and_stacks_side_by_side(file: QMoEFile, dense: Dense) -> None:
    groups = [Group(2, 0, 1), Group(0, 1, 2), Group(1, 2, 7), Group(0, 7, 7 + MANY)]
    x = random(7 + MANY, HIDDEN).requires_grad_()
    y = grouped_linear([LazyStack(file, "gate"), LazyStack(file, "up")], x, groups, Tuning())
    both = torch.cat([dense["gate"], dense["up"]], dim=1)
    want = torch.cat([x[g.first : g.last] @ both[g.expert].T for g in groups])
    torch.testing.assert_close(y, want)
    dy = random(*y.shape, seed=1)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(want, x, dy)[0]
    )


def test_a_token_has_the_same_result_beside_others(file: QMoEFile) -> None:
    stack = LazyStack(file, "gate")
    x = random(MANY, HIDDEN)
    alone = linear(stack, x[:1], 1)
    for tokens in (2, 20, MANY):
        torch.testing.assert_close(linear(stack, x[:tokens], 1)[:1], alone, rtol=1e-5, atol=1e-6)


def test_gradient_of_half_precision(file: QMoEFile, dense: Dense) -> None:
    x = random(3, HIDDEN).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(linear(LazyStack(file, "up"), x, 1).sum(), x)
    assert dx.dtype == torch.bfloat16
    torch.testing.assert_close(dx[0], dense["up"][1].sum(dim=0).bfloat16())


def test_strided_and_inference_tensors(file: QMoEFile, dense: Dense) -> None:
    with torch.inference_mode():
        x = random(HIDDEN, 4).T
        y = linear(LazyStack(file, "up"), x, 1)
    torch.testing.assert_close(y, x @ dense["up"][1].T)


def test_refusals(file: QMoEFile) -> None:
    stack = LazyStack(file, "gate")
    refusal(lambda: LazyStack(file, "other"), "not-found")
    refusal(lambda: linear(stack, random(1, HIDDEN), EXPERTS), "not-found")
    refusal(lambda: linear(stack, random(1, HIDDEN), -1), "not-found")
    refusal(lambda: linear(stack, random(1, HIDDEN + 1), 0), "argument")
    refusal(lambda: linear(stack, random(HIDDEN), 0), "argument")


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    with qmoe_format.Writer(tmp_path / "raw.qmoe") as writer:
        writer.add_tensor("w", random(4, 4).numpy(), "F32")
        with writer.add_stack("stack", (2, 4, 4), "F32") as stack:
            for _ in range(2):
                stack.append(random(4, 4).numpy())
    with qmoe_format.open(tmp_path / "raw.qmoe") as file:
        for name in ("w", "stack"):
            refusal(partial(LazyStack, file, name), "argument")
