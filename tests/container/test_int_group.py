"""Encoding ``int-group`` in a file: its layout, and one test a requirement of SPEC.md section 8."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format import QMoEError, QMoEFile, Writer
from qmoe_format.codec import (
    GroupedMatrix,
    dequantize,
    matmul,
    pack_groups,
    unpack_groups,
)
from qmoe_format.container.inspection import describe
from qmoe_format.dtypes import from_float32
from qmoe_format.errors import FORMAT_CODES
from tests.container.files import (
    assemble,
    code_at_opening,
    code_of,
    index_of,
    opened,
    padded,
    take_apart,
    tensor,
)
from tests.refusals import refusal

KINDS = [
    *[(bits, "linear", z) for bits in (2, 3, 4, 8) for z in (False, True)],
    *[(bits, "log", False) for bits in (2, 3, 4, 8)],
]
HEADER = 16
# The sections of the matrix that ``grouped(5, 70, 3, "linear", True, 32)`` is.
SCALES, ZERO_POINTS, ROWS, END = 16, 48, 64, 224


def grouped(
    rows: int = 5,
    columns: int = 70,
    bits: int = 3,
    grid: str = "linear",
    zero_points: bool = True,
    group_size: int = 32,
    seed: int = 0,
) -> GroupedMatrix:
    rng = np.random.default_rng(seed)
    groups = -(-columns // group_size) if group_size else 1
    return pack_groups(
        rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8),
        rng.integers(0x3C00, 0x3E00, (rows, groups)).astype(np.uint16),
        bits,
        grid=grid,
        group_size=group_size,
        zero_points=(
            rng.integers(0, 2**bits, (rows, groups)).astype(np.uint8) if zero_points else None
        ),
    )


def extent_of(matrix: GroupedMatrix) -> bytes:
    """From SPEC.md, with nothing of the package's idea of the layout."""
    columns = matrix.columns
    extent = padded(struct.pack("<I", matrix.group_size), 16)
    extent = padded(extent + matrix.scales.astype("<u2").tobytes(), 16)
    if matrix.zero_points is not None:
        extent = padded(extent + matrix.zero_points.tobytes(), 16)
    for row in unpack_groups(matrix).tolist():
        number = sum(u << c * matrix.bits for c, u in enumerate(row))
        extent += padded(number.to_bytes(-(-columns * matrix.bits // 8), "little"), 16)
    return extent


def entry(matrix: GroupedMatrix, **keys: Any) -> dict[str, Any]:
    return tensor(
        **{
            "bits": matrix.bits,
            "dtype": "F32",
            "encoding": "int-group",
            "grid": matrix.grid,
            "shape": list(matrix.shape),
            "zero_points": matrix.zero_points is not None,
        }
        | keys
    )


def file_of(extent: bytes, matrix: GroupedMatrix, **keys: Any) -> bytes:
    return assemble(index_of(tensors=[entry(matrix, **keys)]), [extent])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [0, 32, 128])
def test_a_file_is_what_the_specification_says(
    tmp_path: Path, kind: tuple[int, str, bool], group_size: int
) -> None:
    bits, grid, zero_points = kind
    for rows, columns in ((5, 70), (1, 1), (3, 128), (0, 40), (4, 0)):
        matrix = grouped(rows, columns, bits, grid, zero_points, group_size)
        path = tmp_path / "file.qmoe"
        with Writer(path) as writer:
            writer.add_tensor("t", matrix, "F32", "int-group")
        index, extents = take_apart(path.read_bytes())
        assert index["tensors"] == [entry(matrix)]
        assert extents == [extent_of(matrix)]
        assert code_of(path.read_bytes()) is None
        with QMoEFile(path) as file:
            assert file.read("t").tobytes() == dequantize(matrix).tobytes()
            assert np.array_equal(unpack_groups(file.encoded("t")), unpack_groups(matrix))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_elements_are_rounded_to_their_type(dtype: str) -> None:
    """[V-3]"""
    matrix = grouped(columns=300, bits=8, group_size=64)
    with opened(file_of(extent_of(matrix), matrix, dtype=dtype)) as file:
        found = file.read("t")
    assert found.tobytes() == from_float32(dequantize(matrix), dtype).tobytes()


def test_experts_differ_in_group_size_and_are_views(tmp_path: Path) -> None:
    sizes = (0, 128, 64, 32)
    matrices = [grouped(group_size=size, seed=size) for size in sizes]
    path = tmp_path / "stack.qmoe"
    with (
        Writer(path) as writer,
        writer.add_stack(
            "e", (4, 5, 70), "BF16", "int-group", "e.{}", bits=3, zero_points=True
        ) as stack,
    ):
        for matrix in matrices:
            stack.append(matrix)
    copied = tmp_path / "copy.qmoe"
    with (
        QMoEFile(path) as file,
        Writer(copied) as writer,
        writer.add_stack(
            "e", (4, 5, 70), "BF16", "int-group", "e.{}", bits=3, zero_points=True
        ) as stack,
    ):
        for expert, size in enumerate(sizes):
            matrix = file.encoded("e", expert)
            assert matrix.group_size == size
            for array in (matrix.scales, matrix.zero_points, matrix.packed):
                assert not array.flags.owndata
                assert not array.flags.writeable
            stack.append(matrix)
        report = describe(file)
    assert copied.read_bytes() == path.read_bytes()
    assert report["tensors"][0]["payload_bits_per_weight"] == 8 * 5 * 32 / (5 * 70)
    assert report["tensors"][0]["bytes"] == sum(len(extent_of(each)) for each in matrices)


def put(extent: bytes, at: int, *values: int) -> bytes:
    changed = bytearray(extent)
    changed[at : at + len(values)] = values
    return bytes(changed)


@pytest.mark.parametrize(
    ("rule", "change", "code"),
    [
        ("G-3", lambda e: b"", "malformed"),
        ("G-3", lambda e: e[:15], "malformed"),
        ("G-3", lambda e: e[:HEADER], "malformed"),
        ("G-3", lambda e: e[:-16], "malformed"),
        ("G-3", lambda e: e[:-1], "malformed"),
        ("G-3", lambda e: e + b"\0", "malformed"),
        ("G-3", lambda e: e + bytes(16), "malformed"),
        ("G-3", lambda e: put(e, 0, 0), "malformed"),
        ("G-3", lambda e: put(e, 0, 31), "malformed"),
        ("G-3", lambda e: put(e, 0, 16), "malformed"),
        ("G-3", lambda e: put(e, 0, 0, 1), "malformed"),
        ("G-3", lambda e: put(e, 0, 255, 255, 255, 255), "malformed"),
        ("G-4", lambda e: put(e, 4, 1), "padding"),
        ("G-4", lambda e: put(e, 15, 128), "padding"),
        ("G-4", lambda e: put(e, SCALES + 30, 1), "padding"),
        ("G-4", lambda e: put(e, ZERO_POINTS + 15, 1), "padding"),
        ("G-4", lambda e: put(e, ROWS + 26, e[ROWS + 26] | 4), "padding"),
        ("G-4", lambda e: put(e, ROWS + 27, 1), "padding"),
        ("G-4", lambda e: put(e, END - 1, 128), "padding"),
        ("G-5", lambda e: put(e, SCALES, 0x80, 0x7F), "value"),
        ("G-5", lambda e: put(e, SCALES + 28, 0xC1, 0xFF), "value"),
        ("G-5", lambda e: put(e, ZERO_POINTS, 8), "malformed"),
        ("G-5", lambda e: put(e, ZERO_POINTS + 14, 255), "malformed"),
    ],
)
def test_an_extent_with_one_defect(rule: str, change: Callable[[bytes], bytes], code: str) -> None:
    matrix = grouped()
    good = extent_of(matrix)
    assert len(good) == END
    assert code_of(file_of(good, matrix)) is None
    data = file_of(change(good), matrix)
    assert code_at_opening(data) is None
    assert code_of(data) == code
    with opened(data) as file:  # reading finds what verification finds
        refusal(lambda: file.read("t"), code)
        refusal(lambda: file.encoded("t"), code)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"bits": 5}, "malformed"),
        ({"bits": 0}, "malformed"),
        ({"bits": True}, "malformed"),
        ({"bits": "3"}, "malformed"),
        ({"grid": "cubic"}, "malformed"),
        ({"grid": "log"}, "malformed"),  # it has zero points
        ({"zero_points": 1}, "malformed"),
        ({"group_size": 32}, "malformed"),
        ({"dtype": "U8"}, "malformed"),
        ({"shape": [350]}, "malformed"),
        ({"shape": [1, 5, 70]}, "malformed"),
        ({"shape": [5, 2**31]}, "limit"),
        ({"shape": [2**31, 70]}, "limit"),
    ],
)
def test_an_entry_with_one_defect(keys: dict[str, Any], code: str) -> None:
    """[G-1] [E-2] [L-1] [J-4]"""
    matrix = grouped()
    assert code_at_opening(file_of(extent_of(matrix), matrix, **keys)) == code


