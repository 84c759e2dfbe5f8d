"""Runs of gap codes, made and multiplied on the shim: against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qmoe_format import gpu
from qmoe_format.codec import EncodedMatrix, decode, dequantize, encode_matrix
from qmoe_format.dtypes import from_float32
from qmoe_format.gpu import cuda
from qmoe_format.gpu.int_dict_packing import layout as dict_layout
from qmoe_format.gpu.runs import RunLayout, choose, expected_bytes
from qmoe_format.gpu.transcode import runs_of
from tests.gpu import run_reference, shim
from tests.gpu.fake_cupy import FakeCupy
from tests.gpu.problems import NAMES, DictKind, Shape, matrix, random_levels, vectors
from tests.gpu.variants import H200

pytestmark = shim.needs_compiler


def with_runs(
    members: list[EncodedMatrix], bits: int, lanes: int, scales: int = 2, column_scales: bool = True
) -> gpu.DeviceStack:
    """Upload ``members`` with runs of this kind."""
    stack = gpu.upload(members, runs=False)
    layout = RunLayout(*stack.shape, bits, lanes, scales, column_scales)
    return replace(stack, packed=replace(stack.packed, runs=runs_of(stack.packed, layout, 0)))


@pytest.mark.parametrize(
    ("rows", "columns", "zeros", "ones", "bits", "lanes"),
    [
        *[(1, 1, 0.0, 0.0, 3, 16), (5, 300, 0.885, 0.0, 6, 8), (40, 70, 1.0, 0.0, 8, 16)],
        *[(17, 500, 0.99, 0.0, 5, 2), (9, 257, 0.6, 0.3, 4, 4), (2, 1100, 0.3, 0.6, 3, 2)],
        *[(3, 2100, 0.95, 0.1, 7, 8), (5, 1100, 0.995, 0.0, 3, 4), (18, 35, 0.5, 0.0, 8, 1)],
    ],
)
def test_transcoding(
    cupy: FakeCupy, rows: int, columns: int, zeros: float, ones: float, bits: int, lanes: int
) -> None:
    rng = np.random.default_rng(rows)
    members = [
        encode_matrix(
            random_levels(rows, columns, share, rng, ones),
            rng.integers(0, 1 << 14, (rows, 2), np.uint16),
            rng.integers(0, 1 << 14, columns, np.uint16),
        )
        for share in (zeros, zeros, 1.0)
    ]
    found = with_runs(members, bits, lanes).packed.runs
    assert found is not None
    levels = np.stack([decode(member.levels) for member in members])
    expected = run_reference.runs(levels, found.layout)
    assert list(found.arrays) == list(expected.arrays)
    for name, array in expected.arrays.items():
        assert np.array_equal(found.arrays[name], array), name


@pytest.mark.parametrize(
    ("columns", "dtype", "scales", "bits", "lanes"),
    [
        *[(1, "bf16", 2, 3, 16), (70, "fp16", 1, 4, 8), (1000, "fp32", 2, 5, 2)],
        *[(1000, "bf16", 1, 6, 4), (2049, "bf16", 2, 3, 8), (2500, "fp32", 1, 8, 16)],
        *[(2500, "fp16", 2, 4, 16), (516, "bf16", 2, 7, 1)],
    ],
)
def test_products(
    cupy: FakeCupy, columns: int, dtype: str, scales: int, bits: int, lanes: int
) -> None:
    kind = DictKind(((0.6, 12), (0.7, 12)), scales, columns % 2 == 0, dtype, 1, False, False)
    shape = Shape(13, columns, 0.7, None, 0, exact=True)
    members = [matrix(kind, shape, seed) for seed in range(3)]
    coded = [member for member in members if isinstance(member, EncodedMatrix)]
    stack = with_runs(coded, bits, lanes, scales, kind.column_scale)
    x = vectors(kind, shape, 2)
    given = cupy.asarray(from_float32(x, NAMES[dtype]))
    experts = np.array([[2, 0], [1, 2]], np.int32)
    dense = np.stack([dequantize(member) for member in members])
    out = cupy.empty((2, 2, 13), np.float32)
    y = gpu.expert_matvec(stack, given, cupy.asarray(experts), out=out)
    assert np.array_equal(y, np.einsum("tc,tkrc->tkr", x, dense[experts]))
    y = gpu.matvec(stack[1], given[1], out=cupy.empty(13, np.float32))
    assert np.array_equal(y, dense[1] @ x[1])
    assert all("Path" in launch.kernel.source for launch in cupy.launched[-2:])


def test_what_is_chosen(cupy: FakeCupy) -> None:
    def chosen(rows: int, columns: int, zeros: float, ones: float = 0.0) -> RunLayout | None:
        levels = random_levels(rows, columns, zeros, np.random.default_rng(0), ones)
        members = [encode_matrix(levels, np.ones((rows, 2), np.uint16))]
        return choose(dict_layout(members), H200)

    many = chosen(4096, 512, 0.885)
    assert many is not None
    assert (many.bits, many.lanes) == (6, 2)
    few = chosen(8, 14336, 0.6)
    assert few is not None
    assert (few.bits, few.lanes) == (4, 16)
    assert chosen(2, 100, 0.1, 0.6) is None  # magnitudes of 2.5 on average
    assert chosen(1, 40_000, 0.9) is None  # 160 KB of x
    assert chosen(0, 100, 0.9) is None
    assert cuda.limits(0).shared_bytes == H200.shared_bytes


def test_runs_only_if_memory_is_left(cupy: FakeCupy) -> None:
    levels = random_levels(64, 1000, 0.885, np.random.default_rng(0))
    member = encode_matrix(levels, np.ones((64, 2), np.uint16))
    slow = gpu.upload(member, runs=False)
    fast = gpu.add_runs(slow)
    assert fast.packed.runs
    assert gpu.add_runs(fast) is fast
    expected = expected_bytes(dict_layout([member]), fast.packed.runs.layout)
    assert fast.packed.runs.bytes <= expected <= 1.5 * fast.packed.runs.bytes
    cupy.free = (1 << 30) // 10 + expected + 1000
    assert gpu.add_runs(slow, spare=999).packed.runs
    assert gpu.add_runs(slow, spare=1001) is slow
    cupy.free -= 1001
    assert gpu.upload(member).packed.runs is None


def test_runs_that_do_not_fit_after_all(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = gpu.upload(
        encode_matrix(np.ones((9, 90), np.int8), np.ones((9, 2), np.uint16)), runs=False
    )
    monkeypatch.setattr(cupy, "zeros", lambda *_: cupy.empty(2 << 30, np.uint8))
    assert gpu.add_runs(slow) is slow
