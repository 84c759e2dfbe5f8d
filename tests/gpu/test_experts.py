"""Whole experts, gate to down, on the shim: against numpy in binary64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qmoe_format import gpu
from qmoe_format.dtypes import to_float32
from qmoe_format.errors import QMoEError
from tests.gpu import shim
from tests.gpu.fake_cupy import FakeCupy
from tests.gpu.layers import Layer, layer_call, near
from tests.gpu.problems import (
    NAMES,
    DictKind,
    GroupKind,
    Kind,
    Machine,
    array,
)

pytestmark = shim.needs_compiler

KIND = DictKind(((0.6, 12), None), 2, True, "bf16", 1, False, False)
GROUPED = GroupKind(4, ("linear", True), "fp32", 1, False, False)
ONE_BY_ONE = ["inputs", "output", "combine"]


@pytest.mark.parametrize(
    ("dtype", "column_scale", "stacks", "index", "hidden", "inner"),
    [
        *[("bf16", True, 2, "int64", 70, 40), ("fp16", False, 2, "int32", 257, 33)],
        *[("fp32", True, 1, "int32", 64, 96), ("bf16", False, 1, "int64", 33, 17)],
    ],
)
def test_one_after_another(
    dtype: str, column_scale: bool, stacks: int, index: str, hidden: int, inner: int
) -> None:
    kind = replace(KIND, dtype=dtype, column_scale=column_scale)
    layer = Layer(kind, hidden, inner, stacks, ((4, 8), (4, 8), (3, 4))[2 - stacks :])
    x, experts, weights = layer_call(kind, 3, 2, index, hidden)
    kernels: list[str] = []
    y = layer.run(x, experts, weights, kernels=kernels)
    assert near(y, layer.expected(x, experts, weights))
    assert kernels == ONE_BY_ONE
    for order in (shim.BACKWARD, 2):
        assert np.array_equal(y, layer.run(x, experts, weights, Machine(order)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("STACKS == 2 && stack_number == 1", "false"),
        ("stack_number * pairs + pair) * rows", "pair) * rows"),
        ("{x + (u64)blockIdx.z * COLUMNS}", "{x}"),
        ("(STACKS == 1 ? 1 : pairs)", "1"),
        ("1.0f + __expf(-gate)", "1.0f + __expf(gate)"),
        ("y + pair * rows", "y"),
        ("return;\n    const X_TYPE", "listed[0];\n    const X_TYPE"),
        ("number[i] >= experts", "false"),
    ],
)
def test_every_fault_is_noticed(old: str, new: str) -> None:
    layer = Layer(KIND)
    x, experts, weights = layer_call(KIND, 3, 2, "int64")
    try:
        y = layer.run(x, experts, weights, Machine(fault=(old, new)))
    except shim.Fault:
        return
    assert not near(y, layer.expected(x, experts, weights))


@pytest.mark.parametrize(
    ("kind", "tokens", "runs", "kernels"),
    [
        (KIND, 2, ((4, 8), (5, 8), (3, 4)), ["inputs", *ONE_BY_ONE]),
        (KIND, 2, (), ["narrow", "product", "product", "activate", "product", "combine"]),
        (replace(KIND, dtype="fp32"), 30, ((4, 8), (4, 8), (3, 4)), None),
        (GROUPED, 9, (), None),
    ],
)
def test_other_ways(
    kind: Kind, tokens: int, runs: tuple[tuple[int, int], ...], kernels: list[str] | None
) -> None:
    """Runs of different kinds, codewords, several tokens on tensor cores, and int-group."""
    layer = Layer(kind, 270, 260, 2, runs)
    x, experts, weights = layer_call(kind, tokens, 2, "int64", 270)
    found: list[str] = []
    y = layer.run(x, experts, weights, kernels=found)
    assert near(y, layer.expected(x, experts, weights), kind.dtype)
    assert found == kernels if kernels else {"sort", "run_terms"} & set(found)


def test_no_expert_at_all() -> None:
    layer = Layer(KIND)
    x, experts, weights = layer_call(KIND, 2, 0, "int32")
    assert not layer.run(x, experts, weights).any()
    assert layer.run(x[:0], experts[:0], weights[:0]).shape == (0, 70)


def test_calls(cupy: FakeCupy) -> None:
    """As users make them, again and again; after ``add_runs``, too."""
    layer = Layer(KIND)
    gate, up, down = (gpu.upload(stack, runs=False) for stack in layer.stored)
    x, experts, weights = layer_call(KIND, 3, 2, "int64")
    expected = layer.expected(x, experts, weights)
    given = cupy.asarray(array("bf16", x)), cupy.asarray(experts), cupy.asarray(weights)
    for _ in range(2):
        y = cupy.empty((3, 70), np.float32)
        assert gpu.gated_experts((gate, up), down, *given, out=y) is y
        assert near(y.get(), expected, "bf16")
        assert cupy.launched[-2].kernel.name == "product"
    assert gpu.add_runs(gate)
    assert gpu.add_runs(up)
    assert gpu.add_runs(down)
    y = gpu.gated_experts((gate, up), down, *given)
    assert near(to_float32(y.get(), NAMES["bf16"]), expected, "bf16")
    assert [launch.kernel.name for launch in cupy.launched[-3:]] == ONE_BY_ONE
    other = gpu.upload(layer.stored[0])
    assert np.array_equal(gpu.gated_experts((other, up), down, *given), y)
    assert gate not in {stack for (_, *stacks), *_ in down.prepared for stack, _ in stacks}


def test_stacks_that_are_no_layer(cupy: FakeCupy) -> None:
    layer = Layer(KIND)
    gate, up, down = (gpu.upload(stack) for stack in layer.stored)
    given = [cupy.asarray(each) for each in layer_call(replace(KIND, dtype="fp32"), 3, 2, "int64")]
    for inputs in (
        (),
        (gate,),
        gate,
        (gate, up, up),
        (gate, down),
        (gpu.upload(layer.stored[1][:2]), up),
    ):
        with pytest.raises(QMoEError, match="not gate, up and down") as error:
            gpu.gated_experts(inputs, down, *given)
        assert error.value.code == "argument"
    with cupy.cuda.Device(1):
        elsewhere = gpu.upload(layer.stored[1])
    with pytest.raises(QMoEError, match="different GPUs"):
        gpu.gated_experts((gate, elsewhere), down, *given)
    with pytest.raises(QMoEError, match="experts: the dtype"):
        gpu.gated_experts((gate, up), down, given[0], given[2], given[2])
