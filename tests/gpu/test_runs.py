"""Runs of gap codes, made, multiplied and decoded on the shim: against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_format import gpu
from qmoe_format.codec import EncodedMatrix, dequantize, encode_matrix
from qmoe_format.codec import decode as decode_levels
from qmoe_format.dtypes import from_float32
from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda, launch_plan, runs, transcode
from qmoe_format.gpu.int_dict_packing import layout as dict_layout
from qmoe_format.gpu.runs import RunLayout, choose, expected_bytes
from qmoe_format.gpu.transcode import runs_of
from tests.gpu import run_reference, shim
from tests.gpu.fake_cupy import FakeCupy
from tests.gpu.problems import (
    NAMES,
    DictKind,
    Machine,
    Shape,
    decode,
    expert_matvec,
    matmul,
    matrix,
    random_levels,
    vectors,
)
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
    cupy: FakeCupy,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    columns: int,
    zeros: float,
    ones: float,
    bits: int,
    lanes: int,
) -> None:
    monkeypatch.setattr(transcode, "SCRATCH", 2 * rows * columns * lanes)  # all at once, or not
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
    levels = np.stack([decode_levels(member.levels) for member in members])
    expected = run_reference.runs(levels, found.layout)
    assert found.highest == abs(levels.astype(int)).max(initial=0)
    assert list(found.arrays) == [*expected, "row_scale", "column_scale"]
    scales = np.stack([member.row_scale for member in members])
    expected["row_scale"] = np.take_along_axis(scales, expected["order"][:, :, None].astype(int), 1)
    for name, array in expected.items():
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


@given(st.integers(1, 3000), st.sampled_from([1, 2, 4, 8, 16]))
def test_order_of_rows(rows: int, lanes: int) -> None:
    """Groups are neighbors in length; blocks of groups that lie together have equal work."""
    layout = RunLayout(1, rows, 100, 4, lanes, 2, column_scales=False)
    ranks, each = np.argsort(runs.places(layout)), 16 // lanes
    assert np.array_equal(np.sort(ranks), np.arange(rows))
    groups = [ranks[first : first + each] for first in range(0, rows, each)]
    assert len(groups) == layout.groups
    assert all(np.array_equal(group, np.arange(group[0], group[-1] + 1)) for group in groups)
    firsts = np.array([group[0] for group in groups[: len(groups) // 30 * 30]])
    assert np.all(abs(firsts.reshape(-1, 30).mean(axis=1) - (rows - each) / 2) <= 0.1 * rows)


SIZES = [
    *[(1, 1, 5, 2), (18, 35, 8, 1), (17, 500, 3, 2), (28, 304, 3, 4), (5, 2049, 4, 8)],
    *[(3, 1000, 6, 16), (1, 33, 3, 16), (2, 5000, 7, 16)],
]


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "lanes", "refined", "column_scales"),
    # With each size, each of both with and without, in turn equal and not, to compile less.
    [
        (*size, refined, refined != (i // 2 % 2 == 1))
        for i, size in enumerate(SIZES)
        for refined in (False, True)
    ],
)
def test_decoding(
    rows: int, columns: int, bits: int, lanes: int, refined: bool, column_scales: bool
) -> None:
    """To the bit, in any order of threads, at any address; one of the matrices is empty."""
    strings = ((0.6, 12), (0.7, 12) if refined else None)
    kind = DictKind(strings, 1 + lanes // 2 % 2, column_scales, "bf16", 1, False, False)
    shapes = [Shape(rows, columns, zeros, None, 0) for zeros in (0.7, 1.0, 0.2)]
    coded = [matrix(kind, shape, 3 * seed) for seed, shape in enumerate(shapes)]
    stack = run_reference.stack(coded, bits, lanes)
    for dtype, name in NAMES.items():
        expected = from_float32(np.stack([dequantize(member) for member in coded]), name)
        for order in (shim.FORWARD, shim.BACKWARD, 2):
            assert decode(stack, dtype, Machine(order)).tobytes() == expected.tobytes()
        part = decode(stack, dtype, part=(1, 2), offset=3)
        assert part.tobytes() == expected[1:].tobytes()


@pytest.mark.parametrize("most", [1, 127])
@pytest.mark.parametrize("column_scales", [False, True])
def test_decoding_keeps_subnormal_numbers(cupy: FakeCupy, most: int, column_scales: bool) -> None:
    """[V-1] to [V-3]; levels of 127 are as many landings, by several lanes."""
    odd = np.array([1e-38, 1e-40, -0.0, 3e38, 1e-4, -1e-30, 2.5], np.float32)
    levels = np.random.default_rng(0).integers(-1, 2, (9, 200)).astype(np.int8)
    levels[:, ::50] *= most
    by_column = from_float32(np.resize(odd[::-1], 200), "BF16") if column_scales else None
    coded = encode_matrix(levels, from_float32(np.resize(odd, (9, 2)), "BF16"), by_column)
    stack = with_runs([coded], 4, 8, 2, column_scales)
    for dtype, name in NAMES.items():
        expected = from_float32(dequantize(coded), name)
        assert gpu.decode(stack[0], dtype).get().tobytes() == expected.tobytes()


def test_codewords_go_when_runs_are_there(cupy: FakeCupy) -> None:
    """Except where runs cannot be made; what a stack says of its memory is true."""
    levels = random_levels(64, 1000, 0.885, np.random.default_rng(0))
    member = encode_matrix(levels, np.ones((64, 2), np.uint16), np.ones(1000, np.uint16))
    stack = gpu.upload([member, member])
    assert stack.packed.runs
    kept = stack.packed.runs.arrays
    assert not stack.packed.arrays
    names = {"offsets", "starts", "order", "bases", "words"}
    assert set(kept) == {"row_scale", "column_scale"} | names
    assert all(array.base is None or array.base.nbytes == array.nbytes for array in kept.values())
    assert stack.bytes == sum(array.nbytes for array in kept.values())
    long = gpu.upload(encode_matrix(np.ones((1, 40_000), np.int8), np.ones((1, 2), np.uint16)))
    assert long.packed.runs is None
    assert "segments" in long.packed.arrays


def test_more_tokens_than_a_grid_has_blocks(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_plan, "MOST_BLOCKS", 3)
    kind = DictKind(((0.6, 12), None), 2, False, "fp32", 1, False, False)
    shape = Shape(5, 64, 0.7, None, 0, exact=True)
    coded = [matrix(kind, shape, 3 * seed) for seed in range(2)]
    stack = run_reference.stack(coded, 4, 4)
    dense = np.stack([dequantize(member) for member in coded])
    x = vectors(kind, shape, 7)
    assert np.array_equal(matmul(kind, stack, x, expert=1), x @ dense[1].T)
    experts = np.arange(14, dtype=np.int32).reshape(7, 2) % 2
    for each in (x, np.repeat(x[:, None], 2, axis=1)):
        y = expert_matvec(kind, stack, each, experts)
        assert np.array_equal(y, np.einsum("tc,tkrc->tkr", x, dense[experts]))
    uploaded = gpu.upload(coded)
    assert np.array_equal(gpu.matmul(uploaded[1], cupy.asarray(x)), x @ dense[1].T)
    for each in (x, np.repeat(x[:, None], 2, axis=1)):
        y = gpu.expert_matvec(uploaded, cupy.asarray(each), cupy.asarray(experts))
        assert np.array_equal(y, np.einsum("tc,tkrc->tkr", x, dense[experts]))
    assert len(cupy.launched) > 6
    with pytest.raises(QMoEError, match="4 experts, more than 3"):
        expert_matvec(kind, stack, x, np.zeros((7, 4), np.int32))


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
    stack = gpu.upload(member)
    assert stack.packed.runs
    assert gpu.add_runs(stack)
    expected = expected_bytes(dict_layout([member]), stack.packed.runs.layout)
    assert stack.packed.runs.bytes <= expected <= 1.5 * stack.packed.runs.bytes
    slow = gpu.upload(member, runs=False)
    cupy.free = (1 << 30) // 10 + expected + 1000
    assert not gpu.add_runs(slow, spare=slow.bytes + 1001)
    assert slow.packed.runs is None
    assert gpu.add_runs(slow, spare=slow.bytes + 999)
    cupy.free -= 1001
    assert gpu.upload(member).packed.runs is None


def test_runs_that_do_not_fit_after_all(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = gpu.upload(
        encode_matrix(np.ones((9, 90), np.int8), np.ones((9, 2), np.uint16)), runs=False
    )
    monkeypatch.setattr(cupy, "zeros", lambda *_: cupy.empty(2 << 30, np.uint8))
    assert not gpu.add_runs(slow)
    assert slow.packed.runs is None
