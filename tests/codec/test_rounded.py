"""Products from the codewords with x rounded to int8."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import EncodedMatrix, encode_matrix, multiply_rounded, packable
from qmoe_format.codec.kernels.simd import DEPOSITS
from qmoe_format.codec.rounded import rounded_calls
from qmoe_format.codec.segments import run_all
from qmoe_format.errors import QMoEError

from .strategies import dictionaries, dictionary, levels, random_levels
from .test_multiply import bf16, cut_short
from .test_packed import Floats, check, encoded, random_x

KERNELS = [
    False,
    pytest.param(
        True, marks=pytest.mark.skipif(not DEPOSITS, reason="this processor has no fast BMI2")
    ),
]


def rounded_product(
    matrix: EncodedMatrix, x: Floats, dense: bool | None = None, threads: int = 1
) -> Floats:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    run_all(rounded_calls(matrix, x, out, dense), threads)
    return out


def kernels_of(matrix: EncodedMatrix, x: Floats, dense: bool) -> set[str]:
    out = np.empty((len(x), matrix.rows), np.float32)
    return {call[0].__name__ for call in rounded_calls(matrix, x, out, dense)}


@pytest.mark.parametrize("dense", KERNELS)
@given(data=st.data())
@settings(deadline=None)
def test_products(data: st.DataObject, dense: bool) -> None:
    coded = data.draw(levels(max_columns=900))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    matrix = encode_matrix(
        coded,
        bf16(rng.standard_normal((len(coded), data.draw(st.integers(1, 2))))),
        bf16(rng.standard_normal(coded.shape[1])) if data.draw(st.booleans()) else None,
        dictionary=data.draw(dictionaries),
        rows_per_segment=data.draw(st.sampled_from([None, 1, 3, 1000])),
    )
    if not packable(matrix):
        return
    x = random_x(data.draw(st.integers(0, 5)), matrix.columns)
    y = rounded_product(matrix, x, dense)
    check(matrix, x, y)
    assert y.tobytes() == rounded_product(matrix, x, dense, threads=2).tobytes()
    for row, one in zip(x, y, strict=True):
        assert rounded_product(matrix, row[None], dense).tobytes() == one.tobytes()


@pytest.mark.parametrize("dense", KERNELS)
@pytest.mark.parametrize("zeros", [0.03, 0.5, 0.8, 0.97])  # entries of 32, 64 and more bits
def test_rows_of_several_slabs(dense: bool, zeros: float) -> None:
    """And slabs of several rows, in segments that do not have as many."""
    for rows, columns, rows_per_segment in ((11, 333, 4), (90, 300, 70), (3, 40_001, 2)):
        matrix = encode_matrix(
            random_levels(rows, columns, zeros),
            bf16(np.random.default_rng(0).standard_normal((rows, 2))),
            dictionary=dictionary(zeros, 12),
            rows_per_segment=rows_per_segment,
        )
        x = random_x(2, columns)
        assert kernels_of(matrix, x, dense) == {"dot_rounded" if dense else "dot_sparse"}
        check(matrix, x, rounded_product(matrix, x, dense, threads=2))


@pytest.mark.parametrize("width", [8, 12, 14, 15, 16])
@pytest.mark.skipif(not DEPOSITS, reason="this processor has no fast BMI2")
def test_every_width_of_codewords(width: int) -> None:
    matrix = encode_matrix(
        random_levels(20, 999, 0.5), bf16(np.ones((20, 1))), dictionary=dictionary(0.5, width)
    )
    x = random_x(1, 999)
    assert kernels_of(matrix, x, True) == {"dot_rounded"}
    check(matrix, x, rounded_product(matrix, x, True))


@pytest.mark.parametrize("dense", KERNELS)
def test_signs_that_are_missing(dense: bool) -> None:
    matrix, x = cut_short(np.ones((1, 4000), np.int8)), np.ones((2, 4000), np.float32)
    assert kernels_of(matrix, x, dense) == {"dot_rounded" if dense else "dot_sparse"}
    with pytest.raises(QMoEError, match="ends before"):
        rounded_product(matrix, x, dense)


@pytest.mark.parametrize("dense", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad: float, dense: bool) -> None:
    x = random_x(2, 600)
    x[1, 301] = bad
    y = rounded_product(encoded(np.ones((9, 600), np.int8), columns=False), x, dense)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def test_several_matrices_at_once() -> None:
    matrices = [encoded(random_levels(37, 300 + i, 0.8, i, most=1 + i % 2), i) for i in range(4)]
    x = [random_x(1 + i % 2, matrix.columns, i) for i, matrix in enumerate(matrices)]
    y = np.zeros((2, 4 * 40), np.float32)
    outs = [y[: len(each), 40 * i : 40 * i + 37] for i, each in enumerate(x)]
    multiply_rounded([*zip(matrices, x, outs, strict=True)], 2)
    for matrix, each, out in zip(matrices, x, outs, strict=True):
        check(matrix, each, out)
    assert not y[:, 37::40].any()
    multiply_rounded([])


def test_what_cannot_be_rounded() -> None:
    wide = encode_matrix(np.zeros((1, 70000), np.int8), bf16(np.ones((1, 1))))
    matrix = encoded(random_levels(4, 64, 0.5))
    out: npt.NDArray[Any] = np.zeros((1, 4), np.float32)
    for product in (
        (wide, np.zeros((1, 70000), np.float32), out[:, :1]),
        (matrix, np.zeros((1, 63), np.float32), out),
        (matrix, np.zeros((1, 64)), out),
        (matrix, np.zeros((1, 64), np.float32), out[:, :3]),
    ):
        with pytest.raises(QMoEError) as error:
            multiply_rounded([product])  # type: ignore[list-item]
        assert error.value.code == "argument"
