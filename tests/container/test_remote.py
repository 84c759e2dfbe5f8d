"""Files at URLs: the same contents and errors as here, by few and small requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fsspec", reason="needs the extra 'remote'")
import fsspec

from qmoe_format import QMoEError, QMoEFile, Writer
from qmoe_format.container.inspection import describe
from qmoe_format.remote import RemotePath
from tests.container.files import code_of, matrix, sample
from tests.refusals import refusal

EXPERTS = 64
Requests = list[tuple[str, int, int]]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """File, first byte and end of each range that a file system was asked for."""
    found: Requests = []
    file_system = type(fsspec.filesystem("memory"))
    cat_file = file_system.cat_file

    def noting(self: object, path: str, start: int, end: int) -> bytes:
        found.append((path.rpartition("/")[2], start, end))
        return bytes(cat_file(self, path, start, end))

    monkeypatch.setattr(file_system, "cat_file", noting)
    return found


def size(requests: Requests) -> int:
    return sum(end - start for _, start, end in requests)


def write(url: str, shard_bytes: int | None = None) -> None:
    with Writer(url, shard_bytes) as writer:
        writer.add_attachment("config.json", b"{}")
        writer.add_tensor("big", np.random.default_rng(0).random(20_000), "F64")
        for name in ("up", "down"):
            with writer.add_stack(name, (EXPERTS, 60, 90), "BF16", "int-dict") as stack:
                for expert in range(EXPERTS):
                    stack.append(matrix(60, 90, seed=expert))


def test_an_expert_is_one_request(elsewhere: str, requests: Requests) -> None:
    write(f"{elsewhere}/m.qmoe")
    with QMoEFile(f"{elsewhere}/m.qmoe") as file:
        preamble, index = requests
        assert preamble[1:] == (0, 64)
        assert index[2] == file.file_length
        assert size(requests) < 0.1 * file.file_length
        requests.clear()
        file.read_expert("up", 3)
        assert len(requests) == 2  # the expert, and the dictionary of all of them
        requests.clear()
        file.read_expert("up", 4)
        assert len(requests) == 1
        assert size(requests) < 2 * file.tensors["up"].stored_bytes / EXPERTS


def test_inspecting_reads_headers(elsewhere: str, requests: Requests) -> None:
    write(f"{elsewhere}/m.qmoe")
    with QMoEFile(f"{elsewhere}/m.qmoe") as file:
        report = describe(file)
        assert len(requests) == 2 + 2 * EXPERTS
        assert size(requests) < 0.15 * file.file_length
    assert report["totals"]["experts"]["weights"] == 2 * EXPERTS * 60 * 90


def test_verification_reads_every_byte_once(elsewhere: str, requests: Requests) -> None:
    write(f"{elsewhere}/m.qmoe")
    with QMoEFile(f"{elsewhere}/m.qmoe") as file:
        file.verify()
        whole, dictionaries = requests[:3], requests[3:]  # which come after what needs them
        assert size(whole) == file.file_length
        assert size(dictionaries) == file.dictionary_bytes


def test_shards(elsewhere: str, requests: Requests) -> None:
    write(f"{elsewhere}/m.qmoe", shard_bytes=100_000)
    with QMoEFile(f"{elsewhere}/m.qmoe") as file:
        assert len(file.shards) == 3
        requests.clear()
        file.read_expert("down", 5)
        assert {name for name, *_ in requests} == {"m-00003-of-00003.qmoe"}
        file.verify()
    shard = Path(file.shards[1].path).name
    fsspec.filesystem("memory").rm(f"/elsewhere/{shard}")
    assert shard in refusal(lambda: QMoEFile(f"{elsewhere}/m.qmoe"), "truncated")


def code_elsewhere(data: bytes) -> str | None:
    fsspec.filesystem("memory").pipe_file("/elsewhere/damaged.qmoe", data)
    try:
        with QMoEFile("memory://elsewhere/damaged.qmoe") as file:
            file.verify()
    except QMoEError as error:
        return error.code
    return None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_has_the_same_code_as_here(data: st.DataObject) -> None:
    good = sample()
    at = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "longer"]))
    if kind == "cut":
        bad = good[:at]
    elif kind == "flip":
        bad = good[:at] + bytes([good[at] ^ 1 << data.draw(st.integers(0, 7))]) + good[at + 1 :]
    else:
        bad = good + bytes(at + 1)
    assert code_elsewhere(bad) == code_of(bad)
    assert code_of(bad) is not None


def test_a_file_that_changes_while_it_is_open(elsewhere: str) -> None:
    memory = fsspec.filesystem("memory")
    write(f"{elsewhere}/m.qmoe")
    with QMoEFile(f"{elsewhere}/m.qmoe") as file:
        data = memory.cat("/elsewhere/m.qmoe")
        memory.pipe_file("/elsewhere/m.qmoe", data[:1000])
        refusal(lambda: file.read("big"), "truncated")
        memory.pipe_file("/elsewhere/m.qmoe", bytes(len(data)))
        refusal(lambda: file.read("big"), "checksum")
        memory.rm("/elsewhere/m.qmoe")
        assert "there is no such file" in refusal(lambda: file.read("big"), "not-found")
    refusal(lambda: file.read("big"), "argument")


def test_small_and_other_files(elsewhere: str) -> None:
    for content, code in (
        (b"", "truncated"),
        (b"\x8fQ", "truncated"),
        (b"hello" * 50, "signature"),
    ):
        assert code_elsewhere(content) == code
    refusal(lambda: QMoEFile(f"{elsewhere}/none.qmoe"), "not-found")
    assert repr(RemotePath(f"{elsewhere}/a")) == "RemotePath('memory://elsewhere/a')"
