"""A conversion that is stopped, at whatever moment, goes on to the same bytes."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

import qmoe_format
from qmoe_format.atomic_file import PartialFile
from qmoe_format.conversion.report import report_path
from qmoe_format.conversion.work import Work, hash_file
from tests.refusals import refusal

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
from tests.tiny_models import save_model

Convert = Callable[..., Path]
OPTIONS: dict[str, Any] = {"samples": 8, "bits_per_weight": 1.6}


@pytest.fixture(scope="module")
def wanted() -> dict[Path, tuple[bytes, bytes]]:
    """File and report of an undisturbed conversion, by model."""
    return {}


@pytest.fixture
def undisturbed(
    wanted: dict[Path, tuple[bytes, bytes]], model: Path, converted: Convert
) -> tuple[bytes, bytes]:
    if model not in wanted:
        file = converted(model, "undisturbed.qmoe", **OPTIONS)
        wanted[model] = file.read_bytes(), report_path(file).read_bytes()
    return wanted[model]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("model", "when"), [("switch", "before"), ("mixtral", "after")], indirect=["model"]
)
def test_stopped_at_each_record(
    model: Path,
    converted: Convert,
    undisturbed: tuple[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    when: str,
) -> None:
    """Each attempt does one block, and perhaps the next but for its record."""
    record = Work.record
    left = 0

    def stopping(self: Work, kind: str, number: int, value: object) -> None:
        nonlocal left
        if when == "before" and not left:
            raise Stopped
        record(self, kind, number, value)
        left -= 1
        if when == "after" and not left:
            raise Stopped

    monkeypatch.setattr(Work, "record", stopping)
    attempts = 0
    while not (tmp_path / "m.qmoe").exists():
        left = 1
        try:
            converted(model, resume=attempts > 0, **OPTIONS)
        except Stopped:
            attempts += 1
        assert attempts < 20, "no attempt gets further than the one before"
    assert attempts >= 3
    file = tmp_path / "m.qmoe"
    assert (file.read_bytes(), report_path(file).read_bytes()) == undisturbed
    assert not (tmp_path / ".m.qmoe.work").exists()


def test_stopped_before_anything_is_done(
    switch_folder: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopping(self: Work, kind: str, number: int, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Work, "record", stopping)
    with pytest.raises(KeyboardInterrupt) as caught:
        converted(switch_folder, recipe="qmoe", samples=3)
    assert "--resume" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_calibrated_leaves_nothing(
    converted: Convert, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """That is found in the second block of this one, whose tokens go to two experts each."""
    folder = tmp_path_factory.mktemp("llama4")
    save_model(folder, "llama4_text", num_experts_per_tok=2)
    said = refusal(lambda: converted(folder, samples=3, sequence_length=16), "checkpoint")
    assert "cannot be calibrated" in said
    assert "--resume" not in said
    assert not list(tmp_path.iterdir())


def test_stopped_while_garbage_is_collected(
    mixtral_folder: Path, text: Path, tmp_path: Path, qmoe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python swallows what is raised in a ``__del__``, but the conversion stops all the same."""

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopping(self: Work, kind: str, number: int, value: object) -> None:
        record(self, kind, number, value)
        if not number:
            Garbage()
            gc.collect()
            sleep(60)

    record = Work.record
    command = ("convert", mixtral_folder, tmp_path / "m.qmoe", "--calibration", text)
    options = ("--samples", "3", "--recipe", "qmoe", "--threads", "1", "--sequence-length", "32")
    with monkeypatch.context() as patch:
        patch.setattr(Work, "record", stopping)
        before = monotonic()
        with pytest.raises(SystemExit) as caught:
            qmoe(*command, *options)
    assert caught.value.code == 128 + signal.SIGTERM
    assert monotonic() - before < 50
    assert (tmp_path / ".m.qmoe.work" / "block-0000.json").exists()
    assert not (tmp_path / ".m.qmoe.work" / "block-0001.json").exists()
    assert qmoe(*command, *options, "--resume").code == 0


