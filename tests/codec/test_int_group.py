"""Integers in groups: packing, weights to the bit, and products within the bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import (
    EncodedMatrix,
    GroupedMatrix,
    dequantize,
    dequantize_rows,
    encode_matrix,
    matmul,
    matvec,
    matvecs,
    pack_groups,
    unpack_groups,
)
from qmoe_format.dtypes import to_float32
from tests.refusals import refusal

from .strategies import random_levels

KINDS = [
    *[(bits, "linear", z) for bits in (2, 3, 4, 8) for z in (False, True)],
    *[(bits, "log", False) for bits in (2, 3, 4, 8)],
]
ONE = 0x3F80  # bf16


def random_matrix(
    rows: int,
    columns: int,
    bits: int = 4,
    grid: str = "linear",
    zero_points: bool = False,
    group_size: int = 0,
    scales: tuple[int, int] = (0x3C00, 0x3E00),
    seed: int = 0,
) -> GroupedMatrix:
    """Random codes and zero points; the bits of scales from a range, with either sign."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // group_size) if group_size else 1
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    drawn = rng.integers(*scales, (rows, groups)) | rng.integers(0, 2, (rows, groups)) << 15
    points = rng.integers(0, 2**bits, (rows, groups)).astype(np.uint8) if zero_points else None
    return pack_groups(
        codes, drawn.astype(np.uint16), bits, grid=grid, group_size=group_size, zero_points=points
    )


@st.composite
def matrices(
    draw: Any, max_rows: int = 9, scales: tuple[int, int] = (0x3C00, 0x3E00)
) -> GroupedMatrix:
    """Every kind and shape, those around the sizes of vectors and groups more often."""
    sides = st.integers(0, 300) | st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129])
    bits, grid, zero_points = draw(st.sampled_from(KINDS))
    return random_matrix(
        draw(st.integers(0, max_rows)),
        draw(sides),
        bits,
        grid,
        zero_points,
        draw(st.sampled_from([0, 32, 64, 128])),
        scales,
        draw(st.integers(0, 99)),
    )


def by_the_letter(matrix: GroupedMatrix, r: int, c: int) -> np.float32:
    """[G-6] and [G-7]: exact numbers, rounded once; codes by bit number."""
    row = int.from_bytes(matrix.packed[r].tobytes(), "little")
    group = c // matrix.group_size if matrix.group_size else 0
    u, half = row >> c * matrix.bits & 2**matrix.bits - 1, 1 << (matrix.bits - 1)
    z = half if matrix.zero_points is None else int(matrix.zero_points[r, group])
    scale = to_float32(matrix.scales[r, group : group + 1], "BF16")[0]
    if matrix.grid == "log":
        negative, factor = u >= half, Fraction(1, 2 ** (u % half))
    elif u == z:
        return np.float32(0)
    else:
        negative, factor = u < z, Fraction(abs(u - z))
    magnitude = np.float32(float(abs(Fraction(float(scale))) * factor))
    return -magnitude if bool(np.signbit(scale)) != negative else magnitude


@given(matrices(max_rows=3, scales=(0, 0x7F80)))  # any finite scale
@settings(deadline=None)
def test_weights_by_the_letter(matrix: GroupedMatrix) -> None:
    rows, columns = matrix.shape
    with np.errstate(over="ignore"):
        expected = [[by_the_letter(matrix, r, c) for c in range(columns)] for r in range(rows)]
    want = np.array(expected, np.float32).reshape(matrix.shape)
    assert dequantize(matrix).tobytes() == want.tobytes()


@given(matrices(), st.data())
@settings(deadline=None)
def test_some_rows_are_those_of_the_whole(matrix: GroupedMatrix, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, matrix.rows))
    last = data.draw(st.integers(first, matrix.rows))
    out = np.full((last - first, matrix.columns), np.nan, np.float32)
    dequantize_rows(matrix, first, out, threads=data.draw(st.integers(1, 2)))
    assert out.tobytes() == dequantize(matrix, threads=2)[first:last].tobytes()


