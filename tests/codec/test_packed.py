"""Matrices in the fast layout, against what they were decoded from."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import EncodedMatrix, dequantize, encode_matrix, pack_groups
from qmoe_format.codec.packed import PackedMatrix, multiply_packed, pack, packable
from qmoe_format.dtypes import from_float32, to_float32
from qmoe_format.errors import QMoEError

from .strategies import levels, random_levels

Floats = npt.NDArray[np.float32]


def bf16(values: Any) -> npt.NDArray[np.uint16]:
    return from_float32(np.asarray(values, np.float32), "BF16")


def encoded(
    coded: npt.NDArray[np.int8], seed: int = 0, columns: bool = True, scales: int = 1
) -> EncodedMatrix:
    rng = np.random.default_rng(seed)
    row_scale = bf16(rng.standard_normal((len(coded), scales)))
    return encode_matrix(
        coded, row_scale, bf16(rng.standard_normal(coded.shape[1])) if columns else None
    )


def random_x(tokens: int, columns: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


def rounded(matrix: EncodedMatrix, x: Floats) -> Floats:
    """x times column scales, as products with it see it, by the letter."""
    values = x.copy()
    if matrix.column_scale is not None:
        values *= to_float32(matrix.column_scale, "BF16")
    for row in values:
        for start in range(0, len(row), 256):
            block = row[start : start + 256]
            unit = np.abs(block).max() / np.float32(127)
            block[:] = np.rint(block * (1 / unit if unit else 0)) * unit
    return values


def product(matrix: PackedMatrix, x: Floats, threads: int = 1) -> Floats:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    multiply_packed([(matrix, x, out)], threads)
    return out


def check(matrix: EncodedMatrix, x: Floats, y: Floats) -> None:
    """Within the rounding of float32 sums of the product with x as it is rounded."""
    plain = EncodedMatrix(matrix.levels, matrix.row_scale, None)
    weights, seen = (each.astype(np.float64) for each in (dequantize(plain), rounded(matrix, x)))
    # What is added to levels, up to 7, is subtracted again.
    room = np.abs(seen) @ (np.abs(weights) + 7 * np.abs(plain.low_high()).max(1)[:, None]).T
    assert (np.abs(y - seen @ weights.T) <= 1e-5 * room).all()


@given(levels(max_columns=900), st.integers(0, 5), st.booleans(), st.integers(1, 2))
@settings(deadline=None)
def test_products(coded: npt.NDArray[np.int8], tokens: int, columns: bool, scales: int) -> None:
    matrix, threads = encoded(coded, columns=columns, scales=scales), 1 + tokens % 3
    if not coded.size:
        assert not packable(matrix)
        return
    x = random_x(tokens, matrix.columns)
    packed = pack(matrix, threads)
    y = product(packed, x, threads)
    check(matrix, x, y)
    assert y.tobytes() == product(packed, x).tobytes()
    for row, one in zip(x, y, strict=True):
        assert product(packed, row[None]).tobytes() == one.tobytes()


def test_codes_are_as_small_as_pays() -> None:
    for most, bits, exceptions in ((1, 2, 0), (7, 4, 0), (127, 4, 20000)):
        coded = random_levels(512, 512, 0.5, most=most)
        packed = pack(encoded(coded))
        assert packed.bits == bits
        assert (packed.begins[-1] > exceptions) == (exceptions > 0)
        assert packed.begins[-1] == (np.abs(coded) > {2: 1, 4: 7}[bits]).sum()
    rare = random_levels(512, 512, 0.9)
    rare[::7, 3] = -100
    packed = pack(encoded(rare))
    assert (packed.bits, packed.begins[-1]) == (2, 74)
    assert packed.nbytes < 2.4 / 8 * rare.size


def test_several_matrices_at_once() -> None:
    matrices = [encoded(random_levels(37, 300 + i, 0.8, i, most=3), i) for i in range(5)]
    x = [random_x(1 + i % 2, matrix.columns, i) for i, matrix in enumerate(matrices)]
    y = np.zeros((2, 5 * 40), np.float32)
    outs = [y[: len(each), 40 * i : 40 * i + 37] for i, each in enumerate(x)]
    packed = [pack(matrix) for matrix in matrices]
    multiply_packed([*zip(packed, x, outs, strict=True)], 2)
    for matrix, each, out in zip(matrices, x, outs, strict=True):
        check(matrix, each, out)
    assert not y[:, 37::40].any()


def test_rounding_is_fine_enough() -> None:
    """The error of 8 bits is far below that of a quantizer: about a hundredth, squared 1e-4."""
    matrix = encoded(random_levels(256, 2048, 0.885))
    x = random_x(1, 2048)
    exact = x @ dequantize(matrix).T
    error = product(pack(matrix), x) - exact
    assert 1e-6 < np.square(error).mean() / np.square(exact).mean() < 2e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    packed = pack(encoded(random_levels(9, 600, 0.885)))
    x = random_x(2, 600)
    x[1, 301] = bad
    y = product(packed, x)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def test_zeros() -> None:
    assert not product(
        pack(encoded(random_levels(9, 600, 0.5))), np.zeros((2, 600), np.float32)
    ).any()


def test_what_cannot_be_packed() -> None:
    wide = encode_matrix(np.zeros((1, 70000), np.int8), bf16(np.ones((1, 1))))
    grouped = pack_groups(np.zeros((4, 64), np.uint8), bf16(np.ones((4, 2))), 4, group_size=32)
    for matrix in (wide, grouped):
        assert not packable(matrix)
        with pytest.raises(QMoEError) as error:
            pack(matrix)
        assert error.value.code == "argument"


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (np.zeros((1, 63), np.float32), np.zeros((1, 4), np.float32)),
        (np.zeros((1, 64), np.float64), np.zeros((1, 4), np.float32)),
        (np.zeros((1, 128), np.float32)[:, ::2], np.zeros((1, 4), np.float32)),
        (np.zeros((1, 64), np.float32), np.zeros((2, 4), np.float32)),
        (np.zeros((1, 64), np.float32), np.zeros((1, 8), np.float32)[:, ::2]),
    ],
)
def test_other_arrays_are_refused(x: Any, out: Any) -> None:
    with pytest.raises(QMoEError) as error:
        multiply_packed([(pack(encoded(random_levels(4, 64, 0.5))), x, out)])
    assert error.value.code == "argument"


AVX2 = "+ssse3,+avx2,+bmi2,+fma"
AVX512_WITHOUT_VNNI = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl"


@pytest.mark.parametrize("features", ["", AVX2, AVX512_WITHOUT_VNNI])
def test_other_processors(features: str, tmp_path: Path) -> None:
    """The same sums from the instructions of older processors. Matrices are packed here: what packs
    them is compiled alike for all processors."""
    from numba.core.registry import cpu_target

    own = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    if not all(each in own for each in features.split(",") if each):
        pytest.skip(f"this processor has not all of {features}")
    matrices = [
        encoded(random_levels(23, 700, 0.6, most=most), scales=1 + most % 3) for most in (1, 6, 40)
    ]
    packed = [
        {field.name: getattr(each, field.name) for field in fields(each) if field.init}
        for each in map(pack, matrices)
    ]
    file = tmp_path / "matrices.pickle"
    file.write_bytes(pickle.dumps([*zip(matrices, packed, strict=True)]))
    environment = os.environ | {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    code = """
import pickle, sys
from pathlib import Path
from qmoe_format.codec.kernels.simd import DEPOSITS
from tests.codec.test_packed import PackedMatrix, product, random_x
from tests.codec.test_rounded import rounded_product
x = random_x(2, 700)
for matrix, fields in pickle.loads(Path(sys.argv[1]).read_bytes()):
    for y in product(PackedMatrix(**fields), x), rounded_product(matrix, x, DEPOSITS):
        sys.stdout.buffer.write(y.tobytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, file], env=environment, capture_output=True, check=True
    )
    found = np.frombuffer(done.stdout, np.float32).reshape(3, 2, 2, 23)
    for matrix, both in zip(matrices, found, strict=True):
        for y in both:
            check(matrix, random_x(2, 700), y)
