"""Runs of gap codes: the transcoder, on the shim, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from qmoe_format import gpu
from qmoe_format.codec import decode, dequantize, encode_matrix
from qmoe_format.dtypes import from_float32
from tests.gpu import run_reference, shim
from tests.gpu.fake_cupy import FakeCupy
from tests.gpu.problems import DictKind, Shape, matrix, random_levels, vectors

pytestmark = shim.needs_compiler


@pytest.mark.parametrize(
    ("rows", "columns", "zeros", "ones"),
    [
        *[(5, 300, 0.885, 0.0), (1, 1, 0.0, 0.0), (40, 70, 1.0, 0.0), (3, 700, 0.99, 0.0)],
        *[(9, 257, 0.6, 0.3), (2, 1100, 0.3, 0.6), (1, 5000, 0.95, 0.1), (33, 2100, 0.5, 0.0)],
    ],
)
def test_transcoding(cupy: FakeCupy, rows: int, columns: int, zeros: float, ones: float) -> None:
    rng = np.random.default_rng(rows)
    members = [
        encode_matrix(
            random_levels(rows, columns, share, rng, ones),
            rng.integers(0, 1 << 14, (rows, 2), np.uint16),
            rng.integers(0, 1 << 14, columns, np.uint16),
        )
        for share in (zeros, zeros, 1.0)
    ]
    found = gpu.upload(members).packed.runs
    assert found is not None
    levels = np.stack([decode(member.levels) for member in members])
    expected = run_reference.runs(levels, found.layout)
    assert list(found.arrays) == list(expected.arrays)
    for name, array in expected.arrays.items():
        assert np.array_equal(found.arrays[name], array), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scales", [1, 2])
@pytest.mark.parametrize("columns", [1, 70, 1000, 2049, 5000])
def test_products(cupy: FakeCupy, dtype: str, scales: int, columns: int) -> None:
    kind = DictKind(((0.6, 12), (0.7, 12)), scales, columns % 2 == 0, dtype, 1, False, False)
    shape = Shape(13, columns, 0.7, None, 0, exact=True)
    members = [matrix(kind, shape, seed) for seed in range(3)]
    stack = gpu.upload(members)
    x = vectors(kind, shape, 2)
    given_x = cupy.asarray(from_float32(x, {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]))
    experts = np.array([[2, 0], [1, 2]], np.int32)
    y = gpu.expert_matvec(
        stack, given_x, cupy.asarray(experts), out=cupy.empty((2, 2, 13), np.float32)
    )
    dense = np.stack([dequantize(member) for member in members])
    assert np.array_equal(y, np.einsum("tc,tkrc->tkr", x, dense[experts]))
    y = gpu.matvec(stack[1], given_x[1], out=cupy.empty(13, np.float32))
    assert np.array_equal(y, dense[1] @ x[1])
    assert all("Path" in launch.kernel.source for launch in cupy.launched[-2:])