@given(st.integers(0, 9), st.integers(0, 300), st.sampled_from([2, 3, 4, 8]), st.integers(0, 99))
def test_codes_are_packed_in_order_of_bit_number(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    matrix = pack_groups(codes, np.full((rows, 1), ONE, np.uint16), bits)
    assert np.array_equal(unpack_groups(matrix), codes)
    assert matrix.packed.shape == (rows, -(-columns * bits // 128) * 16)
    for packed, row in zip(matrix.packed, codes.tolist(), strict=True):
        number = sum(u << c * bits for c, u in enumerate(row))
        assert int.from_bytes(packed.tobytes(), "little") == number


def within_tolerance(
    matrix: GroupedMatrix, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
) -> bool:
    """[M-1], for x [tokens, columns]."""
    weights = dequantize(matrix).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    room = (matrix.columns + 8) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weights.T))
    return bool((np.abs(y - exact) <= room).all())


@given(matrices(), st.integers(0, 11))
@settings(deadline=None)
def test_products_are_within_the_tolerance(matrix: GroupedMatrix, tokens: int) -> None:
    x = np.random.default_rng(1).standard_normal((tokens, matrix.columns)).astype(np.float32)
    assert within_tolerance(matrix, x, matmul(matrix, x))
    assert within_tolerance(matrix, x, matmul(matrix, x, threads=2))
    for row in x[:2]:
        assert within_tolerance(matrix, row[None], matvec(matrix, row)[None])
        assert within_tolerance(matrix, row[None], matvec(matrix, row, threads=2)[None])


@pytest.mark.parametrize("columns", [20, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_zero_leave_nothing(kind: tuple[int, str, bool], columns: int) -> None:
    """Nor do rounding errors of larger weights in another group or row. [M-1]"""
    bits, grid, zero_points = kind
    matrix = random_matrix(4, columns, bits, grid, zero_points, group_size=32)
    codes = unpack_groups(matrix)
    if grid == "log":
        matrix.scales[:2] = 0
    else:
        z = matrix.zero_points if zero_points else np.full_like(matrix.scales, 1 << (bits - 1))
        assert z is not None
        codes[:2] = z.repeat(32, 1)[:2, :columns]
    matrix = pack_groups(
        codes, matrix.scales, bits, grid=grid, group_size=32, zero_points=matrix.zero_points
    )
    x = np.random.default_rng(1).standard_normal((4, columns)).astype(np.float32)
    y = matmul(matrix, x)
    assert not y[:, :2].any()
    assert y[:, 2:].all()
    assert not matvec(matrix, x[0])[:2].any()


@given(matrices(), st.integers(1, 9))
@settings(deadline=None)
def test_small_integers_are_exact(matrix: GroupedMatrix, tokens: int) -> None:
    """[M-2]: scales made powers of two, x small integers, or one integer near 2^24."""
    if matrix.grid == "log" and matrix.bits == 8:  # its products have no common power of two
        return
    rng = np.random.default_rng(2)
    exponents = rng.integers(125, 130, matrix.scales.shape) << 7
    signs = rng.integers(0, 2, matrix.scales.shape) << 15
    exact = replace(matrix, scales=(exponents | signs).astype(np.uint16))
    x = rng.integers(-3, 4, (tokens, matrix.columns)).astype(np.float32)
    expected = x.astype(np.float64) @ dequantize(exact).astype(np.float64).T
    assert np.array_equal(matmul(exact, x), expected)
    assert np.array_equal(matvec(exact, x[0]), expected[0])


def test_the_ends_of_the_range() -> None:
    """2^-127 is subnormal, its product with a scale need not be; 255 steps are no overflow."""
    codes = np.array([[127, 255, 0]], np.uint8)
    matrix = pack_groups(codes, np.array([[0x7F00]], np.uint16), 8, grid="log")
    assert dequantize(matrix).tolist() == [[1.0, -1.0, 2.0**127]]
    x = np.array([0.75, 0.25, 0], np.float32)
    assert matvec(matrix, x).tolist() == [0.5]
    wide = np.zeros((1, 64), np.uint8) + np.uint8(127)
    matrix = pack_groups(wide, np.array([[0x7F00]], np.uint16), 8, grid="log")
    assert matvec(matrix, np.full(64, 1.5, np.float32)).tolist() == [96.0]
    top = pack_groups(
        np.array([[255]], np.uint8), np.array([[ONE]], np.uint16), 8,
        zero_points=np.array([[0]], np.uint8),
    )  # fmt: skip
    assert dequantize(top).tolist() == [[255.0]]


def test_columns_beyond_the_last_do_not_count() -> None:
    """They would be infinite here; and x is as long as the row."""
    matrix = pack_groups(np.full((2, 33), 8, np.uint8), np.full((2, 2), 0x7F7F, np.uint16), 4,
                         group_size=32)  # fmt: skip
    assert matvec(matrix, np.ones(33, np.float32)).tolist() == [0.0, 0.0]


def test_several_at_once_of_either_kind() -> None:
    """Threads share each of them, also one with fewer rows than threads."""
    x = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    products: list[tuple[GroupedMatrix | EncodedMatrix, Any, Any]] = []
    for rows, columns in ((40, 64), (1, 300), (0, 5), (7, 0), (33, 96)):
        grouped = random_matrix(rows, columns, 3, group_size=32)
        products.append((grouped, x[:columns], np.full(rows, np.nan, np.float32)))
        levels = random_levels(rows, columns, 0.7)
        encoded = encode_matrix(levels, np.full((rows, 1), ONE, np.uint16))
        products.append((encoded, x[:columns], np.full(rows, np.nan, np.float32)))
    for threads in (1, 3):
        matvecs(products, threads)
        for matrix, part, out in products:
            assert np.array_equal(out, matvec(matrix, part))
            out[:] = np.nan


def test_into_a_given_array() -> None:
    """Which is returned, and may be a part of another; x is not changed."""
    matrix = random_matrix(10, 70)
    x = np.random.default_rng(0).standard_normal((5, 140)).astype(np.float32)[:, ::2]
    before, whole = x.copy(), np.full((5, 30), np.nan, np.float32)
    part = whole[:, 10:20]
    assert matmul(matrix, x, part) is part
    assert np.array_equal(part, matmul(matrix, np.ascontiguousarray(x)))
    assert np.isnan(whole[:, :10]).all()
    assert np.isnan(whole[:, 20:]).all()
    column = whole[0, ::3]
    assert matvec(matrix, x[0], column) is column
    assert np.array_equal(column, matvec(matrix, x[0].copy()))
    assert np.array_equal(x, before)


def test_read_only_arrays() -> None:
    """As those of a file are."""
    matrix = random_matrix(3, 70, zero_points=True)
    x = np.ones((2, 70), np.float32)
    expected = matmul(matrix, x), matvec(matrix, x[0]), dequantize(matrix)
    for array in (matrix.packed, matrix.scales, matrix.zero_points, x):
        assert array is not None
        array.flags.writeable = False
    for found, want in zip(
        (matmul(matrix, x), matvec(matrix, x[0]), dequantize(matrix)), expected, strict=True
    ):
        assert np.array_equal(found, want)


def test_arguments_that_do_not_fit_are_refused() -> None:
    codes, scales = np.zeros((3, 70), np.uint8), np.full((3, 3), ONE, np.uint16)
    points = np.zeros((3, 3), np.uint8)
    matrix = pack_groups(codes, scales, 3, group_size=32, zero_points=points)
    x = np.ones(70, np.float32)

    def pack(**changes: Any) -> Callable[[], Any]:
        given: dict[str, Any] = {
            "codes": codes,
            "scales": scales,
            "bits": 3,
            "group_size": 32,
        } | changes
        return lambda: pack_groups(**given | changes)

    calls = [
        pack(codes=codes[0]),
        pack(codes=codes.astype(np.int8)),
        pack(codes=codes + np.uint8(8)),
        pack(bits=5),
        pack(grid="cubic"),
        pack(group_size=16),
        pack(group_size=64),
        pack(scales=scales[:2]),
        pack(scales=scales.astype(np.float32)),
        pack(scales=np.asfortranarray(scales)),
        pack(zero_points=points[:, :2]),
        pack(zero_points=points + np.uint8(8)),
        pack(zero_points=points, grid="log"),
        lambda: replace(matrix, packed=matrix.packed[:, :16]),
        lambda: replace(matrix, packed=matrix.packed[:2]),
        lambda: replace(matrix, columns=90),
        lambda: matvec(matrix, x[:69]),
        lambda: matvec(matrix, x.astype(np.float64)),
        lambda: matvec(matrix, x, np.empty(2, np.float32)),
        lambda: matmul(matrix, x),
        lambda: matmul(matrix, x[None], np.empty((1, 2), np.float32)),
        lambda: dequantize_rows(matrix, 2, np.empty((2, 70), np.float32)),
        lambda: dequantize_rows(matrix, -1, np.empty((2, 70), np.float32)),
        lambda: dequantize_rows(matrix, 0, np.empty((2, 69), np.float32)),
    ]
    for call in calls:
        refusal(call, "argument")


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_scales_are_finite(bad: int) -> None:
    scales = np.full((3, 1), ONE, np.uint16)
    scales[1] = bad
    refusal(lambda: pack_groups(np.zeros((3, 70), np.uint8), scales, 4), "value")