@pytest.mark.parametrize("key", ["bits", "grid", "zero_points"])
def test_a_missing_key(key: str) -> None:
    matrix = grouped()
    keys = entry(matrix)
    del keys[key]
    assert code_at_opening(assemble(index_of(tensors=[keys]), [extent_of(matrix)])) == "malformed"


def test_an_unknown_element_type() -> None:
    """[T-5]"""
    matrix = grouped()
    data = file_of(extent_of(matrix), matrix, dtype="F4")
    assert code_at_opening(data) is None
    assert code_of(data) == "unsupported"


@pytest.mark.parametrize("encoded", ["dictionaries", "attachments"])
def test_it_is_for_tensors_only(encoded: str) -> None:
    """[T-5]"""
    thing: dict[str, Any] = {"bytes": 16, "encoding": "int-group", "extent": 0}
    thing |= (
        {"name": "a"} if encoded == "attachments" else {"max_length": 9, "max_ones": 1, "width": 8}
    )
    data = assemble(index_of(**{encoded: [thing]}), [bytes(16)])
    assert code_at_opening(data) is None
    assert code_of(data) == "unsupported"


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(2**31 - 1, 0, 32), (0, 2**31 - 1, 0), (0, 2**31 - 1, 32)],
)
def test_matrices_of_nothing_are_as_quick(rows: int, columns: int, group_size: int) -> None:
    matrix = grouped(0, 0, 4, zero_points=False, group_size=group_size)
    header = padded(struct.pack("<I", group_size), 16)
    data = file_of(header, matrix, shape=[rows, columns])
    assert code_of(data) is None
    with opened(data) as file:
        assert file.read("t").shape == (rows, columns)


