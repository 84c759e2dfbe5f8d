"""What is written is what is read, for every element type, shape and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import qmoe_format
from qmoe_format.codec import EncodedMatrix, dequantize, encode_matrix
from qmoe_format.dtypes import STORAGE, from_float32
from tests.container.files import assemble, matrix, read_all, sample, take_apart

NAMES = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='"\\'), min_size=1
)
SLOW = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def bits(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> tuple[npt.NDArray[Any], str, str]:
    dtype = draw(st.sampled_from(sorted(STORAGE)))
    shape = draw(st_numpy.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=4))
    array = draw(st_numpy.arrays(STORAGE[dtype], shape))
    return array, dtype, draw(st.sampled_from(["raw", "zstd"]))


@SLOW
@given(
    st.dictionaries(NAMES, tensors(), max_size=5),
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True), st.binary()
    ),
)
def test_tensors_and_attachments(
    tmp_path: Path,
    given_tensors: dict[str, tuple[npt.NDArray[Any], str, str]],
    attachments: dict[str, bytes],
) -> None:
    path = tmp_path / "file.qmoe"
    with qmoe_format.Writer(path) as writer:
        for name, (array, dtype, encoding) in given_tensors.items():
            writer.add_tensor(name, array, dtype, encoding)
        for name, data in attachments.items():
            writer.add_attachment(name, data)
    with qmoe_format.open(path) as file:
        file.verify()
        assert list(file.tensors) == sorted(given_tensors)
        assert list(file.attachments) == sorted(attachments)
        for name, (array, dtype, _) in given_tensors.items():
            found = file.read(name)
            assert found.shape == array.shape
            assert found.dtype == STORAGE[dtype]
            assert bits(found) == bits(array)
            assert file.tensors[name].dtype == dtype
        for name, data in attachments.items():
            assert file.attachment(name) == data


@SLOW
@given(st.integers(0, 3), tensors())
def test_a_stack_of_arrays(
    tmp_path: Path, experts: int, what: tuple[npt.NDArray[Any], str, str]
) -> None:
    array, dtype, encoding = what
    array = array.reshape(array.shape[:7]) if array.ndim < 8 else array[..., :1].reshape(-1)
    path = tmp_path / "file.qmoe"
    items = [np.roll(array, expert) for expert in range(experts)]
    with qmoe_format.Writer(path) as writer:
        writer.add_tensor("before", np.zeros(3, np.uint8), "U8")
        with writer.add_stack("s", (experts, *array.shape), dtype, encoding, "e{}") as stack:
            for item in items:
                stack.append(item)
        writer.add_tensor("after", np.zeros(3, np.uint8), "U8")
    with qmoe_format.open(path) as file:
        file.verify()
        entry = file.tensors["s"]
        assert (entry.stack, entry.members, entry.shape) == (True, "e{}", (experts, *array.shape))
        assert entry.extent_count == experts
        for expert, item in enumerate(items):
            assert bits(file.read_expert("s", expert)) == bits(item)


@SLOW
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 600),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    values=st.sampled_from([1, 2]),
    columns_scaled=st.booleans(),
    most=st.sampled_from([1, 2, 5, 127]),
    rows_per_segment=st.sampled_from([None, 1, 3, 100]),
    width=st.sampled_from([8, 12]),
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    seed=st.integers(0, 99),
)
def test_matrices(tmp_path: Path, dtype: str, **options: Any) -> None:
    value = matrix(**options)
    path = tmp_path / "file.qmoe"
    with qmoe_format.Writer(path) as writer:
        writer.add_tensor("w", value, dtype, "int-dict")
        with writer.add_stack("s", (2, value.rows, value.columns), dtype, "int-dict") as stack:
            stack.append(value)
            stack.append(value)
    with qmoe_format.open(path) as file:
        file.verify()
        used = {each.dictionary for each in value.levels.strings}
        assert set(file.dictionaries) == used
        for found in (file.encoded("w"), file.encoded("s", 1)):
            assert_same(found, value)
        expected = from_float32(dequantize(value), dtype)
        assert bits(file.read("w")) == bits(expected)
        assert bits(file.read_expert("s", 0)) == bits(expected)
        assert file.tensors["s"].parameters["symmetric"] == (options["values"] == 1)


def test_values(tmp_path: Path) -> None:
    levels = np.array([[0, 3, -1], [1, 0, 0]], np.int8)
    row = from_float32(np.array([[-1.5, 2.25], [0.125, 3.0]], np.float32), "BF16")
    column = from_float32(np.array([1.0, 0.5, 4.0], np.float32), "BF16")
    path = tmp_path / "file.qmoe"
    with qmoe_format.Writer(path) as writer:
        writer.add_tensor("w", encode_matrix(levels, row, column), "F32", "int-dict")
    with qmoe_format.open(path) as file:
        assert file.read("w").tolist() == [[0.0, 3.375, -6.0], [3.0, 0.0, 0.0]]


def assert_same(found: EncodedMatrix, value: EncodedMatrix) -> None:
    assert bits(found.row_scale) == bits(value.row_scale)
    assert found.row_scale.shape == value.row_scale.shape
    assert (found.column_scale is None) == (value.column_scale is None)
    if found.column_scale is not None and value.column_scale is not None:
        assert bits(found.column_scale) == bits(value.column_scale)
    for a, b in zip(found.levels.strings, value.levels.strings, strict=True):
        assert a.dictionary == b.dictionary
        assert bits(a.segments[: a.segment_bytes]) == bits(b.segments[: b.segment_bytes])
        assert bits(a.lengths) == bits(b.lengths)
        assert bits(a.block_offsets) == bits(b.block_offsets)
        assert a.ones == b.ones


def test_arrays_of_the_file_are_read_only_and_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "sample.qmoe"
    path.write_bytes(sample())
    with qmoe_format.open(path) as file:
        norm = file.read("norm")
        encoded = file.encoded("moe.experts.wi", 1)
    assert norm.tolist() == [0, 1, 2, 3, 4, 5]
    mask, refinement = encoded.levels.strings
    assert mask.segments.sum() > 0
    for array in (norm, encoded.row_scale, mask.segments, refinement.segments):
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_a_file_without_anything(tmp_path: Path) -> None:
    path = tmp_path / "empty.qmoe"
    with qmoe_format.Writer(path):
        pass
    with qmoe_format.open(path) as file:
        file.verify()
        assert not file.tensors
        assert not file.attachments
        assert len(file.dictionaries) == 0
        assert file.version == (0, 2)
        assert file.generator.startswith("qmoe-format ")


def test_the_writer_writes_what_the_specification_says() -> None:
    """``assemble`` is another author's writer: it makes the same bytes."""
    data = sample()
    assert assemble(*take_apart(data)) == data
    assert read_all(data)["norm"].tolist() == [0, 1, 2, 3, 4, 5]  # type: ignore[union-attr]


