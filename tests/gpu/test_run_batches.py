"""Products of several tokens an expert from runs, on the shim: against numpy."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from qmoe_format import gpu
from qmoe_format.codec import EncodedMatrix, dequantize, encode_matrix
from qmoe_format.dtypes import from_float32
from qmoe_format.gpu import run_batches
from qmoe_format.gpu.run_batches import TOKENS, Batch
from qmoe_format.gpu.runs import RunLayout
from tests.gpu import run_reference, shim
from tests.gpu.fake_cupy import FakeCupy
from tests.gpu.problems import (
    LARGE,
    NAMES,
    DictKind,
    Machine,
    Shape,
    expert_matvec,
    matmul,
    matrix,
    random_levels,
    rounded,
    vectors,
    within_tolerance,
)
from tests.gpu.variants import H200

pytestmark = shim.needs_compiler

TERNARY = DictKind(((0.6, 12), None), 2, False, "bf16", 1, False, False)


@pytest.mark.parametrize("exact", [False, True], ids=["M-1", "M-2"])
@pytest.mark.parametrize(
    ("rows", "columns", "bits", "lanes", "tokens", "dtype", "scales", "column_scale"),
    [
        (1, 257, 3, 16, 4, "bf16", 2, False),
        (13, 270, 4, 8, 9, "fp16", 1, False),
        (37, 1000, 5, 16, 16, "fp32", 2, False),
        (230, 261, 3, 4, 5, "bf16", 1, True),  # rows for several warps of a block
        (70, 517, 6, 2, 33, "fp16", 2, True),
        (9, 2049, 8, 8, 11, "fp32", 1, True),
        (151, 300, 4, 2, 8, "bf16", 1, False),
        (3, 299, 7, 2, TOKENS + 9, "bf16", 2, False),
    ],
)
def test_products(
    rows: int,
    columns: int,
    bits: int,
    lanes: int,
    tokens: int,
    dtype: str,
    scales: int,
    column_scale: bool,
    exact: bool,
) -> None:
    kind = replace(TERNARY, scales=scales, column_scale=column_scale, dtype=dtype)
    shape = Shape(rows, columns, 0.6, None, 0, exact)
    members = [matrix(kind, shape, seed) for seed in range(2)]
    x = vectors(kind, shape, tokens)
    y = matmul(kind, run_reference.stack(members, bits, lanes), x, expert=1)
    if exact:
        assert np.array_equal(y, rounded(x @ dequantize(members[1]).T, dtype))
    else:
        assert within_tolerance(members[1], x, y, dtype)


@pytest.mark.parametrize(
    ("most", "columns", "bits", "lanes", "dtype", "scales", "column_scale"),
    [
        (7, 270, 3, 16, "bf16", 1, True),
        (7, 517, 5, 4, "fp16", 2, False),
        (63, 300, 4, 2, "fp32", 1, False),
    ],
)
@given(
    rows=st.integers(1, 20),
    zeros=st.sampled_from([0.3, 0.9, 0.99, 1.0]),
    tokens=st.integers(7, 10),
    seed=st.integers(0, 99),
    exact=st.booleans(),
    order=st.sampled_from([shim.FORWARD, shim.BACKWARD, 2]),
)
@example(rows=17, zeros=0.3, tokens=9, seed=0, exact=True, order=2)
@settings(deadline=None, max_examples=3)
def test_levels(
    most: int,
    columns: int,
    bits: int,
    lanes: int,
    dtype: str,
    scales: int,
    column_scale: bool,
    rows: int,
    zeros: float,
    tokens: int,
    seed: int,
    exact: bool,
    order: int,
) -> None:
    """Up to those that take up several runs, in rows beside emptier ones."""
    kind = replace(TERNARY, scales=scales, column_scale=column_scale, dtype=dtype)
    shape = Shape(rows, columns, zeros, None, seed, exact)
    rng = np.random.default_rng(seed)
    levels = random_levels(rows, columns, zeros, rng, 1 - 2 / most).clip(-most, most)
    levels[rng.integers(rows), rng.integers(columns)] = rng.choice([-most, most])
    scaled = matrix(kind, shape)
    assert isinstance(scaled, EncodedMatrix)
    coded = encode_matrix(levels, scaled.row_scale, scaled.column_scale)
    x = vectors(kind, shape, tokens)
    y = matmul(kind, run_reference.stack([coded], bits, lanes), x, Machine(order))
    if exact:
        assert np.array_equal(y, rounded(x @ dequantize(coded).T, dtype))
    else:
        assert within_tolerance(coded, x, y, dtype)


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
def test_every_bit_of_x_counts(dtype: str, column_scale: bool) -> None:
    """[M-2], wherever it asks for exact sums, with the most bits that x has."""
    kind = replace(TERNARY, dtype=dtype, column_scale=column_scale)
    coded = matrix(kind, Shape(40, 300, 0.99, None, 0, exact=True))
    most = {"bf16": 1 << 8, "fp16": 1 << 11, "fp32": 1 << 21}[dtype]
    x = np.random.default_rng(0).integers(1 - most, most, (6, 300)).astype(np.float32)
    y = matmul(kind, run_reference.stack([coded], 6, 4), x)
    products = x[:, None].astype(np.float64) * dequantize(coded)  # [tokens, rows, columns]
    steps = (16 * products).astype(np.int64)
    units = np.where(steps == 0, 1 << 60, steps & -steps).min(axis=2)
    exact = np.abs(steps).sum(axis=2) < units * 2.0**24
    assert exact.mean() > 0.4
    sums = rounded(products.sum(axis=2).astype(np.float32), dtype)
    assert np.array_equal(y[exact], sums[exact])


@pytest.mark.parametrize("own", [False, True], ids=["shared x", "own x"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "column_scale"), [("bf16", False), ("bf16", True)])
def test_experts(dtype: str, column_scale: bool, weighted: bool, own: bool) -> None:
    """Some have more tokens than a tile, some one, some none; some do not exist."""
    kind = replace(TERNARY, dtype=dtype, column_scale=column_scale)
    shape = Shape(21, 260, 0.7, None, 0, exact=True)
    members = [matrix(kind, shape, seed) for seed in range(4)]
    stack = run_reference.stack(members, 4, 16)
    experts = np.zeros((TOKENS // 2 + 5, 2), np.int32)
    experts[::2] = 3
    experts[5], experts[6] = (1, 1), (0, 4)
    if not weighted:
        experts[1:3] = [[-1, 0], [2**31 - 1, -(2**31)]]
    x = vectors(kind, shape, *experts.shape) if own else vectors(kind, shape, len(experts))
    by_pair = x if own else np.repeat(x[:, None], 2, axis=1)
    there = (experts >= 0) & (experts < 4)
    dense = np.stack([dequantize(member) for member in members])[experts.clip(0, 3)]
    products = np.where(there[..., None], np.einsum("tkc,tkrc->tkr", by_pair, dense), np.nan)
    weights = np.full(experts.shape, 0.5, np.float32) if weighted else None
    y = expert_matvec(kind, stack, x, experts, weights)
    expected = products.astype(np.float32) if weights is None else 0.5 * products.sum(axis=1)
    assert np.array_equal(y, rounded(expected.astype(np.float32), dtype), equal_nan=True)


def test_odd_numbers_of_a_token_leave_others_alone() -> None:
    kind = replace(TERNARY, dtype="fp32")
    shape = Shape(20, 270, 0.7, None, 0, exact=True)
    coded, x = matrix(kind, shape), vectors(kind, shape, 9)
    x[2, 3::7], x[5] = np.inf, np.nan
    y = matmul(kind, run_reference.stack([coded], 4, 8), x)
    others = ~np.isin(np.arange(9), (2, 5))
    assert np.array_equal(y[others], x[others] @ dequantize(coded).T)


def test_what_is_chosen() -> None:
    def chosen(
        columns: int, lanes: int, capability: int = 90, kib: int = 227, highest: int = 1
    ) -> Batch | None:
        limits = replace(H200, capability=capability, shared_bytes=kib << 10)
        layout = RunLayout(8, 4096, columns, 6, lanes, 2, column_scales=False)
        return run_batches.choose(layout, highest, "bf16", limits)

    for columns, lanes, highest, groups in (
        *[(14336, 16, 1, 48), (4096, 8, 1, 80), (1536, 2, 1, 16), (768, 4, 1, 48)],
        *[(14336, 16, 7, 16), (4096, 8, 7, 32), (1536, 2, 7, 16), (768, 4, 7, 48)],
        *[(14336, 16, 8, 8), (4096, 8, 63, 16), (1536, 2, 63, 15), (768, 4, 63, 48)],
    ):
        batch = chosen(columns, lanes, highest=highest)
        assert batch is not None
        assert batch.groups == groups
        shared = batch.product("bf16", "ONE").shared_bytes
        assert shared <= H200.shared_bytes
    assert chosen(14336, 16, kib=40) is None
    assert chosen(768, 4, capability=75) is None
    assert chosen(255, 4) is None
    assert chosen(768, 4, highest=64) is None


def test_when_it_is_used(cupy: FakeCupy) -> None:
    levels = random_levels(64, 600, 0.885, np.random.default_rng(0))
    ternary = encode_matrix(levels, np.full((64, 2), 0x3F80, np.uint16))
    refined = encode_matrix(2 * levels, np.full((64, 2), 0x3F80, np.uint16))
    one, higher = gpu.upload(ternary), gpu.upload(refined)
    x = cupy.asarray(from_float32(np.ones((8, 600), np.float32), "BF16"))

    def launched(stack: gpu.DeviceStack, tokens: int, experts: int = 0) -> list[str]:
        cupy.launched.clear()
        if experts:
            numbers = np.arange(2 * tokens, dtype=np.int32).reshape(-1, 2) % experts
            gpu.expert_matvec(stack, x[:tokens], cupy.asarray(numbers))
        else:
            gpu.matmul(stack[0], x[:tokens])
        assert cupy.launched[-1].kernel.name == "product"
        return [launch.kernel.name for launch in cupy.launched]

    assert LARGE.capability == H200.capability == int(cupy.capability)
    assert launched(one, 6) == ["run_terms", "product"]  # with codes of 6 bits
    assert launched(one, 5) == ["product"]
    assert launched(higher, 5) == ["run_terms", "product"]  # with codes of 4 bits
    assert launched(higher, 4) == ["product"]
    assert launched(gpu.upload([ternary] * 2), 8, experts=2) == ["run_terms", "product"]
    assert launched(gpu.upload([ternary] * 3), 8, experts=3) == ["product"]