def killed(call: Callable[[], object], publications: int) -> bool:
    """Run ``call`` in a child that kills itself instead of so many plus one renames; whether it
    did."""
    child = os.fork()
    if not child:
        publish = PartialFile.publish
        left = publications

        def counted(self: PartialFile, target: Path | None = None) -> None:
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            publish(self, target)

        PartialFile.publish = counted  # type: ignore[method-assign]
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_killed_again_and_again(
    model: Path, converted: Convert, undisturbed: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """Each time some renames later; those of a block that is begun again are for nothing."""
    target = tmp_path / "m.qmoe"
    steps = [0, 1, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 60]
    for attempt, step in enumerate(steps):
        resume = attempt > 0
        assert not target.exists()
        if not killed(lambda: converted(model, resume=resume, **OPTIONS), step):  # noqa: B023
            break
        assert (tmp_path / ".m.qmoe.work").is_dir()
    assert target.exists()
    assert attempt >= 5
    assert (target.read_bytes(), report_path(target).read_bytes()) == undisturbed
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if "undisturbed" not in name} == {"m.qmoe", "m.quality.json"}


def test_stopped_between_report_and_file(
    switch_folder: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish = PartialFile.publish

    def stopping(self: PartialFile, target: Path | None = None) -> None:
        publish(self, target)
        if self.target.name == "m.quality.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "publish", stopping)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            converted(switch_folder, recipe="qmoe", samples=3)
    assert not (tmp_path / "m.qmoe").exists()
    file = converted(switch_folder, recipe="qmoe", samples=3, resume=True)
    assert json.loads(report_path(file).read_text())["settings"]["samples"] == 3


@pytest.fixture
def stop(converted: Convert, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``stop("block", model, **options)``: a conversion that is stopped after its first record of
    that kind."""
    record = Work.record

    def run(kind: str, model: Path, **options: Any) -> None:
        def stopping(self: Work, done: str, number: int, value: object) -> None:
            record(self, done, number, value)
            if done == kind:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Work, "record", stopping)
            with pytest.raises(KeyboardInterrupt, match="continue with --resume"):
                converted(model, **options)

    return run


@pytest.fixture
def stopped(model: Path, stop: Callable[..., None]) -> Path:
    """A conversion with one block done; returns the model."""
    stop("block", model, recipe="qmoe", samples=8)
    return model


@pytest.mark.parametrize("model", ["switch"], indirect=True)
def test_another_conversion_is_refused(
    stopped: Path,
    converted: Convert,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / ".m.qmoe.work"
    before = sorted(work.iterdir())
    options: dict[str, Any] = {"recipe": "qmoe", "samples": 8, "resume": True}

    def different(source: Path = stopped, **changes: Any) -> str:
        return refusal(lambda: converted(source, **(options | changes)), "argument")

    other_text = tmp_path / "other.jsonl"
    other_text.write_text(text.read_text() + '\n{"text": "w1 w2"}\n')
    for changed in (
        {"samples": 9},
        {"seed": 1},
        {"sequence_length": 20},
        {"token_cap": 3.0},
        {"mask_special_tokens": True},
        {"all_experts": True},
        {"shard_bytes": 20_000},
    ):
        ((name, value),) = changed.items()
        said = different(**changed)
        assert f"different in {name} (" in said
        assert f" {json.dumps(value)} now)" in said
    assert "profile" in different(profile="size")
    assert "threads" in different(threads=2)
    assert "different in recipe" in different(recipe="rd")
    assert "text_sha256 (" in different(text=other_text)
    lines = [json.loads(line) for line in text.read_text().splitlines()]
    other_text.write_text("\n".join(json.dumps(line | {"b": line["text"]}) for line in lines))
    assert "text_column (" in different(text=other_text, text_column="b")
    assert "target_column (" in different(text=other_text, target_column="b")
    with monkeypatch.context() as patch:
        patch.setattr("qmoe_format.conversion.calibrated.describe_code", lambda: "another")
        assert "code of qmoe-format (" in different()
    other = tmp_path / "model"
    shutil.copytree(stopped, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"another": 1}))
    assert "file config.json" in different(other)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "file model.safetensors" in different(other)
    refused = refusal(lambda: converted(stopped, recipe="qmoe", samples=8), "argument")
    assert "--resume" in refused
    assert "--force" in refused
    assert sorted(work.iterdir()) == before
    converted(stopped, recipe="qmoe", samples=8, resume=True)
    assert not work.exists()


def test_another_lambda_is_refused(
    switch_folder: Path, converted: Convert, stop: Callable[..., None]
) -> None:
    stop("block", switch_folder, samples=4, rate_lambda=0.1)
    said = refusal(
        lambda: converted(switch_folder, samples=4, rate_lambda=0.2, resume=True), "argument"
    )
    assert "different in lambda (0.1 then, 0.2 now)" in said


def test_another_size(switch_folder: Path, converted: Convert, stop: Callable[..., None]) -> None:
    """Until a block is quantized; then it is the one that counts."""

    def refused(bits: float) -> str:
        options: dict[str, Any] = {"samples": 4, "bits_per_weight": bits, "resume": True}
        return refusal(lambda: converted(switch_folder, **options), "argument")

    stop("survey", switch_folder, samples=4, bits_per_weight=1.6)
    stop("block", switch_folder, samples=4, bits_per_weight=1.7, resume=True)
    assert "different in bits_per_weight (1.7 then, 1.6 now)" in refused(1.6)
    file = converted(switch_folder, samples=4, bits_per_weight=1.7, resume=True)
    assert json.loads(report_path(file).read_text())["settings"]["bits_per_weight"] == 1.7


def test_large_files_are_told_apart_by_pieces_and_time(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def digest(data: bytes, time: int = 0) -> str:
        path.write_bytes(data)
        os.utime(path, ns=(0, time))
        return hash_file(path, whole=1 << 10, pieces=4)

    zeros = bytes(5000)
    first = digest(zeros)
    assert first == digest(zeros)
    for data, time in (
        (zeros, 1),
        (zeros + b"\0", 0),
        (b"\1" + zeros[1:], 0),
        (zeros[:1600] + b"\1" + zeros[1601:], 0),
        (zeros[1:] + b"\1", 0),
    ):
        assert digest(data, time) != first


def test_a_record_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays."""

    def full(self: PartialFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Work(tmp_path / "m.qmoe", {}, resume=False, overwrite=False) as work:
        work.record("block", 0, {"a": 1})
        monkeypatch.setattr(PartialFile, "_write_all", full)
        assert "free some space" in refusal(lambda: work.record("block", 0, {"a": 2}), "io")
        assert work.records("block") == [{"a": 1}]
        names = sorted(path.name for path in work.folder.iterdir())
    assert names == ["block-0000.json", "lock", "state.json"]


@pytest.mark.parametrize("model", ["switch"], indirect=True)
def test_killed_while_old_work_is_removed(
    stopped: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of it is taken for another conversion's."""
    remove, halves = shutil.rmtree, []

    def removing(path: Path, **options: Any) -> None:
        if path.exists():
            (path / "state.json").unlink()
            halves.append(path)
            raise Stopped
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("qmoe_format.conversion.work.shutil.rmtree", removing)
        with pytest.raises(Stopped):
            converted(stopped, recipe="qmoe", samples=5, overwrite=True)
    assert list(halves[0].glob("block-*.json"))
    said = refusal(lambda: converted(stopped, recipe="qmoe", samples=5, resume=True), "not-found")
    assert "there is no work to resume" in said
    converted(stopped, recipe="qmoe", samples=5)
    assert not [path for path in tmp_path.iterdir() if ".work" in path.name]


def test_stopped_between_shards(
    switch_folder: Path, converted: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"recipe": "qmoe", "samples": 3, "shard_bytes": 20_000}
    publish, left = PartialFile.publish, 1

    def stopping(self: PartialFile, target: Path | None = None) -> None:
        nonlocal left
        if target and "-of-" in target.name:
            if not left:
                raise KeyboardInterrupt
            left -= 1
        publish(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "publish", stopping)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            converted(switch_folder, **options)
    assert len(list(tmp_path.glob("m-*-of-*.qmoe"))) == 1
    file = converted(switch_folder, resume=True, **options)
    with qmoe_format.open(file) as opened:
        opened.verify()


@pytest.mark.parametrize("model", ["switch"], indirect=True)
def test_begun_anew(stopped: Path, converted: Convert, tmp_path: Path) -> None:
    file = converted(stopped, recipe="qmoe", samples=5, overwrite=True)
    assert json.loads(report_path(file).read_text())["settings"]["samples"] == 5
    assert not (tmp_path / ".m.qmoe.work").exists()


@pytest.mark.parametrize("model", ["switch"], indirect=True)
def test_two_at_once(stopped: Path, converted: Convert, tmp_path: Path) -> None:
    state = json.loads((tmp_path / ".m.qmoe.work" / "state.json").read_text())
    with Work(tmp_path / "m.qmoe", state, resume=True, overwrite=False) as work:
        for options in ({"resume": True}, {"overwrite": True}):
            said = refusal(
                lambda: converted(stopped, recipe="qmoe", samples=8, **options),  # noqa: B023
                "argument",
            )
            assert "another process" in said
        assert work.records("block")


@pytest.mark.parametrize("model", ["switch"], indirect=True)
def test_what_a_killed_process_left(stopped: Path, converted: Convert, tmp_path: Path) -> None:
    """Its half-written files go; those of other destinations stay."""
    own = [tmp_path / f".{name}.0123abcd.partial" for name in ("m.qmoe", "m.quality.json")]
    others = [tmp_path / f".{name}.0123abcd.partial" for name in ("m", "m.qmoe.json", "mm.qmoe")]
    for path in (*own, *others):
        path.write_bytes(b"half")
    converted(stopped, recipe="qmoe", samples=8, resume=True)
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)


def test_a_folder_that_its_owner_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waited for the lock of it does not take it for its own."""
    fcntl = pytest.importorskip("fcntl")
    target, lock = tmp_path / "m.qmoe", fcntl.flock

    def slow(file: int, how: int) -> None:
        shutil.rmtree(tmp_path / ".m.qmoe.work")
        lock(file, how)

    with Work(target, {}, resume=False, overwrite=False) as work:
        work.record("block", 0, {})
        work._release()
        monkeypatch.setattr("qmoe_format.conversion.work.fcntl.flock", slow)
        said = refusal(lambda: Work(target, {}, resume=True, overwrite=False), "argument")
        assert "another process" in said


def test_nothing_to_resume(switch_folder: Path, converted: Convert, tmp_path: Path) -> None:
    said = refusal(lambda: converted(switch_folder, recipe="qmoe", resume=True), "not-found")
    assert "leave out --resume" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["switch"], indirect=True)
def test_a_damaged_state(stopped: Path, converted: Convert, tmp_path: Path) -> None:
    (tmp_path / ".m.qmoe.work" / "state.json").write_text("{")
    options: dict[str, Any] = {"recipe": "qmoe", "samples": 8}
    assert "--force" in refusal(lambda: converted(stopped, resume=True, **options), "malformed")


@pytest.mark.parametrize("model", ["switch"], indirect=True)
@pytest.mark.parametrize(
    ("name", "code"), [("block-0001.json", "malformed"), ("stack-0002.qmoe", "checksum")]
)
def test_damaged_work(
    stopped: Path,
    stop: Callable[..., None],
    converted: Convert,
    tmp_path: Path,
    name: str,
    code: str,
) -> None:
    """Going on with it would only end in the same way."""
    options: dict[str, Any] = {"recipe": "qmoe", "samples": 8, "resume": True}
    stop("block", stopped, **options)
    path = tmp_path / ".m.qmoe.work" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = b"\xff" * 8
    path.write_bytes(data)
    said = refusal(lambda: converted(stopped, **options), code)
    assert said.count("begin again with --force") == 1
    assert "--resume" not in said
