"""The same against a server of S3's interface on this machine, through s3fs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("moto.server", reason="needs moto[server], of the extra 'test'")
pytest.importorskip("s3fs", reason="needs the extra 'remote'")
import s3fs
from aiobotocore.client import AioBaseClient
from moto.server import ThreadedMotoServer

import qmoe_format
from qmoe_format import Writer
from qmoe_format.remote import RemotePath, upload
from tests.conftest import Run, copy_elsewhere
from tests.container.files import matrix
from tests.refusals import refusal

Call = tuple[str, dict[str, Any]]
EXPERTS = 64


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    name = f"bucket-{random.getrandbits(40)}"
    files.mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is asked of the server: operation, and arguments with the ``length`` of a body."""
    found: list[Call] = []
    call = AioBaseClient._make_api_call

    async def noting(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        found.append((operation, {**arguments, "length": len(arguments.get("Body", b""))}))
        return await call(self, operation, arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", noting)
    return found


def requested(calls: list[Call]) -> int:
    """Bytes of all ranges."""
    total = 0
    for method, arguments in calls:
        if method == "GetObject":
            first, last = map(int, arguments["Range"].removeprefix("bytes=").split("-"))
            total += last - first + 1
    return total


def open_uploads(url: str) -> list[Any]:
    path = RemotePath(url)
    found: list[Any] = path.fs.list_multipart_uploads(path.key.partition("/")[0])
    return found


def write(url: str | Path, shard_bytes: int | None = None) -> None:
    with Writer(url, shard_bytes) as writer:
        writer.add_attachment("config.json", b"{}")
        writer.add_tensor("big", np.random.default_rng(0).random(20_000), "F64")
        for name in ("up", "down"):
            with writer.add_stack(name, (EXPERTS, 60, 90), "BF16", "int-dict") as stack:
                for expert in range(EXPERTS):
                    stack.append(matrix(60, 90, seed=expert))


@pytest.mark.parametrize("shard_bytes", [None, 100_000])
def test_reading_one_expert_and_headers(
    bucket: str, calls: list[Call], qmoe: Run, shard_bytes: int | None
) -> None:
    write(f"{bucket}/m.qmoe", shard_bytes)
    calls.clear()
    with qmoe_format.open(f"{bucket}/m.qmoe") as file:
        length = file.file_length
        opening = requested(calls)
        assert opening < 0.03 * length
        calls.clear()
        file.read_expert("up", 3)
        assert [method for method, _ in calls] == ["GetObject"] * 2  # and its dictionary
        assert requested(calls) < 0.01 * length
    calls.clear()
    done = qmoe("inspect", f"{bucket}/m.qmoe")
    assert done.code == 0, done.err
    assert requested(calls) < 0.05 * length
    calls.clear()
    done = qmoe("verify", f"{bucket}/m.qmoe")
    assert done.code == 0, done.err
    assert length <= requested(calls) < 1.03 * length


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1000)
    monkeypatch.setattr(upload, "_PART", 1000)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("seed", range(8))
def test_parts(bucket: str, seed: int) -> None:
    """Whatever the order of calls, the file is what they say."""
    chance = random.Random(seed)
    file = upload.S3Upload(RemotePath(f"{bucket}/file"), renamed=seed % 2 == 1)
    expected, settled = bytearray(), 0
    for _ in range(60):
        kind = chance.choice(["write", "write", "write", "truncate", "settle"])
        if kind == "write":
            data = chance.randbytes(chance.randrange(900))
            file.write(memoryview(data))
            expected += data
        elif kind == "truncate":
            length = chance.randint(settled, len(expected))
            file.truncate(length)
            del expected[length:]
        else:
            file.settle()
            settled = len(expected)
        assert file.length == len(expected)
    file.overwrite(b"preamble")
    expected[:8] = b"preamble"
    file.seal()
    target = RemotePath(f"{bucket}/{'other' if seed % 2 else 'file'}")
    assert not target.exists()
    file.publish(target)
    file.discard()
    assert target.read_bytes() == expected
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert not open_uploads(bucket)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("shard_bytes", [None, 100_000])
def test_writing_keeps_no_copy_here(
    bucket: str, calls: list[Call], tmp_path: Path, shard_bytes: int | None
) -> None:
    write(tmp_path / "m.qmoe", shard_bytes)
    write(f"{bucket}/m.qmoe", shard_bytes)
    bodies = [each["length"] for method, each in calls if method == "UploadPart"]
    assert len(bodies) > 100
    assert max(bodies) <= 1000
    numbers = [each["PartNumber"] for method, each in calls if method == "UploadPart"]
    assert numbers[-1] == 1, "the first part, with the preamble, is sent last"
    here = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name: path.read_bytes() for path in RemotePath(bucket).iterdir()} == here


