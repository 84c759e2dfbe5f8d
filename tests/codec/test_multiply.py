"""Multiplying straight from the codewords, against the decoded matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import (
    EncodedBits,
    EncodedMatrix,
    decode,
    dequantize,
    dequantize_rows,
    encode_matrix,
    fit_dictionary,
    matmul,
    matvec,
    matvecs,
)
from qmoe_format.codec.kernels.simd import cpu_has
from qmoe_format.codec.multiply import matvec_call
from qmoe_format.codec.segments import run_all
from qmoe_format.dtypes import from_float32, to_float32
from qmoe_format.errors import QMoEError

from .strategies import dictionaries, dictionary, levels, random_levels, with_string


def bf16(values: Any) -> npt.NDArray[np.uint16]:
    return from_float32(np.asarray(values, np.float32), "BF16")


def encoded(coded: np.ndarray, **options: Any) -> EncodedMatrix:
    """``coded`` with scales of 1."""
    return encode_matrix(coded, bf16(np.ones((len(coded), 1))), **options)


@st.composite
def matrices(draw: st.DrawFn) -> EncodedMatrix:
    """Every combination of scales, symmetric or not, per column or not."""
    coded = draw(levels())
    rows, columns = coded.shape
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return encode_matrix(
        coded,
        bf16(rng.standard_normal((rows, draw(st.integers(1, 2))))),
        bf16(rng.standard_normal(columns)) if draw(st.booleans()) else None,
        dictionary=draw(dictionaries),
        refinement_dictionary=draw(dictionaries),
        rows_per_segment=draw(st.sampled_from([None, 1, 3, 1000])),
    )


def within_tolerance(matrix: EncodedMatrix, x: np.ndarray, y: np.ndarray) -> bool:
    """[M-1], for x [tokens, columns]."""
    weights = dequantize(matrix).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    room = (matrix.columns + 8) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weights.T))
    return bool((np.abs(y - exact) <= room).all())


@given(matrices(), st.integers(0, 40))
@settings(deadline=None)
def test_products_are_within_the_tolerance(matrix: EncodedMatrix, tokens: int) -> None:
    x = np.random.default_rng(1).standard_normal((tokens, matrix.columns)).astype(np.float32)
    assert within_tolerance(matrix, x, matmul(matrix, x))
    for row in x[:2]:
        assert within_tolerance(matrix, row[None], matvec(matrix, row)[None])
        assert within_tolerance(matrix, row[None], matvec(matrix, row, threads=2)[None])


@given(matrices(), st.integers(1, 20))
@settings(deadline=None)
def test_small_integers_are_exact(matrix: EncodedMatrix, tokens: int) -> None:
    """[M-2]: scales made powers of two, x small integers."""
    rng = np.random.default_rng(2)

    def powers(scale: np.ndarray | None) -> np.ndarray | None:
        if scale is None:
            return None
        return bf16(2.0 ** rng.integers(-2, 3, scale.shape) * rng.choice([-1, 1]))

    row_scale = powers(matrix.row_scale)
    assert row_scale is not None
    exact = EncodedMatrix(matrix.levels, row_scale, powers(matrix.column_scale))
    x = rng.integers(-8, 9, (tokens, matrix.columns)).astype(np.float32)
    expected = x.astype(np.float64) @ dequantize(exact).astype(np.float64).T
    assert np.array_equal(matmul(exact, x), expected)
    assert np.array_equal(matvec(exact, x[0]), expected[0])


@given(matrices())
@settings(deadline=None)
def test_dequantized_values_by_the_letter(matrix: EncodedMatrix) -> None:
    """[V-1] and [V-2], weight by weight."""
    weights = dequantize(matrix)
    coded = decode(matrix.levels)
    scale = to_float32(matrix.row_scale, "BF16")
    for row, column in [(r, c) for r in range(matrix.rows)[:3] for c in range(matrix.columns)]:
        pair, level = scale[row], int(coded[row, column])
        low, high = (-pair[0], pair[0]) if matrix.symmetric else pair
        value = np.float32(level * high if level > 0 else -level * low if level < 0 else 0)
        if matrix.column_scale is not None and level:
            value = value * to_float32(matrix.column_scale, "BF16")[column]
        assert weights[row, column].tobytes() == np.float32(value).tobytes()


@given(matrices(), st.data())
@settings(deadline=None)
def test_some_rows_are_those_of_the_whole(matrix: EncodedMatrix, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, matrix.rows))
    last = data.draw(st.integers(first, matrix.rows))
    out = np.full((last - first, matrix.columns), np.nan, np.float32)
    dequantize_rows(matrix, first, out, threads=data.draw(st.integers(1, 2)))
    assert out.tobytes() == dequantize(matrix)[first:last].tobytes()


def test_rows_that_do_not_exist() -> None:
    matrix = encoded(random_levels(10, 64, 0.885))
    for first, out in (
        (-1, np.empty((2, 64), np.float32)),
        (9, np.empty((2, 64), np.float32)),
        (0, np.empty((2, 63), np.float32)),
        (0, np.empty((2, 64), np.float64)),
        (0, np.empty((2, 128), np.float32)[:, ::2]),
        (0, np.empty(64, np.float32)),
    ):
        with pytest.raises(QMoEError) as error:
            dequantize_rows(matrix, first, out)  # type: ignore[arg-type]
        assert error.value.code == "argument"


@pytest.mark.parametrize("dense", [False, True])
def test_both_kernels_of_short_entries(dense: bool) -> None:
    """Segments of several rows and of several chunks; a last one of fewer rows."""
    if dense and not cpu_has("bmi2"):
        pytest.skip("this processor has no BMI2")
    for rows, columns, rows_per_segment in ((11, 333, 4), (3, 40_001, 2)):
        scale = np.random.default_rng(0).standard_normal((rows, 2))
        matrix = encode_matrix(
            random_levels(rows, columns, 0.5),
            bf16(scale),
            dictionary=dictionary(0.5, 12),
            rows_per_segment=rows_per_segment,
        )
        x = np.random.default_rng(1).standard_normal((1, columns)).astype(np.float32)
        y = np.empty((1, rows), np.float32)
        call = matvec_call(matrix, x[0], y[0], dense)
        assert call[0].__name__ == ("dot_dense" if dense else "dot_sparse")
        run_all([call], threads=2)
        assert within_tolerance(matrix, x, y)


def test_several_at_once() -> None:
    """Threads share each of them, also one with fewer segments than threads."""
    x = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    products = []
    for rows, columns in ((40, 64), (1, 300), (0, 5), (7, 0), (333, 96)):
        levels = random_levels(rows, columns, 0.885, most=1 + rows % 2)
        matrix = encoded(levels, rows_per_segment=3)
        products.append((matrix, x[:columns], np.full(rows, np.nan, np.float32)))
    for threads in (1, 3):
        matvecs(products, threads)
        for matrix, part, out in products:
            assert np.array_equal(out, matvec(matrix, part))
            out[:] = np.nan
    matvecs([])


@pytest.mark.parametrize("most", [1, 5])
def test_rows_longer_than_a_chunk(most: int) -> None:
    scale = bf16(np.full((5, 2), [-0.5, 1]))
    matrix = encode_matrix(random_levels(5, 70_000, 0.9, most=most), scale, rows_per_segment=2)
    out = np.empty((3, 70_000), np.float32)
    dequantize_rows(matrix, 1, out)
    assert np.array_equal(out, dequantize(matrix)[1:4])
    x = np.random.default_rng(0).standard_normal((20, 70_000)).astype(np.float32)
    assert within_tolerance(matrix, x, matmul(matrix, x))
    assert within_tolerance(matrix, x[:1], matvec(matrix, x[0])[None])


def with_segments(bits: EncodedBits, segments: npt.NDArray[np.uint8]) -> EncodedBits:
    """One segment of these bytes."""
    return replace(
        bits,
        length_base=segments.size,
        segments=np.concatenate([segments, np.zeros(8, np.uint8)]),
        segment_bytes=segments.size,
    )


@pytest.mark.parametrize("string", ["mask", "refinement"])
def test_what_is_missing_is_not_read_from_elsewhere(string: str) -> None:
    """Codewords may promise more non-zeros than have signs, or magnitudes, in the segment."""
    row = np.full((1, 4000), 1 if string == "mask" else 2, np.int8)
    whole = encoded(row, width=8)
    bits: EncodedBits = getattr(whole.levels, string)
    cut = with_segments(bits, bits.segments[500 : bits.segment_bytes])
    matrix = replace(whole, levels=with_string(whole.levels, string, cut))
    x = np.ones((2, 4000), np.float32)
    calls: list[Callable[[], Any]] = [
        lambda: matvec(matrix, x[0]),
        lambda: matmul(matrix, x),
        lambda: dequantize_rows(matrix, 0, np.empty((1, 4000), np.float32)),
    ]
    for call in calls:
        with pytest.raises(QMoEError, match="ends before") as error:
            call()
        assert error.value.code == "malformed"


def cut_short(coded: npt.NDArray[np.int8]) -> EncodedMatrix:
    """One segment without the bytes where it begins, those of signs."""
    whole = encoded(coded, dictionary=dictionary(0.5, 8))
    bits = whole.levels.mask
    cut = with_segments(bits, bits.segments[500 : bits.segment_bytes])
    return replace(whole, levels=replace(whole.levels, mask=cut))


@pytest.mark.skipif(not cpu_has("bmi2"), reason="this processor has no BMI2")
def test_signs_that_are_missing_for_the_dense_kernel() -> None:
    matrix = cut_short(np.ones((1, 4000), np.int8))
    call = matvec_call(matrix, np.ones(4000, np.float32), np.empty(1, np.float32), dense=True)
    assert call[0].__name__ == "dot_dense"
    with pytest.raises(QMoEError, match="ends before"):
        run_all([call], 1)


@pytest.mark.parametrize("zero_fraction", [0.2, 0.55])
def test_entries_of_many_nonzeros(zero_fraction: float) -> None:
    """Entries of more than four, and of more than eight, non-zeros take several stores."""
    chosen = fit_dictionary(zero_fraction, 16)
    assert chosen.max_ones > 8
    matrix = encoded(random_levels(40, 999, zero_fraction), dictionary=chosen)
    x = np.random.default_rng(0).standard_normal((3, 999)).astype(np.float32)
    assert within_tolerance(matrix, x, matmul(matrix, x))
    assert within_tolerance(matrix, x[:1], matvec(matrix, x[0])[None])


def test_into_a_given_array() -> None:
    """Which is returned; x stays as it is."""
    coded = random_levels(10, 64, 0.885, most=3)
    matrix = encode_matrix(coded, bf16(np.ones((10, 1))), bf16(np.full(64, 4.0)))
    x, out = np.ones(64, np.float32), np.empty(10, np.float32)
    assert matvec(matrix, x, out) is out
    assert np.array_equal(out, 4.0 * coded.sum(axis=1))
    assert np.array_equal(x, np.ones(64))


def test_arguments_that_do_not_fit_are_refused() -> None:
    coded = random_levels(10, 64, 0.885)
    one = bf16(np.ones((10, 1)))
    matrix = encoded(coded)
    calls: list[Callable[[], Any]] = [
        lambda: matvec(matrix, np.ones(63, np.float32)),
        lambda: matvec(matrix, np.ones(64)),  # type: ignore[arg-type]
        lambda: matmul(matrix, np.ones(64, np.float32)),
        lambda: matvec(matrix, np.ones(64, np.float32), np.ones(9, np.float32)),
        lambda: encode_matrix(coded, np.ones((10, 1), np.float32)),
        lambda: encode_matrix(coded, one[:9]),
        lambda: encode_matrix(coded, one[:, 0]),
        lambda: encode_matrix(coded, np.repeat(one, 3, axis=1)),
        lambda: encode_matrix(coded, one, bf16(np.ones(63))),
    ]
    for call in calls:
        with pytest.raises(QMoEError) as error:
            call()
        assert error.value.code == "argument"


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_scales_are_finite(bad: float) -> None:
    coded = random_levels(10, 64, 0.885)
    one = bf16(np.ones((10, 2)))
    for column in range(2):
        spoiled = one.copy()
        spoiled[3, column : column + 1] = bf16([bad])
        with pytest.raises(QMoEError) as error:
            encode_matrix(coded, spoiled)
        assert error.value.code == "value"
    with pytest.raises(QMoEError) as error:
        encode_matrix(coded, one, bf16(np.full(64, bad)))
    assert error.value.code == "value"
