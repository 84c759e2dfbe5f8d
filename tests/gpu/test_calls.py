"""The public calls, with numpy and the shim in CuPy's place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from qmoe_format import gpu
from qmoe_format.codec import dequantize, encode_matrix, pack_groups
from qmoe_format.dtypes import from_float32, to_float32
from qmoe_format.errors import QMoEError
from qmoe_format.gpu import launch_plan, ops, packing
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.packing import Matrix
from tests.gpu import shim
from tests.gpu.fake_cupy import FakeCupy
from tests.gpu.problems import random_levels

pytestmark = shim.needs_compiler

EXPERTS, ROWS, COLUMNS = 4, 6, 200


def member(encoding: str, seed: int = 0) -> Matrix:
    """A matrix whose products with small integers are exact in every dtype."""
    rng = np.random.default_rng(seed)
    if encoding == "int-group":
        codes = rng.integers(0, 8, (ROWS, COLUMNS)).astype(np.uint8)
        return pack_groups(codes, np.full((ROWS, 7), 0x3F00, np.uint16), 3, group_size=32)
    return encode_matrix(
        random_levels(ROWS, COLUMNS, 0.885, rng, 0.3 * (seed % 2)),
        from_float32(np.array([[-0.5, 2.0]] * ROWS, np.float32), "BF16"),
    )


@pytest.fixture(scope="module", params=["int-dict", "int-group"])
def members(request: pytest.FixtureRequest) -> list[Matrix]:
    return [member(request.param, seed) for seed in range(EXPERTS)]


def integers(cupy: FakeCupy, *shape: int, dtype: str = "BF16") -> Any:
    """Small integers, as an array on the GPU and as float64."""
    values = np.random.default_rng(sum(shape)).integers(-3, 4, shape).astype(np.float32)
    return cupy.asarray(from_float32(values, dtype)), values.astype(np.float64)


def check_uploaded(stack: gpu.DeviceStack, members: list[Matrix]) -> None:
    packed = packing.pack(members)
    for name in packed.layout.places:
        there, here = stack.packed.arrays[name], packed.arrays[name]
        assert there.device.id == stack.device
        assert np.array_equal(there, here), name


def test_upload(cupy: FakeCupy, members: list[Matrix]) -> None:
    stack = gpu.upload(members, device=1)
    packed = packing.pack(members)
    assert stack.device == 1
    assert stack.shape == (EXPERTS, ROWS, COLUMNS)
    runs = stack.packed.runs
    assert bool(runs) == isinstance(packed.layout, DictLayout)
    coded = gpu.upload(members, device=1, runs=False)
    check_uploaded(coded, members)
    assert coded.bytes == packed.layout.bytes
    for name, array in stack.packed.arrays.items():
        assert array.device.id == 1
        assert np.array_equal(array, packed.arrays[name]), name
    assert [matrix.expert for matrix in stack] == [0, 1, 2, 3]
    assert stack[-1].expert == 3


def test_upload_is_complete_when_it_returns(cupy: FakeCupy, members: list[Matrix]) -> None:
    """torch's streams do not wait for CuPy's."""
    gpu.upload(members, runs=False)
    assert cupy.stream.waits == 1
    launched = cupy.launched
    gpu.upload(members)
    assert cupy.stream.waits == (3 if launched else 2)


def test_upload_of_more_than_the_staging_buffers_hold(cupy: FakeCupy) -> None:
    """One array of 34 MB is copied in parts, through two buffers of 32 MB that take turns."""
    codes = np.random.default_rng(0).integers(0, 256, (17, 2_000_000), np.uint8)
    large = pack_groups(codes, np.ones((17, 1), np.uint16), 8)
    check_uploaded(gpu.upload([large, large]), [large, large])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("runs", [False, True])
def test_matvec(cupy: FakeCupy, members: list[Matrix], dtype: str, runs: bool) -> None:
    x, values = integers(cupy, COLUMNS, dtype=dtype)
    y = gpu.matvec(gpu.upload(members, runs=runs)[2], x)
    assert y.dtype == x.dtype
    assert isinstance(y, cupy.ndarray)
    want = (dequantize(members[2]) @ values).astype(np.float32)
    assert np.array_equal(y, from_float32(want, dtype))
    assert np.array_equal(y, gpu.matvec(gpu.upload(members[2], runs=runs), x))


def test_matmul_into_out_of_another_type(cupy: FakeCupy, members: list[Matrix]) -> None:
    x, values = integers(cupy, 5, COLUMNS)
    out = cupy.empty((5, ROWS), np.float32)
    assert gpu.matmul(gpu.upload(members)[1], x, out=out) is out
    assert np.array_equal(out, values @ dequantize(members[1]).T)


def test_no_tokens(cupy: FakeCupy, members: list[Matrix]) -> None:
    stack = gpu.upload(members)
    cupy.launched.clear()
    x, experts = cupy.empty((0, COLUMNS), np.float16), cupy.empty((0, 2), np.int32)
    assert gpu.matmul(stack[0], x).shape == (0, ROWS)
    assert gpu.expert_matvec(stack, x, experts).shape == (0, 2, ROWS)
    weights = cupy.empty((0, 2), np.float16)
    assert gpu.expert_matvec(stack, x, experts, weights).shape == (0, ROWS)
    assert not cupy.launched


@pytest.mark.parametrize("tokens", [1, 3, 20])  # a list of pairs; groups of them
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_expert_matvec(
    cupy: FakeCupy, members: list[Matrix], tokens: int, each: bool, weighted: bool, runs: bool
) -> None:
    k = 2
    x, values = integers(cupy, *((tokens, k, COLUMNS) if each else (tokens, COLUMNS)), dtype="F32")
    chosen = np.random.default_rng(0).integers(0, EXPERTS, (tokens, k)).astype(np.int32)
    weights, scales = integers(cupy, tokens, k)
    weights = weights if weighted else None
    y = gpu.expert_matvec(gpu.upload(members, runs=runs), x, cupy.asarray(chosen), weights)
    dense = np.stack([dequantize(matrix) for matrix in members])[chosen].astype(np.float64)
    every = values if each else np.repeat(values[:, None], k, axis=1)
    want = np.einsum("tkrc,tkc->tkr", dense, every)
    if weighted:
        want = np.einsum("tkr,tk->tr", want, scales)
    assert y.shape == want.shape
    assert np.array_equal(y, want)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("runs", [False, True])
def test_decode(cupy: FakeCupy, members: list[Matrix], dtype: str, runs: bool) -> None:
    name = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    stack = gpu.upload(members, runs=runs)
    dense = np.stack([dequantize(matrix) for matrix in members])
    assert np.array_equal(to_float32(gpu.decode(stack, dtype), name), dense)
    out = cupy.empty((ROWS, COLUMNS), np.float32)
    assert gpu.decode(stack[1], dtype, out=out) is out
    assert np.array_equal(out, dense[1])


def test_a_captured_call_keeps_its_scratch_arrays(cupy: FakeCupy, members: list[Matrix]) -> None:
    stack = gpu.upload(members, runs=False)
    x, _ = integers(cupy, 20, COLUMNS)
    experts = cupy.asarray(np.zeros((20, 2), np.int32))
    gpu.expert_matvec(stack, x, experts)
    assert not stack.recorded
    cupy.stream.capturing = True
    gpu.expert_matvec(stack, x, experts)
    assert len(stack.recorded) == 1


def test_calls_like_one_before_are_not_planned_again(
    cupy: FakeCupy, members: list[Matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own arrays and expert, nevertheless."""
    stack = gpu.upload(members, runs=False)
    dense = np.stack([dequantize(matrix) for matrix in members])
    experts = cupy.asarray(np.array([[3, 1]], np.int32))
    planned: list[str] = []

    def noted(name: str, plan: Callable[..., Any], *given: Any) -> Any:
        planned.append(name)
        return plan(*given)

    for name in ("matmul", "expert_matvec", "decode"):
        plan = partial(noted, name, getattr(launch_plan, name))
        monkeypatch.setattr(launch_plan, name, plan)
    for turn in range(3):
        x, values = integers(cupy, COLUMNS, dtype="F32")
        x, values = x * (turn + 1), values * (turn + 1)
        assert np.array_equal(gpu.matvec(stack[turn], x), dense[turn] @ values)
        y = gpu.expert_matvec(stack, x.reshape(1, -1), experts)
        assert np.array_equal(y, dense[[3, 1]][None] @ values)
        assert np.array_equal(gpu.decode(stack[turn], "fp32"), dense[turn])
    assert planned == ["matmul", "expert_matvec", "decode"]
    gpu.matvec(stack[0], x.astype(np.float16))
    gpu.matmul(stack[0], x.reshape(1, -1))
    assert planned[3:] == ["matmul", "matmul"]
    if gpu.add_runs(stack):
        cupy.launched.clear()
        assert np.array_equal(gpu.matvec(stack[2], x), dense[2] @ values)
        assert "follow" in cupy.launched[0].kernel.source


