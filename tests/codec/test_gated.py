"""Whole experts of packed matrices, against their products one after another."""

from __future__ import annotations

import os
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from qmoe_format.codec import PackedMatrix, encode_matrix, multiply_gated, pack
from qmoe_format.errors import QMoEError

from .strategies import random_levels
from .test_packed import Floats, bf16, encoded, product, random_x


def experts(
    count: int, hidden: int, inner: int, apart: bool, most: int = 1
) -> tuple[list[PackedMatrix], list[PackedMatrix]]:
    """Gate above up in one matrix, or apart; and down. Of several numbers of levels and scales."""
    per_expert = 2 if apart else 1
    shape = 2 * inner // per_expert, hidden
    inputs = [
        pack(encoded(random_levels(*shape, 0.6, i, most=1 + i % most), i, scales=1 + i % 2))
        for i in range(count * per_expert)
    ]
    return inputs, [
        pack(encoded(random_levels(hidden, inner, 0.8, i), i, columns=i % 2 > 0))
        for i in range(count)
    ]


def silu(x: Floats) -> Floats:
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):
        values: Floats = (x / (1 + np.exp(-x))).astype(np.float32)
    return values


def one_by_one(inputs: list[PackedMatrix], outputs: list[PackedMatrix], x: Floats) -> Floats:
    products = [product(matrix, x[None])[0] for matrix in inputs]
    gates = np.concatenate(products).reshape(len(outputs), 2, -1)
    hidden = silu(gates[:, 0]) * gates[:, 1]
    return np.array(
        [product(down, each[None])[0] for down, each in zip(outputs, hidden, strict=True)]
    )


def check(found: Floats, expected: Floats) -> None:
    """One level of x of a block may be rounded the other way."""
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max() + 1e-30


@given(
    st.integers(1, 4), st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(1, 3)
)
@settings(deadline=None, max_examples=30)
def test_experts(count: int, hidden: int, inner: int, apart: bool, threads: int) -> None:
    inputs, outputs = experts(count, hidden, inner, apart, most=9)
    x = random_x(1, hidden)[0]
    found = multiply_gated(inputs, outputs, x, threads)
    check(found, one_by_one(inputs, outputs, x))
    assert found.tobytes() == multiply_gated(inputs, outputs, x).tobytes()


def test_the_activation() -> None:
    """From where silu is x / 2 to where it is 0 or x. A single element is rounded to itself."""
    one = pack(encode_matrix(np.ones((1, 1), np.int8), bf16(np.ones((1, 1)))))
    values = np.concatenate([np.geomspace(1e-30, 1e4, 200), [0.0]]).astype(np.float32)
    values = np.concatenate([values, -values])
    found = [multiply_gated([one, one], [one], value[None])[0, 0] for value in values]
    np.testing.assert_allclose(found, silu(values) * values, rtol=2e-6, atol=1e-30)


def test_threads_that_are_early_wait() -> None:
    inputs, outputs = experts(2, 512, 512, apart=True)
    x = random_x(1, 512)[0]
    expected = multiply_gated(inputs, outputs, x).tobytes()
    assert all(multiply_gated(inputs, outputs, x, 4).tobytes() == expected for _ in range(300))


def test_what_is_not_finite_stays_so() -> None:
    inputs, outputs = experts(2, 256, 256, apart=True)
    x = random_x(1, 256)[0]
    x[3] = np.nan
    assert np.isnan(multiply_gated(inputs, outputs, x, 2)).all()


def test_other_arrays_are_refused() -> None:
    inputs, outputs = experts(1, 64, 64, apart=True)
    for x in (np.zeros(63, np.float32), np.zeros(64), np.zeros(128, np.float32)[::2]):
        with pytest.raises(QMoEError) as error:
            multiply_gated(inputs, outputs, x)  # type: ignore[arg-type]
        assert error.value.code == "argument"


@pytest.mark.parametrize("first", ["", "import torch"])
def test_with_torchs_threads_and_without(first: str) -> None:
    """And in a forked child, which has none of its parent's."""
    code = f"""
{first}
import os
from tests.codec.test_gated import check, experts, multiply_gated, one_by_one, random_x
inputs, outputs = experts(2, 300, 300, apart=True)
x = random_x(1, 300)[0]
expected = one_by_one(inputs, outputs, x)
for _ in range(20):
    check(multiply_gated(inputs, outputs, x, 3), expected)
if hasattr(os, "fork"):
    child = os.fork()
    check(multiply_gated(inputs, outputs, x, 3), expected)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)
