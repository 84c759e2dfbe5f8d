"""Derivatives against differences, and importance against the true effect of an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.quantize.hessian import Statistics
from qmoe_format.quantize.importance import derivatives, importance
from tests.quantize.problems import array, correlated, energy, random

Hidden = Callable[[Sequence[Tensor]], Tensor]


def relu(pre: Sequence[Tensor]) -> Tensor:
    return torch.relu(pre[0])


def gated(pre: Sequence[Tensor]) -> Tensor:
    return torch.nn.functional.silu(pre[0]) * pre[1]


CASES = {"relu": (relu, 1), "silu*up": (gated, 2)}


def case(name: str, tokens: int = 40, rows: int = 9) -> tuple[Hidden, list[Tensor]]:
    hidden, count = CASES[name]
    pre = [random(tokens, rows, seed=k, dtype=torch.float64) for k in range(count)]
    # Away from the kink of relu.
    return hidden, [each + 0.01 * each.sign() for each in pre]


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_the_limits_of_differences(name: str) -> None:
    hidden, pre = case(name)
    result = derivatives(hidden, pre)
    assert len(result) == len(pre)
    step = 1e-6
    for k in range(len(pre)):
        up, down = list(pre), list(pre)
        up[k], down[k] = pre[k] + step, pre[k] - step
        difference = (hidden(up) - hidden(down)) / (2 * step)
        torch.testing.assert_close(result[k], difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_without_gradients(name: str) -> None:
    hidden, pre = case(name)
    with torch.no_grad():
        inside = derivatives(hidden, pre)
    for each, expected in zip(inside, derivatives(hidden, pre), strict=True):
        assert torch.equal(each, expected)
        assert not each.requires_grad
    assert not any(each.requires_grad for each in pre)


def test_relu_passes_positive_values() -> None:
    pre = torch.tensor([[-1.0, 2.0, -3.0, 4.0]])
    assert derivatives(relu, [pre])[0].tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("name", CASES)
def test_importance_is_the_effect_of_a_small_error(name: str) -> None:
    hidden, pre = case(name)
    output, gates = random(5, 9, seed=5).double(), random(40, seed=6).double()
    usual = hidden(pre) @ output.T * gates[:, None]
    step = 1e-5
    for k, derivative in enumerate(derivatives(hidden, pre)):
        counts = importance(derivative, output, gates)
        assert counts.shape == (40, 9)
        for row in range(9):
            moved = [each.clone() for each in pre]
            moved[k][:, row] += step
            change = hidden(moved) @ output.T * gates[:, None] - usual
            expected = (change / step).square().sum(1)
            torch.testing.assert_close(counts[:, row], expected, rtol=1e-3, atol=1e-6)


def test_rows_without_output_and_tokens_without_weight_do_not_count() -> None:
    output, gates = random(5, 9), random(40, seed=1)
    output[:, 3] = 0
    gates[7] = 0
    counts = importance(random(40, 9, seed=2), output, gates)
    assert not counts[:, 3].any()
    assert not counts[7].any()
    assert (counts >= 0).all()


def test_the_product_is_exact_if_tokens_are_alike() -> None:
    rows, columns, tokens = 6, 8, 50
    inputs = correlated(tokens, columns)
    derivative = random(rows, seed=3).abs()[None].expand(tokens, rows)
    counts = importance(derivative, random(5, rows, seed=4), torch.full((tokens,), 0.7))
    statistics = Statistics.zeros(1, columns, rows, dtype=torch.float64)
    for start in (0, 20):
        part = slice(start, start + 20 if start == 0 else tokens)
        statistics.add(0, inputs[part])
        statistics.weigh(0, counts[part])
    off = random(rows, columns, seed=5)
    true = (array(counts) * array(inputs @ off.T) ** 2).sum(0)
    rho = array(statistics.importance()[0])
    np.testing.assert_allclose(rho * energy(array(off), array(statistics.sums[0])), true, rtol=1e-5)
