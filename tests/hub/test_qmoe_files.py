"""A ``.qmoe`` file by its name on the Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qmoe_format
from qmoe_format.hub import local_qmoe_file
from tests.hub_server import Hub
from tests.refusals import refusal


def write(path: Path, shard_bytes: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with qmoe_format.Writer(path, shard_bytes) as writer:
        for name in ("a", "b"):
            writer.add_tensor(name, np.zeros(1000, np.float32), "F32", encoding="raw")
    return path


def tensors(path: Path) -> list[str]:
    with qmoe_format.open(path) as file:
        file.verify()
        return list(file.tensors)


@pytest.mark.parametrize("name", ["m.qmoe", "small/m.qmoe"])
def test_the_only_file(hub: Hub, tmp_path: Path, name: str) -> None:
    write(tmp_path / "repo" / name)
    (tmp_path / "repo" / "README.md").write_text("")
    hub.add("org/model", tmp_path / "repo")
    for source in ("org/model", f"org/model/{name}", "org/model@main", f"org/model/{name}@main"):
        assert tensors(local_qmoe_file(source)) == ["a", "b"]
    assert hub.fetched == [(name, 0)]
    assert f"give one of org/model/{name}" in refusal(
        lambda: local_qmoe_file("org/model/n.qmoe"), "not-found"
    )


@pytest.mark.parametrize("name", ["m.qmoe", "m.qmoe.json", "small/m.qmoe"])
def test_shards(hub: Hub, tmp_path: Path, name: str) -> None:
    write(tmp_path / "repo" / name, shard_bytes=5000)
    write(tmp_path / "repo" / "other" / "o.qmoe", shard_bytes=5000)
    hub.add("org/model", tmp_path / "repo")
    assert tensors(local_qmoe_file(f"org/model/{name}")) == ["a", "b"]
    assert len(hub.fetched) == 3
    hub.fetched.clear()
    local_qmoe_file(f"org/model/{name}")
    assert hub.fetched == []


def test_several_files(hub: Hub, tmp_path: Path) -> None:
    for name in ("8.qmoe", "7/7.qmoe"):
        write(tmp_path / "repo" / name, shard_bytes=5000)
    hub.add("org/model", tmp_path / "repo", "v2")
    choices = "give one of org/model/7/7.qmoe@v2, org/model/8.qmoe@v2"
    message = refusal(lambda: local_qmoe_file("org/model@v2"), "argument")
    assert message == f"org/model@v2: there are 2 .qmoe files; {choices}"
    message = refusal(lambda: local_qmoe_file("org/model/9.qmoe@v2"), "not-found")
    assert message == f"org/model/9.qmoe@v2: the repository has no 9.qmoe; {choices}"


def test_no_file(hub: Hub) -> None:
    hub.add("org/model", {"model.safetensors": b"", "config.json": b"{}"})
    message = refusal(lambda: local_qmoe_file("org/model"), "not-found")
    assert message == (
        "org/model: the repository has no .qmoe file; make one: qmoe convert org/model out.qmoe"
    )


def test_a_shard_is_missing(hub: Hub, tmp_path: Path) -> None:
    write(tmp_path / "repo" / "m.qmoe", shard_bytes=5000)
    (tmp_path / "repo" / "m-00002-of-00002.qmoe").unlink()
    hub.add("org/model", tmp_path / "repo")
    message = refusal(lambda: local_qmoe_file("org/model"), "checkpoint")
    assert "the repository has no m-00002-of-00002.qmoe" in message


def test_a_bad_list_of_shards(hub: Hub) -> None:
    hub.add("org/model", {"m.qmoe": b'{"format":"qmoe-shards",'})
    assert "m.qmoe: " in refusal(lambda: local_qmoe_file("org/model"), "malformed")


def test_what_can_only_be_a_path(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``open`` says what is wrong with it, and the Hub is not asked."""
    hub.silent = True
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    for source in ("m.qmoe", "no/m.qmoe", "x/y/z/w", "./no/no", "org/model", "org/model/no.qmoe"):
        assert local_qmoe_file(source) == Path(source)


def test_pointers(tmp_path: Path) -> None:
    path = tmp_path / "m.qmoe"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(lambda: local_qmoe_file(path), "checkpoint")
    path.unlink()
    path.symlink_to("../../blobs/0")
    assert "a link to ../../blobs/0" in refusal(lambda: local_qmoe_file(path), "checkpoint")