def test_a_good_call_does_not_let_bad_ones_pass(cupy: FakeCupy, members: list[Matrix]) -> None:
    stack = gpu.upload(members)
    x, experts = cupy.zeros((1, COLUMNS), np.float32), cupy.zeros((1, 1), np.int32)
    gpu.matmul(stack[0], x)
    gpu.expert_matvec(stack, x, experts)
    with pytest.raises(QMoEError, match="not contiguous"):
        gpu.matmul(stack[0], cupy.zeros((1, 2 * COLUMNS), np.float32)[:, ::2])
    for weights in ([[1.0]], np.ones((1, 1), np.float32)):
        with pytest.raises(QMoEError, match="weights: is a"):
            gpu.expert_matvec(stack, x, experts, weights)


def test_few_prepared_calls_are_kept(
    cupy: FakeCupy, members: list[Matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "MOST_PREPARED", 2)
    stack = gpu.upload(members)
    for tokens in (1, 2, 3):
        gpu.matmul(stack[0], cupy.zeros((tokens, COLUMNS), np.float32))
    assert len(stack.prepared) == 1


def test_kernels_are_compiled_once(cupy: FakeCupy, members: list[Matrix]) -> None:
    stack = gpu.upload(members)
    x, _ = integers(cupy, COLUMNS)
    cupy.launched.clear()
    for expert in range(3):
        gpu.matvec(stack[expert], x)
    assert len({launch.kernel.source for launch in cupy.launched}) == 1