def test_sizes_that_are_not_there_are_not_allocated() -> None:
    """[N-3]"""
    matrix = grouped(zero_points=False)
    for bits in (2, 8):
        data = file_of(extent_of(matrix), matrix, bits=bits, dtype="BF16", shape=[2**21, 2**31 - 1])
        assert code_of(data) == "malformed"


def test_values_that_cannot_be_stored(tmp_path: Path) -> None:
    matrix = grouped()

    def write(value: Any, **keys: Any) -> Callable[[], None]:
        def call() -> None:
            with (
                Writer(tmp_path / "file.qmoe") as writer,
                writer.add_stack("e", (1, 5, 70), "F32", "int-group", **keys) as stack,
            ):
                stack.append(value)

        return call

    write(matrix)()
    refusal(write(matrix, bits=4), "argument")
    refusal(write(matrix, zero_points=False), "argument")
    refusal(write(grouped(6)), "argument")
    refusal(write(grouped(grid="log", zero_points=False), grid="linear"), "argument")
    refusal(write(np.zeros((5, 70), np.float32)), "argument")
    refusal(write(matrix, bits=7), "argument")


SMALL = [grouped(3, 37, bits, grid, z, 32) for bits, grid, z in KINDS]


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(SMALL), st.data())
def test_damaged_extents(matrix: GroupedMatrix, data: st.DataObject) -> None:
    """Whatever the bytes are: a coded error, or a matrix that is read, verified and multiplied."""
    extent = bytearray(extent_of(matrix))
    for _ in range(data.draw(st.integers(1, 3))):
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(extent))] * 2)))
        if data.draw(st.booleans()):
            extent[first:last] = data.draw(st.binary(max_size=20))
        elif first < len(extent):
            extent[first] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.qmoe"
        path.write_bytes(file_of(bytes(extent), matrix))
        with QMoEFile(path) as file:
            try:
                found = file.encoded("t")
            except QMoEError as error:
                assert error.code in FORMAT_CODES
                code = error.code
                refusal(file.verify, code)
                return
            file.verify()
            assert file.read("t").shape == matrix.shape
            x: npt.NDArray[np.float32] = np.ones((3, matrix.columns), np.float32)
            assert matmul(found, x).shape == (3, matrix.rows)
