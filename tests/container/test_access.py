"""What opening and reading touch, how fast they are, and what an import loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qmoe_format import QMoEFile, Writer
from qmoe_format.container.file_source import FileSource
from qmoe_format.dtypes import Bytes
from tests.container.files import matrix, sample, take_apart

EXPERTS = 2048


Ranges = list[tuple[int, int]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """The ranges of bytes that the reader has asked for."""
    ranges: Ranges = []
    view = FileSource.view

    def noting(self: FileSource, offset: int, length: int) -> Bytes:
        ranges.append((offset, offset + length))
        return view(self, offset, length)

    monkeypatch.setattr(FileSource, "view", noting)
    return ranges


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stack") / "stack.qmoe"
    value = matrix(40, 300)
    with Writer(path) as writer:
        writer.add_tensor("first", np.arange(5000, dtype=np.uint16), "U16")
        with writer.add_stack("s", (EXPERTS, 40, 300), "BF16", "int-dict") as experts:
            for _ in range(EXPERTS):
                experts.append(value)
        with writer.add_stack("raw", (EXPERTS, 64), "BF16", "raw") as experts:
            for expert in range(EXPERTS):
                experts.append(np.full(64, expert, np.uint16))
    return path


def test_opening_reads_the_preamble_and_the_index(stack: Path, seen: Ranges) -> None:
    """[C-1]"""
    with QMoEFile(stack) as file:
        beginning, preamble, index = seen
        assert beginning[0] == 0  # is it a list of shards?
        assert beginning[1] <= 64
        assert preamble == (0, 64)
        assert file.file_length - 70_000 < index[0] < index[1] == file.file_length


def test_one_expert_of_many_touches_its_own_bytes(stack: Path, seen: Ranges) -> None:
    with QMoEFile(stack) as file:
        entry = file.tensors["s"]
        seen.clear()
        file.encoded("s", 1234)
        own = 64 + sum(
            -(-len(each) // 64) * 64 for each in extents_before(stack, entry.extent + 1234)
        )
        length = entry.stored_bytes // EXPERTS
        touched = set(seen)
        assert (own, own + length) in touched
        others = touched - {(own, own + length)}
        assert len(others) == 1  # the dictionary
        ((first, last),) = others
        assert last <= file.file_length - 64
        assert last - first < 1024  # its tree is compressed
        seen.clear()
        file.encoded("s", 1234)
        assert seen == [(own, own + length)]  # and the checksum is not computed again
        file.read_expert("raw", 7)
        assert sum(last - first for first, last in seen) == length + 128  # each byte once


def extents_before(path: Path, number: int) -> list[bytes]:
    return take_apart(path.read_bytes())[1][:number]


def test_verification_looks_at_every_byte(tmp_path: Path, seen: Ranges) -> None:
    path = tmp_path / "sample.qmoe"
    path.write_bytes(sample())
    with QMoEFile(path) as file:
        progress: list[tuple[int, int]] = []
        file.verify(lambda done, total, stage="": progress.append((done, total)))
        touched = bytearray(file.file_length)
        for first, last in seen:
            touched[first:last] = b"\1" * (last - first)
        assert all(touched)
        assert progress == sorted(progress)
        assert progress[-1] == (file.file_length, file.file_length)


def test_importing_loads_nothing_heavy(tmp_path: Path) -> None:
    program = """
import sys
import qmoe_format
assert not {"numpy", "numba", "torch", "cupy", "transformers", "zstandard"} & set(sys.modules)
assert set(dir(qmoe_format)) >= {"open", "Writer", "QMoEError"}
for name in set(qmoe_format.__all__) - {"load_model", "load_tokenizer"}:  # of torch models
    getattr(qmoe_format, name)
heavy = {"numba", "torch", "cupy", "transformers"} & set(sys.modules)
assert not heavy, heavy
with qmoe_format.Writer(sys.argv[1]) as writer:
    writer.add_attachment("a.txt", b"text")
with qmoe_format.open(sys.argv[1]) as file:
    file.verify()
heavy = {"numba", "torch", "cupy", "transformers"} & set(sys.modules)
assert not heavy, heavy
try:
    qmoe_format.nonsense
except AttributeError:
    pass
else:
    sys.exit("no AttributeError")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.qmoe")], check=True)
