"""A packed stack, byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import Dictionary, EncodedMatrix, encode_matrix, fit_dictionary
from qmoe_format.codec.kernels.tables import tables
from qmoe_format.errors import QMoEError
from qmoe_format.gpu import packing
from tests.codec.strategies import dictionaries, dictionary, random_levels


def matrix(
    rows: int = 5, columns: int = 300, zeros: float = 0.885, seed: int = 0, **options: Any
) -> EncodedMatrix:
    """A random matrix with random scales."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // options["group_size"]) if options.get("group_size") else 1
    column_scale = rng.random(columns).astype(np.float16) if options.pop("columns_too", 0) else None
    return encode_matrix(
        random_levels(rows, columns, zeros, seed),
        rng.random((rows, groups, options.pop("scales", 2))).astype(np.float16),
        column_scale,
        scale_dtype="F16",
        **options,
    )


def test_arrays_of_a_stack() -> None:
    members = [matrix(seed=seed, columns_too=True) for seed in range(3)]
    stack = packing.pack(members)
    layout, arrays = stack.layout, stack.arrays
    assert (layout.experts, layout.rows, layout.columns, layout.scales) == (3, 5, 300, 2)
    for e, member in enumerate(members):
        levels = member.levels
        base = int(arrays.bases[e])
        assert base % 16 == 0
        here = arrays.segments[base : base + levels.segment_bytes]
        assert np.array_equal(here, levels.segments[: levels.segment_bytes])
        assert np.array_equal(arrays.offsets[e], levels.offsets())
        assert np.array_equal(arrays.row_scale[e], member.row_scale)
        assert member.column_scale is not None
        assert np.array_equal(arrays.column_scale[e], member.column_scale)
    used = sum(member.levels.segment_bytes for member in members)
    assert np.count_nonzero(arrays.segments) <= used
    assert not arrays.segments[: packing.GUARD].any()
    assert not arrays.segments[-packing.GUARD :].any()


def test_arrays_do_not_overlap_and_are_aligned() -> None:
    layout = packing.layout([matrix(columns_too=True, group_size=7)])
    end = 0
    for offset, dtype, shape in layout.places.values():
        assert offset >= end
        assert offset % packing.ALIGNMENT == 0
        end = offset + int(np.prod(shape)) * dtype.itemsize
    assert end <= layout.bytes


def test_a_dictionary_is_stored_once() -> None:
    often, seldom = fit_dictionary(0.9, 8), fit_dictionary(0.7, 8)
    members = [matrix(seed=i, dictionary=d) for i, d in enumerate((often, seldom, often))]
    arrays = packing.pack(members).arrays
    assert arrays.table_of.tolist() == [0, 1, 0]
    assert len(arrays.tables) == 2


def unpacked(dictionary: Dictionary) -> list[tuple[int, list[int], list[int]]]:
    """Length, positions and signs of every entry, read back from the table as in entry.cu."""
    stack = packing.pack([matrix(2, 3, 0.5, dictionary=dictionary)])
    form, entries = stack.layout.entry, []
    for words in stack.arrays.tables[0]:
        about, signs = int(words[0]), 0
        data = words.view(np.uint8)
        if form == "ONE_WORD":
            length, nonzeros, positions = about >> 24 & 63, about >> 30, data[:3]
        else:
            length, nonzeros, positions = about & 0xFF, about >> 16, data[4:]
            if dictionary.signs == "codeword":
                nonzeros, signs = about >> 8 & 0xFF, about >> 16
            if form == "NIBBLES":
                positions = np.concatenate([positions[:4] & 15, positions[:4] >> 4])
        minus = [signs >> j & 1 for j in range(nonzeros)]
        entries.append((length, positions[:nonzeros].tolist(), minus))
    return entries


def expected(dictionary: Dictionary) -> list[tuple[int, list[int], list[int]]]:
    table = tables(dictionary)
    lanes: npt.NDArray[np.uint16] = table.positions.view(np.uint16)
    return [
        (
            int(steps & np.uint64(0xFF)),
            (found[:nonzeros] & 0x7FFF).tolist(),
            (found[:nonzeros] >> 15).tolist(),
        )
        for steps, nonzeros, found in zip(table.steps, table.nonzeros, lanes, strict=True)
    ]


@settings(deadline=None)
@given(dictionaries)
def test_entries(dictionary: Dictionary) -> None:
    assert unpacked(dictionary) == expected(dictionary)


@pytest.mark.parametrize(
    ("form", "words", "made_of"),
    [
        ("ONE_WORD", 1, fit_dictionary(0.885, 12, max_nonzeros=3)),
        ("NIBBLES", 2, dictionary(0.6, 12, "plane")),
        ("BYTE_POSITIONS", 2, dictionary(0.97, 12, "plane")),  # its entries are long
        ("BYTE_POSITIONS", 2, dictionary(0.9, 9, "codeword")),
        ("BYTE_POSITIONS", 4, dictionary(0.8, 12, "plane")),
        ("BYTE_POSITIONS", 8, fit_dictionary(0.01, 9, max_nonzeros=16)),
    ],
)
def test_forms_of_entries(form: str, words: int, made_of: Dictionary) -> None:
    layout = packing.layout([matrix(2, 3, 0.5, dictionary=made_of)])
    assert (layout.entry, layout.entry_bytes) == (form, 4 * words)
    assert unpacked(made_of) == expected(made_of)


def test_mean_number_of_codewords() -> None:
    layout = packing.layout([matrix(64, 2048)])
    mean_length = 22.6  # weights per codeword of 12 bits, at 88.5 % zeros
    assert layout.mean_codewords == pytest.approx(2 * 2048 / mean_length, rel=0.03)


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("shape", {"columns": 301}),
        ("rows per segment", {"rows_per_segment": 2}),
        ("codeword width", {"width": 9}),
        ("sign mode", {"signs": "codeword"}),
        ("number of scales per row", {"scales": 1}),
        ("group size", {"group_size": 10}),
        ("presence of column scales", {"columns_too": True}),
    ],
)
def test_members_that_differ_are_refused(what: str, other: dict[str, Any]) -> None:
    with pytest.raises(QMoEError, match=f"matrix 1: {what} is ") as error:
        packing.layout([matrix(), matrix(**other)])
    assert error.value.code == "argument"


def test_no_matrix_is_refused() -> None:
    with pytest.raises(QMoEError, match="no matrix"):
        packing.layout([])


def zeros(rows: int, columns: int) -> EncodedMatrix:
    """In one segment."""
    return encode_matrix(
        np.zeros((rows, columns), np.int8),
        np.ones((rows, 1, 1), np.uint16),
        dictionary=fit_dictionary(0.99, 12),
        rows_per_segment=rows,
    )


def test_a_segment_that_is_too_large_is_refused() -> None:
    packing.layout([zeros(2, 1 << 25)])
    with pytest.raises(QMoEError, match="fewer rows per segment") as error:
        packing.layout([zeros(3, 1 << 25)])
    assert error.value.code == "limit"
