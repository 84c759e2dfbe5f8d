"""A checkpoint by its name on the Hub."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qmoe_format.hub import local_checkpoint
from tests.hub_server import TOKEN, Hub
from tests.refusals import refusal

SMALL = {
    "config.json": b"{}",
    "tokenizer.model": b"t",
    "additional_chat_templates/tool_use.jinja": b"a",
    "chat_template.jinja": b"c",
    "LICENSE": b"l",
}
OTHER = {
    "README.md": b"r",
    ".gitattributes": b"g",
    ".hidden.json": b"h",
    "trainer_state.json": b"t",
    "train.txt": b"t",
    "configuration/config.json": b"c",
    "modeling_org.py": b"raise SystemExit",
    "model.gguf": b"g",
    "consolidated.safetensors": b"c",
    "consolidated.safetensors.index.json": b"{}",
    "consolidated.00.pth": b"p",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"o",
    "picture.png": b"p",
}
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
SHARDS = {
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-1.safetensors": b"1" * 1000,
    "model-2.safetensors": b"2" * 2000,
}
MODEL = SMALL | SHARDS
BINARY = {"pytorch_model.bin": b"b"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def constants(hub: Hub) -> Any:
    from huggingface_hub import constants

    return constants


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        (SHARDS, BINARY | {"model-3.safetensors": b"3"}),
        ({"model.safetensors": b"m"}, SHARDS),
        (BINARY, {"tf_model.h5": b"h", "model.fp16.safetensors": b"f"}),
    ],
)
def test_only_what_is_needed_is_downloaded(
    hub: Hub, weights: dict[str, bytes], others: dict[str, bytes]
) -> None:
    hub.add("org/model", SMALL | OTHER | others | weights)
    folder = local_checkpoint("org/model")
    assert names(folder) == {*SMALL, *weights}
    assert all((folder / name).read_bytes() == data for name, data in (SMALL | weights).items())


def test_code_is_downloaded_if_it_is_asked_for(hub: Hub) -> None:
    hub.add("org/model", MODEL | OTHER)
    assert names(local_checkpoint("org/model", code=True)) == {*MODEL, "modeling_org.py"}


def test_what_is_in_the_cache_is_not_downloaded_again(hub: Hub) -> None:
    hub.add("org/model", MODEL)
    folder = local_checkpoint("org/model")
    assert sorted(hub.fetched) == sorted((name, 0) for name in MODEL)
    hub.fetched.clear()
    assert local_checkpoint("org/model") == folder
    assert hub.fetched == []
    assert local_checkpoint(folder) == folder, "links into the cache are as good as files"


@pytest.mark.parametrize("revision", ["v2", "refs/pr/3", None])
def test_a_revision(hub: Hub, revision: str | None) -> None:
    hub.add("org/model", MODEL)
    commit = hub.add("org/model", MODEL | {"config.json": b"{2}"}, revision or "other")
    folder = local_checkpoint(f"org/model@{revision or commit}")
    assert (folder / "config.json").read_bytes() == b"{2}"
    assert (local_checkpoint("org/model") / "config.json").read_bytes() == b"{}"


def test_a_new_commit_is_noticed(hub: Hub) -> None:
    hub.add("org/model", MODEL)
    local_checkpoint("org/model")
    hub.fetched.clear()
    hub.add("org/model", MODEL | {"config.json": b"{2}"})
    assert (local_checkpoint("org/model") / "config.json").read_bytes() == b"{2}"
    assert hub.fetched == [("config.json", 0)]


def test_a_commit_during_a_download(hub: Hub) -> None:
    hub.add("org/model", MODEL)

    def push(done: int, total: int, stage: str = "", /) -> None:
        if stage == "model-1.safetensors":
            hub.add("org/model", MODEL | {"model-2.safetensors": b"new"})

    folder = local_checkpoint("org/model", push)
    assert (folder / "model-2.safetensors").read_bytes() == MODEL["model-2.safetensors"]
    assert hub.fetched.count(("model-2.safetensors", 0)) == 1


def test_a_dropped_connection_is_resumed(
    hub: Hub, constants: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.add("org/model", MODEL)
    hub.cut["model-2.safetensors"] = 700
    calls: list[tuple[int, int, str]] = []
    folder = local_checkpoint(
        "org/model", lambda done, total, stage="": calls.append((done, total, stage))
    )
    assert (folder / "model-2.safetensors").read_bytes() == MODEL["model-2.safetensors"]
    assert hub.fetched[-2:] == [("model-2.safetensors", 0), ("model-2.safetensors", 700)]

    small = sum(len(data) for name, data in MODEL.items() if not name.endswith("safetensors"))
    assert [total for _, total, _ in calls] == sorted([total for _, total, _ in calls])
    assert {total for _, total, _ in calls} == {small, 3000}
    done = [(done, stage) for done, total, stage in calls if total == 3000]
    assert done == sorted(done)
    assert done[0] == (0, "model-1.safetensors")
    assert (1700, "model-2.safetensors") in done
    assert done[-1] == (3000, "model-2.safetensors")


def test_finished_files_survive_a_failure(hub: Hub) -> None:
    hub.add("org/model", MODEL)
    hub.broken.add("model-2.safetensors")
    assert "finished files are kept" in refusal(lambda: local_checkpoint("org/model"), "io")
    hub.broken.clear()
    hub.fetched.clear()
    totals = set()
    local_checkpoint("org/model", lambda done, total, stage="": totals.add(total))
    assert hub.fetched == [("model-2.safetensors", 0)]
    assert totals == {2000}


def test_an_interrupt_ends_a_download_at_once(hub: Hub) -> None:
    hub.add("org/model", MODEL)

    def interrupt(done: int, total: int, stage: str = "", /) -> None:
        if stage == "model-1.safetensors" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_checkpoint("org/model", interrupt)
    assert hub.fetched[-1] == ("model-1.safetensors", 0)


def test_nothing_is_printed(
    hub: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # bars even where no terminal is
    hub.add("org/model", MODEL)
    local_checkpoint("org/model")
    assert capfd.readouterr() == ("", "")


def test_without_the_hub(hub: Hub, constants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/model", MODEL)
    folder = local_checkpoint("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_checkpoint("org/model") == local_checkpoint(f"org/model@{commit}") == folder
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: local_checkpoint("org/other"), "io")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert local_checkpoint("org/model") == folder
    (folder / "model-2.safetensors").unlink()
    message = refusal(lambda: local_checkpoint("org/model"), "io")
    assert "the download from http://127.0.0.1:1 failed" in message
    assert "the cache has no model-2.safetensors; check the network" in message


def test_a_link_whose_target_is_gone(
    hub: Hub, constants: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", MODEL)
    folder = local_checkpoint("org/model")
    for name in ("tokenizer.model", "model-1.safetensors"):
        (folder / name).resolve().unlink()
        message = refusal(lambda: local_checkpoint(folder), "checkpoint")
        assert message.startswith(f"{folder / name}: a link to ../../blobs/")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refusal(lambda: local_checkpoint("org/model"), "io")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert local_checkpoint("org/model") == folder
        assert (folder / name).read_bytes() == MODEL[name]


def test_a_hub_that_does_not_answer(
    hub: Hub, constants: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.silent = True
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    message = refusal(lambda: local_checkpoint("org/model"), "io")
    assert "(timed out); check the network" in message


def test_a_private_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    hub.private.add("org/model")
    message = refusal(lambda: local_checkpoint("org/model"), "not-found")
    assert "no such model" in message
    assert "for a private model run `hf auth login` or set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the access token" in refusal(
        lambda: local_checkpoint("org/model"), "io"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names(local_checkpoint("org/model")) == {*MODEL}


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("org/no", "not-found", "org/no: no such file or folder, and no such model at http://127."),
        ("a--b/c", "not-found", "no such model"),
        ("org/model@v9", "not-found", "org/model@v9: there is no revision 'v9'; choose one of"),
        ("org/gated", "io", "org/gated: access is restricted; ask for it at http://127.0.0.1:"),
        ("org/empty", "checkpoint", "org/empty: the repository has no config.json"),
        ("org/gguf", "checkpoint", "org/gguf: the repository has no weights (model.safetensors, "),
        ("org/cut", "checkpoint", "org/cut: the repository has no model-2.safetensors"),
        ("x/y/z/w", "not-found", "x/y/z/w: no such folder"),
        ("x", "not-found", "x: no such folder"),
        ("./org/model", "not-found", "no such folder; give"),
        ("./model", "not-found", "no such folder; give"),
        ("../model", "not-found", "no such folder; give"),
        ("/org/model", "not-found", "no such folder; give"),
        ("org/model/", "not-found", "no such folder; give"),
        ("org/model/m.qmoe", "not-found", "no such folder; give"),
    ],
)
def test_refusals(hub: Hub, source: str, code: str, words: str) -> None:
    hub.add("org/model", MODEL)
    hub.add("org/gated", MODEL)
    hub.gated.add("org/gated")
    hub.add("org/empty", SHARDS)
    hub.add("org/gguf", SMALL | OTHER)
    hub.add("org/cut", {name: MODEL[name] for name in MODEL if name != "model-2.safetensors"})
    assert words in refusal(lambda: local_checkpoint(source), code)


def test_an_index_that_lists_no_files(hub: Hub) -> None:
    """``open_checkpoint`` says what is wrong with it."""
    for index in (b"not JSON", b"[]", b"{}", b'{"weight_map": {"a": {}}}', b"[" * 10**5):
        hub.add("org/model", SMALL | {"pytorch_model.bin.index.json": index})
        if b"weight_map" not in index:
            assert "pytorch_model.bin.index.json" in names(local_checkpoint("org/model"))
        else:
            assert "the repository has no {}" in refusal(
                lambda: local_checkpoint("org/model"), "checkpoint"
            )


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hub.add("org/model", MODEL)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = refusal(lambda: local_checkpoint("org/model"), "io")
    assert "No space left on device; free some space" in message


def test_a_folder_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_checkpoint("org/model") == Path("org/model")
    assert hub.fetched == []


@pytest.mark.parametrize("name", ["model-2.safetensors", "tokenizer.json"])
def test_a_clone_without_git_lfs(tmp_path: Path, name: str) -> None:
    for file, data in MODEL.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "unused.safetensors").write_bytes(pointer)
    assert local_checkpoint(tmp_path) == tmp_path
    (tmp_path / name).write_bytes(pointer)
    message = refusal(lambda: local_checkpoint(tmp_path), "checkpoint")
    assert message.startswith(f"{tmp_path / name}: a pointer of Git LFS")
    assert f"run `git lfs pull` in {tmp_path}" in message


def test_an_index_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")  # to read it would not end
    assert local_checkpoint(tmp_path) == tmp_path  # whatever reads it says what is wrong


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal(lambda: local_checkpoint("org/model"), "dependency")
    assert message.startswith("org/model: no such file or folder; to ask the Hub: ")
    assert "huggingface_hub" in message
    assert "qmoe-format[convert]" in message
