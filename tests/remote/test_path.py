"""URLs: what they name, what can be asked of them, and how their errors read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="needs the extra 'remote'")
import fsspec

from qmoe_format.remote import RemotePath, location
from tests.refusals import refusal


@pytest.fixture
def file(elsewhere: str) -> RemotePath:
    fsspec.filesystem("memory").pipe_file("/elsewhere/a/model.qmoe", bytes(range(200)))
    return RemotePath(f"{elsewhere}/a/model.qmoe")


def test_what_is_a_url() -> None:
    for text in ("model.qmoe", "/a/model.qmoe", "org/model@v2", "C:/a", "a:b", ""):
        assert location(text) == Path(text)
    assert location(Path("a")) == Path("a")
    assert location("file:///a%20b/c") == location("FILE:///a%20b/c") == Path("/a b/c")
    for url in ("memory://a/b.qmoe", "memory://a/b.qmoe/"):
        assert str(location(url)) == "memory://a/b.qmoe"
    assert location(RemotePath("memory://a")) == RemotePath("memory://a")


def test_parts(file: RemotePath) -> None:
    assert file.name == "model.qmoe"
    assert file.suffix == ".qmoe"
    assert file.with_name("b") == file.parent / "b" == RemotePath("memory://elsewhere/a/b")
    assert str(RemotePath("memory://a").parent) == "memory://"
    assert {file, RemotePath(str(file))} == {file}


def test_questions(file: RemotePath) -> None:
    folder = file.parent
    assert (file.exists(), file.is_file(), file.is_dir()) == (True, True, False)
    assert (folder.exists(), folder.is_file(), folder.is_dir()) == (True, False, True)
    nothing = file.with_name("nothing")
    assert (nothing.exists(), nothing.is_file(), nothing.is_dir()) == (False, False, False)
    assert file.size() == 200
    assert list(folder.iterdir()) == [file]
    assert list(folder.glob("*.qmoe")) == [file]
    assert [*folder.glob("x*"), *(folder / "none").iterdir(), *file.iterdir()] == []
    same = folder / "a"
    file.fs.pipe_file(same.key, b"")
    assert list(folder.iterdir()) == [same, file]
    before = file.identity()
    assert before == RemotePath(str(file)).identity()
    file.fs.pipe_file(file.key, bytes(201))
    assert file.identity() != before


def test_ranges(file: RemotePath) -> None:
    assert file.read(3, 4) == bytes([3, 4, 5, 6])
    assert file.read(200, 0) == b""
    assert file.read_ranges([(0, 1), (5, 0), (198, 2)]) == [b"\0", b"", bytes([198, 199])]
    assert file.read_ranges([]) == []
    assert file.read_bytes() == bytes(range(200))
    for offset in (198, 200, 300):
        refusal(lambda offset=offset: file.read(offset, 3), "truncated")  # type: ignore[misc]
    refusal(lambda: file.read_ranges([(0, 1), (199, 2)]), "truncated")


def test_nothing_there(elsewhere: str) -> None:
    path = RemotePath(f"{elsewhere}/none.qmoe")
    for call in (path.size, path.read_bytes, path.identity, lambda: path.read(0, 1)):
        message = refusal(call, "not-found")
        assert message == f"cannot read {path}: there is no such file; check the URL"
    RemotePath(f"{elsewhere}/folder/file").fs.pipe_file("/elsewhere/folder/file", b"")
    assert "not a file" in refusal(RemotePath(f"{elsewhere}/folder").size, "io")


def test_urls_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Protocol not known: xyz" in refusal(lambda: location("xyz://a/b"), "argument")
    assert "names no file" in refusal(lambda: location("s3://"), "argument")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "qmoe-format[remote]" in refusal(lambda: location("s3a://a/b"), "dependency")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "qmoe-format[remote]" in refusal(lambda: location("memory://a/b"), "dependency")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError("Access Denied"), "io", "Access Denied; check the permissions"),
        (FileNotFoundError("The bucket does not exist"), "not-found", "The bucket does not exist"),
        (TimeoutError(), "io", "TimeoutError; check the network"),
        (ConnectionResetError("reset\nby peer"), "io", "reset by peer; check the network"),
        (type("NoCredentialsError", (Exception,), {})("no keys"), "io", "keys in the environment"),
        (type("ParamValidationError", (Exception,), {})("bad bucket"), "argument", "check the URL"),
        (RuntimeError("whatever"), "io", "whatever"),
    ],
)
def test_errors_of_other_packages(
    file: RemotePath, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, words: str
) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise error

    for name in ("cat_file", "cat_ranges", "ls", "info"):
        monkeypatch.setattr(type(file.fs), name, broken)
    calls: list[Callable[[], object]] = [
        lambda: file.read(0, 1),
        lambda: file.read_ranges([(0, 1), (2, 1)]),
        file.read_bytes,
        file.size,
    ]
    for call in calls:
        assert words in refusal(call, code)
    if code != "not-found":
        assert words in refusal(file.exists, code)
        assert words in refusal(lambda: list(file.parent.iterdir()), code)
