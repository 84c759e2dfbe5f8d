"""The index: one test a requirement of SPEC.md section 3."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from qmoe_format.container.encodings.int_dict import IntDict
from tests.container.files import (
    assemble,
    code_at_opening,
    code_of,
    dumps,
    index_of,
    tensor,
    with_tensor,
)

EMPTY = dumps(index_of())
DICTIONARY: dict[str, Any] = {
    "bytes": 64,
    "encoding": "raw",
    "extent": 0,
    "max_length": 8,
    "max_ones": 8,
    "width": 8,
}
MATRIX: dict[str, Any] = {
    "column_scale": False,
    "dtype": "BF16",
    "encoding": "int-dict",
    "rows_per_segment": 1,
    "shape": [2, 2],
    "symmetric": False,
}


def code_of_text(text: bytes) -> str | None:
    return code_at_opening(assemble(text, []))


def code_of_tensor(**keys: Any) -> str | None:
    return code_at_opening(with_tensor(**keys))


def test_the_empty_index_is_good() -> None:
    assert code_of_text(EMPTY) is None


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"[]",
        b"12",
        b'"text"',
        b"nonsense",
        EMPTY[:-1],
        EMPTY + b"}",
        EMPTY + b" ",
        b" " + EMPTY,
        EMPTY + b"\n",
        EMPTY.replace(b":", b": ", 1),
        EMPTY.replace(b"[]", b"[ ]", 1),
        b"\xef\xbb\xbf" + EMPTY,
        EMPTY.decode().encode("utf-16"),
        EMPTY.replace(b"test", b"t\\u0065st"),
        EMPTY.replace(b"test", b"te\\/st"),
        EMPTY.replace(b"test", "tést".encode()),
        EMPTY.replace(b"test", b"te\x7fst"),
        EMPTY.replace(b"test", b"te\tst"),
        EMPTY.replace(b"test", b"te\0st"),
        EMPTY.replace(b'"test"', b"null"),
        EMPTY.replace(b'"test"', b"true"),
        EMPTY.replace(b'"test"', b"1"),
        EMPTY.replace(b'"test"', b"NaN"),
        EMPTY.replace(b'"test"', b"[]"),
        EMPTY.replace(b"tensors", b"tensor"),
        EMPTY.replace(b'"tensors":[]', b'"tensors":{}'),
        EMPTY.replace(b'"tensors":[]', b'"tensors":[],"zebra":1'),
        EMPTY.replace(b'"tensors":[]', b'"tensors":[],"tensors":[]'),
        EMPTY.replace(b'"attachments":[],', b""),
        EMPTY.replace(b'"generator":"test",', b"").replace(b"{", b'{"generator":"test",', 1),
    ],
)
def test_texts_that_are_not_canonical_or_not_an_index(text: bytes) -> None:
    """[J-1] to [J-4]"""
    assert code_of_text(text) == "malformed"


@pytest.mark.parametrize(
    "number",
    ["-1", "-0", "+1", "01", "1.0", "1e3", "1E3", "0x10", "NaN", "Infinity", "-Infinity", "null",
     str(2**53), str(2**64), "9" * 5000, "1." + "0" * 5000, "true", '"2"', "[2]", "{}"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["extent", "shape"])
def test_values_that_are_no_integers_of_the_format(number: str, key: str) -> None:
    """[J-2] [J-4]; in Python ``true`` passes for 1."""
    text = dumps(index_of(tensors=[tensor(shape=[12345], extent=0)]))
    old = b"12345" if key == "shape" else b'"extent":0'
    new = number.encode() if key == "shape" else b'"extent":' + number.encode()
    assert code_at_opening(assemble(text.replace(old, new), [b"ab"])) == "malformed"


def test_the_greatest_integer() -> None:
    assert code_of_tensor(extent=2**53 - 1) == "malformed"  # no such extent
    assert code_of_tensor(encoding="new", further=2**53 - 1) is None
    assert code_of_tensor(encoding="new", further=2**53) == "malformed"


def test_nesting() -> None:
    def nested(levels: int) -> Any:
        """Of that many arrays, in an entry that is at the third level itself."""
        return json.loads("[" * levels + "]" * levels)

    assert code_of_tensor(encoding="new", further=nested(5)) is None
    assert code_of_tensor(encoding="new", further=nested(6)) == "limit"
    for deep in (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000):
        assert code_of_text(deep) == "limit"
    brackets = "[" * 500
    assert code_of_tensor(name=brackets) is None
    assert code_of_text(b"]" * 1000) == "malformed"


@pytest.mark.parametrize("text", [b"9" * 4_000_000, b'"' * 4_000_001, b"[" + b"1," * 2_000_000])
def test_a_long_hostile_text_is_refused_quickly(text: bytes) -> None:
    began = time.process_time()
    assert code_of_text(text) == "malformed"
    assert time.process_time() - began < 5


@pytest.mark.parametrize("key", sorted(tensor()))
def test_each_key_of_a_tensor_is_needed_and_has_its_kind(key: str) -> None:
    """[J-4]"""
    record = tensor()
    value = record.pop(key)
    assert code_at_opening(assemble(index_of(tensors=[record]), [b"ab"])) == "malformed"
    wrongs: list[Any] = [1, True, "x", [], {}]
    for wrong in wrongs:
        if type(wrong) is not type(value):
            assert code_of_tensor(**{key: wrong}) == "malformed"


@pytest.mark.parametrize("encoding", ["raw", "zstd"])
def test_keys_that_a_tensor_must_not_have(encoding: str) -> None:
    assert code_of_tensor(encoding=encoding, symmetric=True) == "malformed"
    assert code_of_tensor(encoding=encoding, zzz="") == "malformed"


def test_an_unknown_encoding_or_dtype_leaves_the_file_readable() -> None:
    """[T-5]"""
    for keys in (
        {"encoding": "new"},
        {"encoding": "int-tree", "bits": 4, "nested": {"a": [1, True, "x"]}},
        {"dtype": "F4"},
        {"dtype": "F4", "encoding": "zstd"},
        {"dtype": "F4", **{key: MATRIX[key] for key in MATRIX if key != "dtype"}},
    ):
        data = with_tensor(**keys)
        assert code_at_opening(data) is None, keys
        assert code_of(data) == "unsupported", keys
    assert code_of_tensor(encoding="new", further=None) == "malformed"
    assert code_of_tensor(encoding="new", further={"a": [None]}) == "malformed"


def test_an_unknown_encoding_does_not_hide_damage_further_on() -> None:
    index = index_of(tensors=[tensor(encoding="new"), tensor(name="u", extent=1)])
    data = bytearray(assemble(index, [b"ab", b"cd"]))
    assert code_of(bytes(data)) == "unsupported"
    data[128] ^= 1
    assert code_of(bytes(data)) == "checksum"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "malformed"),
        ("a b", "malformed"),
        (" a", "malformed"),
        ("a" * 512, None),
        ("a" * 513, "malformed"),
        ("!#$%&'()*+,-./:;<=>?@[]^_`{|}~", None),
    ],
)
def test_names_of_tensors(name: str, expected: str | None) -> None:
    """[J-6]"""
    assert code_of_tensor(name=name) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], None),
        (["B", "a"], None),
        (["a", "a.b"], None),
        (["a", "a"], "duplicate"),
        (["b", "a"], "malformed"),
        (["a", "B"], "malformed"),
    ],
)
def test_order_of_names(names: list[str], expected: str | None) -> None:
    """[J-5]"""
    tensors = [tensor(name=name, extent=number) for number, name in enumerate(names)]
    assert code_at_opening(assemble(index_of(tensors=tensors), [b"ab", b"cd"])) == expected
    attachments = [
        {"bytes": 2, "encoding": "raw", "extent": number, "name": name}
        for number, name in enumerate(names)
    ]
    assert code_at_opening(assemble(index_of(attachments=attachments), [b"ab", b"cd"])) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"name": ".hidden"}, "malformed"),
        ({"name": "../up"}, "malformed"),
        ({"name": "a/b"}, "malformed"),
        ({"name": "a:b"}, "malformed"),
        ({"name": "C..d-_9"}, None),
        ({"name": "a" * 255}, None),
        ({"name": "a" * 256}, "malformed"),
        ({"bytes": 3}, "malformed"),
        ({"bytes": "2"}, "malformed"),
        ({"encoding": 1}, "malformed"),
        ({"extent": 1}, "malformed"),
        ({"further": 1}, "malformed"),
    ],
)
def test_attachments(keys: dict[str, Any], expected: str | None) -> None:
    """[J-4] [J-6] [A-1] [F-6]"""
    record = {"bytes": 2, "encoding": "raw", "extent": 0, "name": "a"} | keys
    assert code_at_opening(assemble(index_of(attachments=[record]), [b"ab"])) == expected


@pytest.mark.parametrize("encoding", ["new", "int-dict", "int-group"])
def test_an_attachment_of_an_unknown_encoding(encoding: str) -> None:
    """[T-5]; ``int-dict`` and ``int-group`` are for tensors only."""
    record = {"bytes": 64, "encoding": encoding, "extent": 0, "name": "a"}
    data = assemble(index_of(attachments=[record]), [bytes(64)])
    assert code_at_opening(data) is None
    assert code_of(data) == "unsupported"


@pytest.mark.parametrize("encoding", ["new", "int-dict", "int-group"])
def test_a_dictionary_of_an_unknown_encoding(encoding: str) -> None:
    """[T-5]"""
    data = assemble(index_of(dictionaries=[DICTIONARY | {"encoding": encoding}]), [bytes(64)])
    assert code_at_opening(data) is None
    assert code_of(data) == "unsupported"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"width": 7}, "limit"),
        ({"width": 17}, "limit"),
        ({"max_length": 0}, "limit"),
        ({"max_length": 255}, None),
        ({"max_length": 256}, "limit"),
        ({"max_ones": 16}, None),
        ({"max_ones": 17}, "limit"),
        ({"bytes": 0}, "limit"),
        ({"bytes": 2**14}, None),
        ({"bytes": 2**14 + 1}, "limit"),
        ({"encoding": "later"}, None),
        ({"extent": 1}, "malformed"),
        ({"further": 1}, "malformed"),
    ],
)
def test_dictionaries(keys: dict[str, Any], expected: str | None) -> None:
    """[D-1] [F-6]; whether the tree is so is seen when it is read."""
    record = DICTIONARY | keys
    data = assemble(index_of(dictionaries=[record]), [b"ab"])
    assert code_at_opening(data) == expected
    assert code_of(data) == expected or expected is None


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"shape": [1] * 8}, None),
        ({"shape": [1] * 9}, "limit"),
        ({"shape": [2**40]}, None),
        ({"shape": [2**40 + 1]}, "limit"),
        ({"shape": [2**40 + 1, 0]}, "limit"),
        ({"shape": [2**40, 2**12]}, None),
        ({"shape": [2**40, 2**13 - 1]}, None),
        ({"shape": [2**40, 2**13]}, "limit"),
        ({"shape": [2**40, 2**10 - 1], "dtype": "F64"}, None),
        ({"shape": [2**40, 2**10], "dtype": "F64"}, "limit"),
        ({"shape": [2**40, 2**13 - 1], "dtype": "F4"}, None),
        ({"shape": [2**40, 2**13], "dtype": "F4"}, "limit"),
        ({"shape": [2**40, 2**40, 2**40]}, "limit"),
        ({"shape": [2**40, 2**40, 0]}, "limit"),
        ({"shape": [2**40, 0]}, None),
        ({"shape": [True]}, "malformed"),
        ({"shape": [[1]]}, "malformed"),
        ({"stack": True, "shape": [1, 2]}, None),
        ({"stack": True, "shape": []}, "malformed"),
        ({"stack": True, "shape": [2, 1]}, "malformed"),
        ({"stack": True, "shape": [2**40, 1]}, "malformed"),
        ({"stack": True, "shape": [1, 2], "members": "e{}.w"}, None),
        ({"stack": True, "shape": [1, 2], "members": "e.w"}, "malformed"),
        ({"stack": True, "shape": [1, 2], "members": "{}{}"}, "malformed"),
        ({"stack": False, "members": "e{}.w"}, "malformed"),
        ({"stack": True, "shape": [1, 2, 1], "transposed": True}, None),
        ({"stack": True, "shape": [1, 2, 1], "members": "e{}.w", "transposed": True}, None),
        ({"stack": True, "shape": [1, 2], "transposed": True}, "malformed"),
        ({"stack": False, "shape": [1, 2, 1], "transposed": True}, "malformed"),
        ({"stack": True, "shape": [1, 2, 1], "transposed": 1}, "malformed"),
        ({"extent": 1}, "malformed"),
    ],
)
def test_shapes_and_stacks(keys: dict[str, Any], expected: str | None) -> None:
    """[T-1] [T-2] [T-3] [F-6] and the limits, on both sides"""
    assert code_of_tensor(**keys) == expected


def test_a_stack_without_experts_has_extent_0() -> None:
    """[T-1]"""
    for extent, expected in ((0, None), (1, "malformed")):
        record = tensor(name="s", stack=True, shape=[0, 2], extent=extent)
        assert code_of(assemble(index_of(tensors=[record]), [])) == expected
        both = index_of(tensors=[record, tensor()])
        assert code_of(assemble(both, [b"ab"])) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"dtype": "F64"}, None),
        ({"dtype": "U8"}, "malformed"),
        ({"shape": [2]}, "malformed"),
        ({"shape": [1, 2, 2]}, "malformed"),
        ({"shape": [1, 2, 2], "stack": True}, None),
        ({"shape": [1, 2], "stack": True}, "malformed"),
        ({"shape": [2**31 - 1, 1]}, None),
        ({"shape": [2**31, 1]}, "limit"),
        ({"shape": [1, 2**31 - 1]}, None),
        ({"shape": [1, 2**31]}, "limit"),
        ({"rows_per_segment": 0}, "limit"),
        ({"rows_per_segment": 2**31 - 1}, None),
        ({"rows_per_segment": 2**31}, "limit"),
        ({"width": 8}, "malformed"),
        ({"symmetric": 1}, "malformed"),
        ({"column_scale": 0}, "malformed"),
        ({"further": 0}, "malformed"),
    ],
)
def test_entries_of_matrices(keys: dict[str, Any], expected: str | None) -> None:
    """[J-4] [E-2] and the limits, on both sides"""
    assert code_of_tensor(**{**MATRIX, **keys}) == expected


@pytest.mark.parametrize("key", sorted(IntDict.defaults))
def test_entries_of_matrices_need_every_key(key: str) -> None:
    record = tensor(**{name: MATRIX[name] for name in MATRIX if name != key})
    assert code_at_opening(assemble(index_of(tensors=[record]), [b"ab"])) == "malformed"


@pytest.mark.parametrize(
    ("extents_of", "expected"),
    [
        ([0, 1, 2], None),
        ([2, 0, 1], None),
        ([0, 1, 1], "malformed"),
        ([0, 0, 2], "malformed"),
        ([0, 1, 3], "malformed"),
    ],
)
def test_each_extent_has_one_owner(extents_of: list[int], expected: str | None) -> None:
    """[F-6]"""
    attachments = [
        {"bytes": 2, "encoding": "raw", "extent": extent, "name": f"a{number}"}
        for number, extent in enumerate(extents_of)
    ]
    data = assemble(index_of(attachments=attachments), [b"ab"] * 3)
    assert code_at_opening(data) == expected


def test_an_extent_that_nobody_owns() -> None:
    assert code_at_opening(assemble(index_of(), [b"ab"])) == "malformed"
    assert code_at_opening(assemble(index_of(tensors=[tensor()]), [b"ab", b"cd"])) == "malformed"
    stack = tensor(name="s", stack=True, shape=[2, 2])
    overlap = [stack, tensor(extent=1)]
    assert code_at_opening(assemble(index_of(tensors=overlap), [b"ab", b"cd"])) == "malformed"


@pytest.mark.parametrize("what", ["tensors", "attachments", "dictionaries"])
def test_the_number_of_entries(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself is a million: here it is three."""
    monkeypatch.setattr("qmoe_format.container.limits.ENTRIES", 3)
    entry: dict[str, Any] = {
        "tensors": tensor(stack=True, shape=[0]),
        "attachments": {"bytes": 2, "encoding": "raw", "extent": 0, "name": "a"},
        "dictionaries": DICTIONARY,
    }[what]
    for count, expected in ((3, None), (4, "limit")):
        records = []
        for number in range(count):
            record = entry | ({} if what == "dictionaries" else {"name": f"n{number}"})
            records.append(record if what == "tensors" else record | {"extent": number})
        extents = [] if what == "tensors" else [b"ab"] * count
        assert code_at_opening(assemble(index_of(**{what: records}), extents)) == expected
