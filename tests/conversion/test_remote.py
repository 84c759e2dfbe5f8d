"""Conversions from and to URLs give the bytes that they give here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
pytest.importorskip("fsspec", reason="needs the extra 'remote'")
import fsspec

import qmoe_format
from qmoe_format.conversion import Calibration, convert
from qmoe_format.conversion.report import report_path
from qmoe_format.conversion.work import Work
from qmoe_format.remote import RemotePath
from tests.conftest import Run, copy_elsewhere
from tests.refusals import refusal

Convert = Callable[..., Path]
OPTIONS: dict[str, Any] = {"samples": 4, "bits_per_weight": 1.6}


def read(url: str) -> bytes:
    return RemotePath(url).read_bytes()


@pytest.mark.parametrize("shard_bytes", [None, 3000])
def test_without_text(model: Path, elsewhere: str, tmp_path: Path, shard_bytes: int | None) -> None:
    source = copy_elsewhere(model, f"{elsewhere}/model")
    here = convert(model, tmp_path / "m.qmoe", shard_bytes=shard_bytes)
    there = convert(source, f"{elsewhere}/out/m.qmoe", shard_bytes=shard_bytes)
    assert str(there) == f"{elsewhere}/out/m.qmoe"
    written = {path.name: path.read_bytes() for path in RemotePath(f"{elsewhere}/out").iterdir()}
    assert written == {path.name: path.read_bytes() for path in here.parent.iterdir()}
    from_there = convert(source, tmp_path / "n.qmoe")
    to_there = convert(model, f"{elsewhere}/n.qmoe")
    assert from_there.read_bytes() == to_there.read_bytes()


def test_with_text(
    model: Path,
    text: Path,
    converted: Convert,
    elsewhere: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped half-way; the work lies in the current folder."""
    here = converted(model, **OPTIONS)
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    source = copy_elsewhere(model, f"{elsewhere}/model")
    target = f"{elsewhere}/m.qmoe"
    calibration = Calibration(text, sequence_length=32, samples=4)

    def run(**options: Any) -> object:
        return convert(
            source, target, threads=1, calibration=calibration, bits_per_weight=1.6, **options
        )

    record = Work.record

    def stopping(self: Work, kind: str, number: int, value: object) -> None:
        record(self, kind, number, value)
        if (kind, number) == ("block", 0):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "record", stopping)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run()
    assert [path.name for path in Path().iterdir()] == [".m.qmoe.work"]
    run(resume=True)
    assert read(target) == here.read_bytes()
    assert read(f"{elsewhere}/m.quality.json") == report_path(here).read_bytes()
    assert not list(Path().iterdir())
    assert "already exists" in refusal(run, "argument")


def test_another_checkpoint_is_not_resumed(
    switch_folder: Path,
    text: Path,
    elsewhere: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights are not read to find out."""
    monkeypatch.chdir(tmp_path)
    source = copy_elsewhere(switch_folder, f"{elsewhere}/model")
    calibration = Calibration(text, sequence_length=32, samples=3)
    record = Work.record

    def stopping(self: Work, kind: str, number: int, value: object) -> None:
        record(self, kind, number, value)
        raise KeyboardInterrupt

    def run(**options: Any) -> object:
        return convert(
            source, f"{elsewhere}/m.qmoe", recipe="qmoe", calibration=calibration, **options
        )

    with monkeypatch.context() as patch:
        patch.setattr(Work, "record", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()
    weights = RemotePath(f"{source}/model.safetensors")
    weights.fs.pipe_file(weights.key, weights.read_bytes())  # the same bytes, but later
    message = refusal(lambda: run(resume=True), "argument")
    assert "file model.safetensors" in message


def test_no_request_is_larger_than_a_tensor(
    mixtral_folder: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_elsewhere(mixtral_folder, f"{elsewhere}/model")
    lengths: list[int] = []
    method = RemotePath.read

    def noting(self: RemotePath, offset: int, length: int) -> bytes:
        lengths.append(length)
        return method(self, offset, length)

    monkeypatch.setattr(RemotePath, "read", noting)
    convert(source, f"{elsewhere}/m.qmoe")
    _, header, *weights = lengths
    with qmoe_format.open(f"{elsewhere}/m.qmoe") as file:
        tensors = file.tensors.values()
        largest = max(2 * (e.elements // e.shape[0] if e.stack else e.elements) for e in tensors)
        # Those that are not experts are also checked for NaN before.
        total = 2 * sum(entry.elements * (1 if entry.stack else 2) for entry in tensors)
    assert header < 8000
    assert max(weights) <= largest
    assert sum(weights) == total


def test_refused_before_any_work(model: Path, elsewhere: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/elsewhere/m.qmoe", b"")
    assert "already exists" in refusal(lambda: convert(model, f"{elsewhere}/m.qmoe"), "argument")
    memory.pipe_file("/elsewhere/folder/file", b"")
    assert "is a folder" in refusal(lambda: convert(model, f"{elsewhere}/folder"), "argument")
    for name in ("noexp.pt", "exp00.pt", "sizes.pt", "config.json"):
        memory.pipe_file(f"/elsewhere/published/{name}", b"")
    message = refusal(lambda: convert(f"{elsewhere}/published", tmp_path / "m.qmoe"), "checkpoint")
    assert "copy the folder" in message


def test_the_warning_names_the_url(elsewhere: str, switch_folder: Path) -> None:
    source = copy_elsewhere(switch_folder, f"{elsewhere}/model")
    fsspec.filesystem("memory").rm("/elsewhere/model/tokenizer.json")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(source, f"{elsewhere}/m.qmoe")
    assert f"{source}: there is no tokenizer" in str(caught[-1].message)


def test_commands(elsewhere: str, switch_folder: Path, qmoe: Run, tmp_path: Path) -> None:
    source = copy_elsewhere(switch_folder, f"{elsewhere}/model")
    target = f"{elsewhere}/m.qmoe"
    done = qmoe("convert", source, target)
    assert done.code == 0, done.err
    assert f"{target}: written" in done.out
    for command in ("inspect", "verify"):
        done = qmoe(command, target)
        assert done.code == 0, done.err
    assert f"{target}: good" in done.out
    done = qmoe("generate", target, "one two", "--max-new-tokens", "3")
    assert done.code == 0, done.err
    for option in ((), ("--compressed",)):
        folder = tmp_path / f"unpacked{len(option)}"
        assert qmoe("unpack", target, folder, *option).code == 0
        assert (folder / "config.json").is_file()
    done = qmoe("unpack", target, f"{elsewhere}/unpacked")
    assert done.err.startswith("error[argument]")
    done = qmoe("convert", source, f"{elsewhere}/n.qmoe", "--calibration", f"{elsewhere}/t.jsonl")
    assert "text is read here only" in done.err
    done = qmoe("inspect", f"{elsewhere}/none.qmoe")
    assert done.err.startswith("error[not-found]")
    done = qmoe("inspect", f"file://{tmp_path}/unpacked1/experts.qmoe")
    assert done.code == 0, done.err