@pytest.mark.usefixtures("small_parts")
def test_memory_holds_the_first_part_and_the_last_extent(bucket: str, calls: list[Call]) -> None:
    with Writer(f"{bucket}/m.qmoe") as writer:
        for number in range(5):
            writer.add_tensor(f"t{number}", np.full(3000, number, np.uint8), "U8", "raw")
            sent = sum(each["length"] for operation, each in calls if operation == "UploadPart")
            assert sent >= 3000 * number - 2000


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("shard_bytes", [None, 50_000])
@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
def test_a_broken_upload_leaves_what_was_there(
    bucket: str, monkeypatch: pytest.MonkeyPatch, operation: str, shard_bytes: int | None
) -> None:
    write(f"{bucket}/m.qmoe", shard_bytes)
    before = {path.name: path.read_bytes() for path in RemotePath(bucket).iterdir()}
    call, left = AioBaseClient._make_api_call, 2 if operation == "UploadPart" else 0

    async def failing(self: Any, name: str, arguments: dict[str, Any]) -> Any:
        nonlocal left
        if name == operation:
            left -= 1
            if left < 0:
                raise ConnectionResetError("reset by peer")
        return await call(self, name, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", failing)
        message = refusal(lambda: write(f"{bucket}/m.qmoe", shard_bytes), "io")
    assert f"cannot write {bucket}/m.qmoe: reset by peer; check the network" in message
    assert {path.name: path.read_bytes() for path in RemotePath(bucket).iterdir()} == before
    assert not open_uploads(bucket)


def test_large_parts_as_s3_wants_them(bucket: str, calls: list[Call]) -> None:
    """The sizes of parts as they are, checked by the server."""
    value = np.random.default_rng(0).integers(0, 256, 2 * upload._PART + 123, np.uint8)
    with Writer(f"{bucket}/m.qmoe") as writer:
        writer.add_tensor("noise", value, "U8", "raw")
        writer.add_tensor("more", value[: upload._PART], "U8", "raw")
    bodies = [each["length"] for method, each in calls if method == "UploadPart"]
    assert bodies == [upload._PART, upload._PART, bodies[2], upload._PART]
    with qmoe_format.open(f"{bucket}/m.qmoe") as file:
        assert np.array_equal(file.read("noise"), value)


def test_errors(bucket: str, monkeypatch: pytest.MonkeyPatch, qmoe: Run) -> None:
    with pytest.raises(qmoe_format.QMoEError):
        qmoe_format.open(f"{bucket}/none.qmoe")
    cases = {
        f"{bucket}/none.qmoe": "error[not-found]: cannot read",
        "s3://no-such-bucket-at-all/m.qmoe": "error[not-found]: cannot read",
        "s3://no!bucket/m.qmoe": "error[argument]: cannot read",
    }
    for url, words in cases.items():
        done = qmoe("inspect", url)
        assert done.code == 1
        assert done.err.startswith(words), done.err
    refusal(lambda: Writer("s3://no-such-bucket-at-all/m.qmoe"), "not-found")
    write(f"{bucket}/m.qmoe")
    path = RemotePath(f"{bucket}/m.qmoe")
    with qmoe_format.open(f"{bucket}/m.qmoe") as file:
        path.fs.pipe_file(path.key, path.read_bytes()[:500])
        assert "ends before" in refusal(lambda: file.read("big"), "truncated")
        assert "ends before" in refusal(lambda: file.read_expert("up", 60), "truncated")
    refusal(lambda: qmoe_format.open(f"{bucket}/m.qmoe"), "truncated")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    assert "credentials" in refusal(lambda: qmoe_format.open(f"{bucket}/m.qmoe"), "io")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    assert "check the network" in refusal(lambda: qmoe_format.open(f"{bucket}/m.qmoe"), "io")


def test_a_conversion(bucket: str, calls: list[Call], tmp_path: Path, switch: Any) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'convert'")
    folder = switch(shards=2)
    source = copy_elsewhere(folder, f"{bucket}/model")
    here = qmoe_format.convert(folder, tmp_path / "m.qmoe", recipe="rtn")
    calls.clear()
    nowhere = "s3://no-such-bucket-at-all/m.qmoe"
    refusal(lambda: qmoe_format.convert(source, nowhere, recipe="rtn"), "not-found")
    assert "GetObject" not in [operation for operation, _ in calls], "it is refused at once"
    qmoe_format.convert(source, f"{bucket}/out/m.qmoe", recipe="rtn")
    assert RemotePath(f"{bucket}/out/m.qmoe").read_bytes() == here.read_bytes()
    assert not open_uploads(bucket)
