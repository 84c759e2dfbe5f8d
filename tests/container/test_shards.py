"""Models in several files: one test a requirement of SPEC.md section 9."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format
from qmoe_format import QMoEError, Writer
from qmoe_format.container.shard_list import parse_shard_list
from tests.container.files import assemble, code_of, dumps, index_of, matrix, tensor


def write(path: Path, shard_bytes: int | None) -> Writer:
    with Writer(path, shard_bytes) as writer:
        writer.add_attachment("config.json", b"{}")
        for number in range(6):
            writer.add_tensor(f"t{number}", np.full(1000, number, np.uint8), "U8", "raw")
        for name in ("a", "b"):
            with writer.add_stack(name, (4, 30, 200), "BF16", "int-dict") as stack:
                for expert in range(4):
                    stack.append(matrix(30, 200, seed=expert, width=8))
    return writer


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    path = tmp_path / "model.qmoe"
    write(path, 4096)
    return path


def code_of_shards(path: Path) -> str | None:
    try:
        with qmoe_format.open(path) as file:
            file.verify()
    except QMoEError as error:
        return error.code
    return None


def test_shards_read_as_one_file(tmp_path: Path, shards: Path) -> None:
    write(tmp_path / "whole.qmoe", None)
    with qmoe_format.open(tmp_path / "whole.qmoe") as whole, qmoe_format.open(shards) as parts:
        assert len(whole.shards) == 1
        assert len(parts.shards) > 2
        assert list(parts.tensors) == list(whole.tensors)
        assert parts.attachment("config.json") == b"{}"
        assert (parts.version, parts.generator) == (whole.version, whole.generator)
        for number in range(6):
            assert np.array_equal(parts.read(f"t{number}"), whole.read(f"t{number}"))
        for name in ("a", "b"):
            for expert in range(4):
                a, b = parts.read_expert(name, expert), whole.read_expert(name, expert)
                assert np.array_equal(a, b)
                assert parts.encoded(name, expert).rows == 30
        assert len(parts.dictionaries) >= 1
        seen: list[tuple[int, int]] = []
        parts.verify(lambda done, total, stage="": seen.append((done, total)))
        total = sum(each.file_length for each in parts.shards)
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)
        assert parts.file_length == total + shards.stat().st_size
        for code, call in (
            ("not-found", lambda: parts.read("nothing")),
            ("not-found", lambda: parts.attachment("nothing")),
        ):
            with pytest.raises(QMoEError) as caught:
                call()
            assert caught.value.code == code


def test_names_and_lengths(tmp_path: Path) -> None:
    writer = write(tmp_path / "model.qmoe", 4096)
    first, *others = writer.files
    assert first == tmp_path / "model.qmoe"
    count = len(others)
    assert [each.name for each in others] == [
        f"model-{number:05}-of-{count:05}.qmoe" for number in range(1, count + 1)
    ]
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(e.name for e in writer.files)
    for each in others:
        assert code_of(each.read_bytes()) is None
        with qmoe_format.open(each) as file:
            assert isinstance(each, Path)
            assert each.stat().st_size <= 4096 or len(file.tensors) == 1


def test_the_same_input_makes_the_same_shards(tmp_path: Path) -> None:
    """[W-1]"""
    contents = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        contents.append([path.read_bytes() for path in write(folder / "m.qmoe", 4096).files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_any_size(tmp_path: Path, shard_bytes: int) -> None:
    writer = write(tmp_path / "model.qmoe", shard_bytes)
    with qmoe_format.open(tmp_path / "model.qmoe") as file:
        file.verify()
        if shard_bytes == 1:
            assert len(file.shards) == 8  # a tensor each
        if shard_bytes == 10**9:
            assert len(file.shards) == 1
            assert list(writer.files) == [tmp_path / "model.qmoe"]


def test_a_set_without_shards(tmp_path: Path) -> None:
    path = tmp_path / "none.qmoe"
    path.write_bytes(dumps({"format": "qmoe-shards", "shards": [], "version": [0, 2]}))
    with qmoe_format.open(path) as file:
        file.verify()
        assert not file.tensors
        assert file.generator == ""


def test_an_exception_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Writer(tmp_path / "model.qmoe", 1000) as writer:  # noqa: PT012
        for number in range(5):
            writer.add_tensor(f"t{number}", np.zeros(900, np.uint8), "U8", "raw")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_many_shards_do_not_need_many_open_files(tmp_path: Path) -> None:
    before = open_files()
    with Writer(tmp_path / "model.qmoe", 1) as writer:
        for number in range(50):
            writer.add_tensor(f"t{number}", np.zeros(9, np.uint8), "U8", "raw")
        if before:
            assert open_files() < before + 10


def test_a_name_that_shards_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(QMoEError) as caught:
        Writer(tmp_path / "my model.qmoe", 1000)
    assert caught.value.code == "argument"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text + b"\n", "malformed"),
        (lambda text: b" " + text, "signature"),
        (lambda text: text[:15], "signature"),
        (lambda text: text[:-1], "malformed"),
        (lambda text: text.replace(b"qmoe-shards", b"qmoe-shardz"), "signature"),
        (lambda text: text.replace(b'"version":[0,2]', b'"version":[0,1]'), "version"),
        (lambda text: text.replace(b'"version":[0,2]', b'"version":[1,2]'), "version"),
        (lambda text: text.replace(b'"version":[0,2]', b'"version":[0]'), "malformed"),
        (lambda text: text.replace(b'"version":[0,2]', b'"version":[false,2]'), "malformed"),
        (lambda text: text.replace(b'"version":[0,2]', b'"version":2'), "malformed"),
        (lambda text: text.replace(b'"version"', b'"zersion"'), "malformed"),
        (lambda text: text.replace(b'"version":[0,2]', b'"version":[0,3],"zzz":1'), "version"),
        (lambda text: text.replace(b'{"format"', b'{"format":"qmoe-shards","format"'), "malformed"),
        (lambda text: text.replace(b'"bytes":', b'"bytes":1', 1), "checksum"),
        (lambda text: text.replace(b'"preamble_crc32":', b'"preamble_crc32":1', 1), "checksum"),
        (lambda text: text.replace(b'"file":"', b'"file":"../', 1), "malformed"),
        (lambda text: text.replace(b'"file":"', b'"file":"/', 1), "malformed"),
        (lambda text: text.replace(b'"file":"', b'"file":"other-', 1), "truncated"),
        (lambda text: renamed(text, 255), "truncated"),
        (lambda text: renamed(text, 256), "malformed"),
    ],
)  # fmt: skip
def test_one_change_of_the_text_file(shards: Path, change: Any, expected: str) -> None:
    """[S-1] [S-2]"""
    shards.write_bytes(change(shards.read_bytes()))
    assert code_of_shards(shards) == expected


def renamed(text: bytes, length: int) -> bytes:
    """The first shard has a name of so many bytes, longer than some file systems allow."""
    return text.replace(b'"file":"model-00001', b'"file":"' + b"a" * (length - 14), 1)


def empty_shards(folder: Path, names: list[str]) -> Path:
    """A set of files that hold nothing; their indices are 66 bytes long."""
    data = assemble(index_of(), [])
    listed = []
    for name in names:
        (folder / name).write_bytes(data)
        crc32 = int.from_bytes(data[60:64], "little")
        listed.append({"bytes": len(data), "file": name, "preamble_crc32": crc32})
    path = folder / "set.qmoe"
    path.write_bytes(dumps({"format": "qmoe-shards", "shards": listed, "version": [0, 2]}))
    return path


def test_the_text_file_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = empty_shards(tmp_path, ["a", "b", "c"])
    length = path.stat().st_size
    for limit, most, expected in (
        ("INDEX_LENGTH", (2, length), None),
        ("INDEX_LENGTH", (2, length - 1), "limit"),
        ("ENTRIES", 3, None),
        ("ENTRIES", 2, "limit"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"qmoe_format.container.limits.{limit}", most)
            assert code_of_shards(path) == expected


def test_a_shard_that_is_named_twice(tmp_path: Path) -> None:
    """[S-3] also if nothing in it could be there twice"""
    assert code_of_shards(empty_shards(tmp_path, ["a", "a"])) == "duplicate"


def test_the_text_of_another_format() -> None:
    text = dumps({"format": "other", "shards": [], "version": [0, 2]})
    with pytest.raises(QMoEError) as caught:
        parse_shard_list(np.frombuffer(text, np.uint8))
    assert caught.value.code == "malformed"


def test_one_change_of_a_shard(shards: Path) -> None:
    """[S-2] and every byte of a shard is covered"""
    second = shards.with_name(json.loads(shards.read_bytes())["shards"][1]["file"])
    good = second.read_bytes()
    for data, expected in (
        (good[:-1], "checksum"),
        (good + b"\0", "checksum"),
        (b"", "checksum"),
        (good[:60] + bytes(4) + good[64:], "checksum"),
        (good[:8] + b"\1" + good[9:], "checksum"),
        (good[:70] + bytes([good[70] ^ 1]) + good[71:], "checksum"),
        (bytes(reversed(good)), "checksum"),
    ):
        second.write_bytes(data)
        assert code_of_shards(shards) == expected
    second.unlink()
    assert code_of_shards(shards) == "truncated"
    second.mkdir()
    assert code_of_shards(shards) == "truncated"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"name": "a"}, {"name": "b"}, None),
        ({"name": "a"}, {"name": "a"}, "duplicate"),
    ],
)
def test_names_in_two_shards(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], expected: str | None
) -> None:
    """[S-3]"""
    attachment = {"bytes": 2, "encoding": "raw", "extent": 0}
    for indices in (
        [index_of(tensors=[tensor(**keys)]) for keys in (first, second)],
        [index_of(attachments=[attachment | keys]) for keys in (first, second)],
    ):
        listed = []
        for number, index in enumerate(indices):
            data = assemble(index, [b"ab"])
            (tmp_path / f"{number}.qmoe").write_bytes(data)
            crc32 = int.from_bytes(data[60:64], "little")
            listed.append({"bytes": len(data), "file": f"{number}.qmoe", "preamble_crc32": crc32})
        top = {"format": "qmoe-shards", "shards": listed, "version": [0, 2]}
        (tmp_path / "set.qmoe").write_bytes(dumps(top))
        assert code_of_shards(tmp_path / "set.qmoe") == expected
    top["shards"] = [listed[0], listed[0]]
    (tmp_path / "set.qmoe").write_bytes(dumps(top))
    assert code_of_shards(tmp_path / "set.qmoe") == "duplicate"


def test_replacing_a_set_by_another(shards: Path) -> None:
    write(shards, 20_000)
    with qmoe_format.open(shards) as file:
        file.verify()
    write(shards, None)
    with qmoe_format.open(shards) as file:
        assert len(file.shards) == 1
