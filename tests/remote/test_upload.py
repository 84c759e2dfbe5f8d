"""Files written to URLs: complete under their name, or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fsspec", reason="needs the extra 'remote'")
import fsspec

import qmoe_format
from qmoe_format import Writer
from qmoe_format.remote import RemotePath
from tests.refusals import refusal


def write(path: str | Path, shard_bytes: int | None = None, tensors: int = 6) -> list[str]:
    """A file; returns the names of its parts."""
    with Writer(path, shard_bytes) as writer:
        writer.add_attachment("a.txt", b"text" * 100)
        for number in range(tensors):
            noise = np.random.default_rng(number).integers(0, 256, 3000, np.uint8)
            writer.add_tensor(f"t{number}", noise, "U8")  # zstd begins, and raw takes its place
    return [each.name for each in writer.files]


def names(url: str) -> list[str]:
    return [path.name for path in RemotePath(url).iterdir()]


@pytest.mark.parametrize("shard_bytes", [None, 7000, 10**6])
def test_the_same_bytes_as_here(elsewhere: str, tmp_path: Path, shard_bytes: int | None) -> None:
    here = write(tmp_path / "m.qmoe", shard_bytes)
    assert write(f"{elsewhere}/m.qmoe", shard_bytes) == here
    assert names(elsewhere) == sorted(here)
    for name in here:
        assert RemotePath(f"{elsewhere}/{name}").read_bytes() == (tmp_path / name).read_bytes()
    with qmoe_format.open(f"{elsewhere}/m.qmoe") as file:
        file.verify()


def test_what_was_there_stays_until_the_end(elsewhere: str) -> None:
    write(f"{elsewhere}/m.qmoe", tensors=1)
    before = RemotePath(f"{elsewhere}/m.qmoe").read_bytes()
    writer = Writer(f"{elsewhere}/m.qmoe")
    writer.add_tensor("other", np.zeros(9), "F64")
    assert RemotePath(f"{elsewhere}/m.qmoe").read_bytes() == before
    writer.finish()
    with qmoe_format.open(f"{elsewhere}/m.qmoe") as file:
        assert list(file.tensors) == ["other"]
    assert names(elsewhere) == ["m.qmoe"]


@pytest.mark.parametrize("shard_bytes", [None, 7000])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(
    elsewhere: str, kind: type[BaseException], shard_bytes: int | None
) -> None:
    def stopped() -> None:
        with Writer(f"{elsewhere}/m.qmoe", shard_bytes) as writer:
            for number in range(5):
                writer.add_tensor(f"t{number}", np.arange(500 * number, dtype=np.float64), "F64")
            raise kind

    with pytest.raises(kind):
        stopped()
    assert names(elsewhere) == []


@pytest.mark.parametrize("method", ["put_file", "mv"])
def test_a_failure_leaves_what_was_there(
    elsewhere: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    write(f"{elsewhere}/m.qmoe", tensors=1)
    before = RemotePath(f"{elsewhere}/m.qmoe").read_bytes()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def broken(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), method, broken)
    call: Callable[[], object] = lambda: write(f"{elsewhere}/m.qmoe")  # noqa: E731
    message = refusal(call, "io")
    assert f"cannot write {elsewhere}/m.qmoe: Access Denied; check the permissions" in message
    assert names(elsewhere) == ["m.qmoe"]
    assert RemotePath(f"{elsewhere}/m.qmoe").read_bytes() == before
    assert not list(tmp_path.iterdir()), "temporary files are removed"
