"""Round to nearest against a formula written out in numpy, one weight at a time."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from qmoe_format.errors import QMoEError

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch

from qmoe_format.quantize.rtn import BLOCK_ELEMENTS, round_to_nearest

DTYPES = ["bfloat16", "float16", "float32", "float64"]


def to_bf16(value: float) -> float:
    """Nearest bfloat16, ties to even, by rational arithmetic on the bits of a binary32."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    kept, rest = bits >> 16, bits & 0xFFFF
    kept += rest > 0x8000 or (rest == 0x8000 and kept & 1)
    return float(struct.unpack("<f", struct.pack("<I", kept << 16))[0])


def expected(row: list[float]) -> tuple[list[int], float, float]:
    low, high = to_bf16(min([*row, 0.0])), to_bf16(max([*row, 0.0]))
    levels = []
    for w in row:
        if high > 0 and w > high / 2:
            levels.append(1)
        elif low < 0 and w < low / 2:
            levels.append(-1)
        else:
            levels.append(0)
    return levels, low, high


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 33), (2, 5, 1), (1, 1, 1), (2, 0, 4), (0, 3, 4)])
def test_is_the_formula(dtype: str, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weights = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    result = round_to_nearest(weights)
    assert result.levels.dtype == torch.int8
    assert result.levels.shape == shape
    assert result.row_scale.dtype == torch.bfloat16
    assert result.row_scale.shape == (*shape[:2], 2)
    assert result.column_scale is None
    for e in range(shape[0]):
        for r in range(shape[1]):
            levels, low, high = expected(weights[e, r].tolist())
            assert result.levels[e, r].tolist() == levels
            assert result.row_scale[e, r].tolist() == [low, high]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_goes_to_the_nearest_stored_value(dtype: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn((1, 50, 400), generator=generator).to(getattr(torch, dtype))
    result = round_to_nearest(weights)
    w = weights[0].double().numpy()[..., None]
    low, high = result.row_scale[0].double().numpy().T
    values = np.stack([low, 0 * low, high], axis=-1)[:, None, :]
    distances = np.abs(w - values)
    chosen = np.take_along_axis(distances, result.levels[0].numpy()[..., None].astype(int) + 1, 2)
    np.testing.assert_array_equal(chosen[..., 0], distances.min(2))


def test_a_tie_goes_to_zero() -> None:
    weights = torch.tensor([[[4.0, 2.0, -2.0, -1.0, 2.015625, -1.0078125]]])
    assert round_to_nearest(weights).levels.tolist() == [[[1, 0, -1, 0, 1, -1]]]


def test_rows_without_one_sign_and_zero_rows() -> None:
    weights = torch.tensor([[[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0], [0.0, -0.0, 0.0], [-0.0] * 3]])
    result = round_to_nearest(weights)
    assert result.levels.tolist() == [[[0, 1, 1], [0, -1, -1], [0, 0, 0], [0, 0, 0]]]
    assert result.row_scale[0].tolist() == [[0, 3], [-3, 0], [0, 0], [0, 0]]
    bits = result.row_scale.view(torch.int16)
    assert not ((result.row_scale == 0) & (bits != 0)).any(), "a stored zero is +0"


def test_no_level_has_a_scale_that_bfloat16_rounds_to_zero() -> None:
    weights = torch.tensor([[[1e-41, -1e-44, 0.0], [1e-39, 1e-45, -3e-45]]])
    result = round_to_nearest(weights)
    values = result.row_scale.float()
    assert not result.levels[0, 0].any()
    assert result.levels[0, 1].tolist() == [1, 0, 0]
    assert values[0, 1, 1] > 0


def test_blocks_and_batches_change_nothing() -> None:
    weights = torch.randn((2, 600, 1000), generator=torch.Generator().manual_seed(2))
    assert weights[0].numel() > 2 * BLOCK_ELEMENTS
    whole = round_to_nearest(weights)
    for expert, row in [(0, 0), (0, 599), (1, 261), (1, 262), (1, 263), (1, 400)]:
        one = round_to_nearest(weights[expert, row][None, None])
        assert torch.equal(one.levels[0, 0], whole.levels[expert, row])
        assert torch.equal(one.row_scale[0, 0], whole.row_scale[expert, row])


def test_a_view_that_is_not_contiguous() -> None:
    weights = torch.randn((2, 8, 5), generator=torch.Generator().manual_seed(3))
    transposed = weights.transpose(1, 2)
    assert torch.equal(
        round_to_nearest(transposed).levels, round_to_nearest(transposed.clone()).levels
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_refused_by_place(bad: float, dtype: str) -> None:
    weights = torch.ones((3, 4, 5), dtype=getattr(torch, dtype))
    weights[2, 1, 3] = bad
    with pytest.raises(
        QMoEError, match=r"expert 2, row 1, column 3: the weight is -?(nan|inf)"
    ) as e:
        round_to_nearest(weights)
    assert e.value.code == "value"


@pytest.mark.parametrize("value", [3.4e38, -1e300])
def test_weights_beyond_the_scale_are_refused(value: float) -> None:
    weights = torch.tensor([[[1.0], [value]]], dtype=torch.float64)
    with pytest.raises(QMoEError, match=r"row 1.*beyond") as caught:
        round_to_nearest(weights)
    assert caught.value.code == "value"