def test_a_copy_of_the_stored_form_is_the_same_file(tmp_path: Path) -> None:
    """Whatever the encoding, what ``encoded`` returns can be written again."""
    path, copy = tmp_path / "sample.qmoe", tmp_path / "copy.qmoe"
    path.write_bytes(sample())
    with qmoe_format.open(path) as file, qmoe_format.Writer(copy) as writer:
        for name in file.attachments:
            writer.add_attachment(name, file.attachment(name))
        for name in ("moe.experts.wi", "norm", "router", "bias"):  # in the order of the sample
            entry = file.tensors[name]
            if not entry.stack:
                writer.add_tensor(name, file.encoded(name), entry.dtype, entry.encoding)
                continue
            with writer.add_stack(
                name, entry.shape, entry.dtype, entry.encoding, entry.members,
                transposed=entry.transposed, **entry.parameters,
            ) as stack:  # fmt: skip
                for expert in range(stack.experts):
                    stack.append(file.encoded(name, expert))
    assert copy.read_bytes() == sample()


def test_a_file_that_is_read_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "sample.qmoe"
    path.write_bytes(sample())
    with qmoe_format.open(path, memory_map=False) as file:
        file.verify()
        assert file.read("norm").tolist() == [0, 1, 2, 3, 4, 5]
        assert file.attachment("vocab.txt") == b"xyz"


def test_asking_for_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "sample.qmoe"
    path.write_bytes(sample())
    file = qmoe_format.open(path)
    for code, call in (
        ("not-found", lambda: file.read("nothing")),
        ("not-found", lambda: file.attachment("nothing")),
        ("not-found", lambda: file.read_expert("moe.experts.wi", 2)),
        ("not-found", lambda: file.read_expert("moe.experts.wi", -1)),
        ("argument", lambda: file.read("moe.experts.wi")),
        ("argument", lambda: file.read_expert("norm", 0)),
        ("argument", lambda: file.encoded("norm", 0)),
        ("argument", lambda: file.encoded("moe.experts.wi")),
        ("not-found", lambda: qmoe_format.open(tmp_path / "nothing.qmoe")),
        ("not-found", lambda: qmoe_format.open(path / "below")),
        ("io", lambda: qmoe_format.open(tmp_path)),
    ):
        with pytest.raises(qmoe_format.QMoEError) as caught:
            call()
        assert caught.value.code == code
    file.close()
    with pytest.raises(qmoe_format.QMoEError) as caught:
        file.read("norm")
    assert caught.value.code == "argument"
