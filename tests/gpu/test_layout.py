"""A packed stack, byte by byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import (
    Dictionary,
    EncodedMatrix,
    GroupedMatrix,
    dequantize,
    encode_matrix,
    fit_dictionary,
    pack_groups,
)
from qmoe_format.codec.kernels.tables import tables
from qmoe_format.errors import QMoEError
from qmoe_format.gpu import int_dict_packing, int_group_packing, packing
from qmoe_format.gpu.int_dict_packing import DictLayout, Tables
from qmoe_format.gpu.layout import ALIGNMENT
from tests.gpu.problems import dictionary, random_levels


def matrix(
    rows: int = 5,
    columns: int = 300,
    zeros: float = 0.885,
    seed: int = 0,
    *,
    ones: float = 0.0,
    scales: int = 2,
    columns_too: bool = False,
    **options: Any,
) -> EncodedMatrix:
    """A random matrix with random scales; refined if ``ones`` is not 0."""
    rng = np.random.default_rng(seed)
    return encode_matrix(
        random_levels(rows, columns, zeros, rng, ones),
        rng.integers(0, 1 << 14, (rows, scales), np.uint16),
        rng.integers(0, 1 << 14, columns, np.uint16) if columns_too else None,
        **options,
    )


def grouped(
    group_size: int = 0, rows: int = 5, columns: int = 300, seed: int = 0, **options: Any
) -> GroupedMatrix:
    """Random codes of 2 bits with random scales."""
    rng = np.random.default_rng(seed)
    shape = (rows, -(-columns // group_size) if group_size else 1)
    zero_points = rng.integers(0, 4, shape, np.uint8) if options.pop("points", False) else None
    codes, scales = rng.integers(0, 4, (rows, columns), np.uint8), rng.integers(0, 9, shape)
    return pack_groups(
        codes,
        scales.astype(np.uint16),
        **{"bits": 2, **options},
        group_size=group_size,
        zero_points=zero_points,
    )


@pytest.mark.parametrize("refined", [False, True])
def test_arrays_of_a_stack(refined: bool) -> None:
    """The second of three experts is refined."""
    members = [
        matrix(seed=seed, columns_too=True, ones=0.3 * (refined and seed == 1)) for seed in range(3)
    ]
    stack = packing.pack(members)
    layout, arrays = stack.layout, stack.arrays
    assert isinstance(layout, DictLayout)
    assert (layout.experts, layout.rows, layout.columns, layout.scales) == (3, 5, 300, 2)
    assert arrays["bases"].shape == (3, 1 + refined)
    used = 0
    for e, member in enumerate(members):
        strings = [member.levels.mask, member.levels.refinement][: 1 + refined]
        for s, bits in enumerate(strings):
            base = int(arrays["bases"][e, s])
            assert base % 16 == 0
            if bits is None:
                assert not arrays["offsets"][e, s].any()
                continue
            here = arrays["segments"][base : base + bits.segment_bytes]
            assert np.array_equal(here, bits.segments[: bits.segment_bytes])
            assert np.array_equal(arrays["offsets"][e, s], bits.offsets())
            used += bits.segment_bytes
        assert np.array_equal(arrays["row_scale"][e], member.row_scale)
        assert member.column_scale is not None
        assert np.array_equal(arrays["column_scale"][e], member.column_scale)
    assert np.count_nonzero(arrays["segments"]) <= used
    assert not arrays["segments"][: int_dict_packing.GUARD].any()
    assert not arrays["segments"][-int_dict_packing.GUARD :].any()


def test_arrays_of_a_stack_in_groups() -> None:
    """The sizes of groups differ."""
    members = [grouped(size, seed=size, points=True) for size in (32, 0, 128)]
    stack = packing.pack(members)
    arrays = stack.arrays
    assert arrays["runs_shift"].tolist() == [0, int_group_packing.ROW_SHIFT, 2]
    assert arrays["bases"].tolist() == [0, 50, 55]
    assert arrays["codes"].size == 3 * 5 * 80 + int_group_packing.GUARD
    assert np.array_equal(arrays["codes"][400:800], members[1].packed.reshape(-1))
    for e, (begin, end) in enumerate(((0, 50), (50, 55), (55, 70))):
        assert np.array_equal(arrays["scales"][begin:end], members[e].scales.reshape(-1))
        points = members[e].zero_points
        assert points is not None
        assert np.array_equal(arrays["zero_points"][begin:end], points.reshape(-1))


@pytest.mark.parametrize("member", [matrix(columns_too=True, ones=0.5), grouped(32, points=True)])
def test_arrays_do_not_overlap_and_are_aligned(member: packing.Matrix) -> None:
    layout, end = packing.layout([member]), 0
    for offset, dtype, shape in layout.places.values():
        assert offset >= end
        assert offset % ALIGNMENT == 0
        end = offset + int(np.prod(shape)) * dtype.itemsize
    assert end <= layout.bytes


def test_a_dictionary_is_stored_once() -> None:
    """Where each table begins, in KiB; first those of the masks."""
    often, seldom = fit_dictionary(0.9, 8, max_ones=3), fit_dictionary(0.7, 8)
    members = [
        matrix(
            seed=i, dictionary=d, ones=0.3 * (i > 0), refinement_dictionary=seldom if i else None
        )
        for i, d in enumerate((often, seldom, often))
    ]
    stack = packing.pack(members)
    layout, size = stack.layout, 256 * 8 // 1024
    assert isinstance(layout, DictLayout)
    assert (layout.mask, layout.refinement) == (Tables(8, "BYTE_POSITIONS", 4),) * 2
    assert stack.arrays["table_of"].tolist() == [[0, 2 * size], [size, 2 * size], [0, 2 * size]]
    assert len(stack.arrays["tables"]) == 3 * size
    first, second, third = stack.arrays["tables"].reshape(3, -1)
    assert np.array_equal(second, third)
    assert not np.array_equal(first, second)


def unpacked(dictionary: Dictionary) -> tuple[Tables, list[tuple[int, list[int]]]]:
    """Length and positions of every entry, read back from the table as in entry.cu."""
    stack = packing.pack([matrix(2, 3, 0.5, dictionary=dictionary)])
    assert isinstance(stack.layout, DictLayout)
    form, entries = stack.layout.mask, []
    for words in stack.arrays["tables"].reshape(1 << form.width, -1):
        about = int(words[0])
        data = words.view(np.uint8)
        if form.entry == "ONE_WORD":
            length, ones, positions = about >> 24 & 63, about >> 30, data[:3]
        else:
            length, ones, positions = about & 0xFF, about >> 16, data[4:]
            if form.entry == "NIBBLES":
                positions = np.concatenate([positions[:4] & 15, positions[:4] >> 4])
        entries.append((length, positions[:ones].tolist()))
    return form, entries


def expected(dictionary: Dictionary) -> list[tuple[int, list[int]]]:
    table = tables(dictionary)
    lanes: npt.NDArray[np.uint16] = table.positions.view(np.uint16)
    return [
        (int(steps & np.uint64(0xFF)), found[:ones].tolist())
        for steps, ones, found in zip(table.steps, table.ones, lanes, strict=True)
    ]


@settings(deadline=None)
@given(
    st.builds(dictionary, st.sampled_from([0.3, 0.6, 0.885, 0.97]), st.sampled_from([8, 9, 11, 12]))
)
def test_entries(dictionary: Dictionary) -> None:
    assert unpacked(dictionary)[1] == expected(dictionary)


@pytest.mark.parametrize(
    ("form", "words", "made_of"),
    [
        ("ONE_WORD", 1, fit_dictionary(0.885, 12, max_ones=3)),
        ("NIBBLES", 2, dictionary(0.6, 12)),
        ("BYTE_POSITIONS", 2, dictionary(0.97, 12)),  # its entries are long
        ("BYTE_POSITIONS", 4, dictionary(0.8, 12)),
        ("BYTE_POSITIONS", 8, fit_dictionary(0.01, 9, max_ones=16)),
    ],
)
def test_forms_of_entries(form: str, words: int, made_of: Dictionary) -> None:
    found, entries = unpacked(made_of)
    assert (found.entry, found.entry_bytes) == (form, 4 * words)
    assert entries == expected(made_of)


def test_mean_number_of_codewords() -> None:
    layout = packing.layout([matrix(64, 2048, ones=0.3)])
    assert isinstance(layout, DictLayout)
    mean_length = 22.6  # weights per codeword of 12 bits, at 88.5 % zeros
    assert layout.mean_codewords == pytest.approx(2 * 2048 / mean_length, rel=0.03)


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("encoding", grouped()),
        ("shape", matrix(columns=301, ones=0.3)),
        ("rows per segment", matrix(ones=0.3, rows_per_segment=2)),
        ("number of scales per row", matrix(scales=1)),
        ("presence of column scales", matrix(columns_too=True)),
    ],
)
def test_members_that_differ_are_refused(what: str, other: packing.Matrix) -> None:
    with pytest.raises(QMoEError, match=f"matrix 2: {what} is .*, of matrix 0") as error:
        packing.pack([matrix(), matrix(ones=0.3), other])
    assert error.value.code == "argument"


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("encoding", matrix()),
        ("shape", grouped(rows=4)),
        ("number of bits", grouped(bits=3)),
        ("grid", grouped(grid="log")),
        ("presence of zero points", grouped(points=True)),
    ],
)
def test_members_in_groups_that_differ_are_refused(what: str, other: packing.Matrix) -> None:
    with pytest.raises(QMoEError, match=f"matrix 2: {what} is .*, of matrix 0") as error:
        packing.pack([grouped(), grouped(32), other])
    assert error.value.code == "argument"


def test_codewords_of_another_width_are_encoded_anew() -> None:
    members = [
        matrix(dictionary=dictionary(0.9, 9)),
        matrix(ones=0.3, refinement_dictionary=dictionary(0.7, 10)),
        matrix(seed=1, ones=0.3, dictionary=dictionary(0.8, 9)),
    ]
    packed = packing.alike(members)
    assert packed[0] is members[0]
    for before, after, mask in zip(members[1:], packed[1:], (0.9, 0.9), strict=True):
        assert isinstance(after, EncodedMatrix)
        assert after.levels.refinement
        assert after.dictionary == dictionary(mask, 9)
        assert after.levels.refinement.dictionary == dictionary(0.7, 10)
        assert np.array_equal(dequantize(after), dequantize(before))


def test_no_matrix_is_refused() -> None:
    with pytest.raises(QMoEError, match="no matrix"):
        packing.pack([])


def zeros(rows: int, columns: int) -> EncodedMatrix:
    """In one segment."""
    return encode_matrix(
        np.zeros((rows, columns), np.int8),
        np.ones((rows, 1), np.uint16),
        dictionary=fit_dictionary(0.99, 12),
        rows_per_segment=rows,
    )


def test_a_segment_that_is_too_large_is_refused() -> None:
    packing.layout([zeros(2, 1 << 25)])
    with pytest.raises(QMoEError, match="fewer rows per segment") as error:
        packing.layout([zeros(3, 1 << 25)])
    assert error.value.code == "limit"


def test_a_row_that_is_too_long_is_refused() -> None:
    columns = (1 << 26) + 1
    row = grouped(rows=1, columns=8)
    long = np.zeros((1, -(-columns // 64) * 16), np.uint8)
    with pytest.raises(QMoEError, match="too long for the kernels") as error:
        packing.layout([replace(row, columns=columns, packed=long)])
    assert error.value.code == "limit"
