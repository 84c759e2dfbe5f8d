"""Writing: what is refused, what a failure leaves behind, memory, and equal bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format
from qmoe_format import QMoEError, Writer
from qmoe_format.codec import encode_matrix, fit_dictionary
from tests.container.files import code_of, matrix, sample

OLD = b"what was there before"


def ls(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A name under which there is something already."""
    path = tmp_path / "model.qmoe"
    path.write_bytes(OLD)
    return path


def test_the_same_input_makes_the_same_bytes() -> None:
    """[W-1]"""
    assert sample() == sample()


def test_the_number_of_threads_does_not_matter(tmp_path: Path) -> None:
    """[W-1]"""
    files = []
    for threads in (1, 2):
        path = tmp_path / "model.qmoe"
        with Writer(path) as writer:
            value = matrix(300, 500, threads=threads)
            writer.add_tensor("w", value, "BF16", "int-dict")
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_nothing_has_the_final_name_before_the_end(target: Path) -> None:
    """[W-2]"""
    with Writer(target) as writer:
        writer.add_tensor("t", np.zeros(9, np.uint8), "U8")
        assert target.read_bytes() == OLD
        (partial,) = set(ls(target.parent)) - {target.name}
        assert partial.startswith(".model.qmoe.")
        assert partial.endswith(".partial")
        assert not writer.files
    assert list(writer.files) == [target]
    assert ls(target.parent) == [target.name]
    assert code_of(target.read_bytes()) is None


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    with Writer(tmp_path / "model.qmoe"):
        pass
    modes = {each.stat().st_mode for each in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "real.qmoe"
    real.write_bytes(OLD)
    link = tmp_path / "model.qmoe"
    link.symlink_to(real)
    with Writer(link):
        pass
    assert link.is_symlink()
    assert code_of(real.read_bytes()) is None


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(target: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), Writer(target) as writer:  # noqa: PT012
        writer.add_tensor("t", np.zeros(9, np.uint8), "U8")
        stack = writer.add_stack("s", (3, 2), "U8")
        stack.append(np.zeros(2, np.uint8))
        raise kind
    assert ls(target.parent) == [target.name]
    assert target.read_bytes() == OLD


def write_much(writer: Writer) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        writer.add_tensor(f"t{number}", rng.integers(0, 255, 100_000, np.uint8), "U8", "raw")


def test_a_full_disk(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write of a short conversion in turn is the one that fails."""
    real = os.write
    count = 0
    fail_at = 10**9

    def write(fd: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: max(1, len(data) // 2)])  # and no write takes all it is given

    monkeypatch.setattr(os, "write", write)

    def convert() -> None:
        with Writer(target) as writer:
            writer.add_attachment("config.json", b"{}")
            writer.add_tensor("t", np.arange(99, dtype=np.uint16), "U16")
            with writer.add_stack("s", (2, 3, 40), "BF16", "int-dict") as stack:
                stack.append(matrix(3, 40, width=8))
                stack.append(matrix(3, 40, width=8, seed=1))

    convert()
    writes = count
    assert code_of(target.read_bytes()) is None
    target.write_bytes(OLD)
    for number in range(1, writes + 1):
        fail_at, count = number, 0
        with pytest.raises(QMoEError, match="free some space") as caught:
            convert()
        assert caught.value.code == "io"
        assert str(target) in str(caught.value)
        assert ls(target.parent) == [target.name]
        assert target.read_bytes() == OLD


@pytest.mark.parametrize("function", ["fsync", "close", "ftruncate", "lseek"])
def test_a_disk_that_fails_otherwise(
    target: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    writer = Writer(target)
    writer.add_tensor("t", np.arange(99, dtype=np.uint16), "U16")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(QMoEError) as caught:  # noqa: PT012
        patch.setattr(os, function, fail)
        writer.add_tensor("u", np.frombuffer(np.random.default_rng(0).bytes(9), np.uint8), "U8")
        writer.finish()
    assert caught.value.code == "io"
    assert ls(target.parent) == [target.name]
    assert target.read_bytes() == OLD


def test_a_rename_that_fails(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(QMoEError, match="check the permissions"), Writer(target) as writer:
        write_much(writer)
    assert ls(target.parent) == [target.name]
    assert target.read_bytes() == OLD


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_may_not_grow(target: Path) -> None:
    """A real refusal of the operating system, at 1 MB of 2."""
    program = """
import resource, sys
from pathlib import Path
import qmoe_format
from tests.container.test_writer import write_much
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with qmoe_format.Writer(sys.argv[1]) as writer:
        write_much(writer)
except qmoe_format.QMoEError as error:
    assert error.code == "io", error
    assert "raise the system's limit" in str(error), error
else:
    sys.exit("it was written")
"""
    subprocess.run([sys.executable, "-c", program, str(target)], check=True)
    assert ls(target.parent) == [target.name]
    assert target.read_bytes() == OLD


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_killed(target: Path) -> None:
    """[W-2] Only the file under its other name is left behind."""
    program = """
import sys
import numpy as np
import qmoe_format
with qmoe_format.Writer(sys.argv[1]) as writer:
    number = 0
    while True:
        writer.add_tensor(f"t{number}", np.zeros(1000, np.uint8), "U8", "raw")
        number += 1
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(target)])
    try:
        deadline = time.monotonic() + 60
        while not any(each.stat().st_size > 10_000 for each in target.parent.glob(".*.partial")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert target.read_bytes() == OLD
    names = ls(target.parent)
    assert len(names) == 2
    assert names[0].startswith(".model.qmoe.")
    with pytest.raises(QMoEError) as caught:
        qmoe_format.open(target.parent / names[0])
    assert caught.value.code == "signature"  # the preamble comes last


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """1000 experts more cost what the table of extents costs, and not a tenth of one expert."""
    expert = np.random.default_rng(0).integers(0, 255, 100_000, np.uint8)

    def peak(experts: int) -> int:
        tracemalloc.start()
        with (
            Writer(tmp_path / "model.qmoe") as writer,
            writer.add_stack("s", (experts, expert.size), "U8", "raw") as stack,
        ):
            for _ in range(experts):
                stack.append(expert)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(1010) - peak(10) < 100 * 1000


@pytest.mark.parametrize("encoding", ["raw", "zstd"])
def test_a_large_tensor_is_not_copied(tmp_path: Path, encoding: str) -> None:
    array = np.arange(1 << 23, dtype=np.uint32)
    tracemalloc.start()
    with Writer(tmp_path / "model.qmoe") as writer:
        writer.add_tensor("t", array, "U32", encoding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 < array.nbytes


def test_zstd_becomes_raw_where_it_saves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2, 1000), np.uint8)
    path = tmp_path / "model.qmoe"
    with Writer(path) as writer:
        writer.add_tensor("dull", np.zeros(1000, np.uint8), "U8")
        writer.add_tensor("noise", noise, "U8")
        writer.add_tensor("nothing", noise[:0], "U8")
        for name, first in (("s1", noise[0]), ("s2", np.zeros(1000, np.uint8))):
            with writer.add_stack(name, (2, 1000), "U8", "zstd") as stack:
                stack.append(first)
                stack.append(noise[1])
        writer.add_attachment("noise.bin", noise.tobytes())
        writer.add_attachment("dull.bin", bytes(1000))
        writer.add_attachment("nothing.bin", b"")
    with qmoe_format.open(path) as file:
        file.verify()
        assert {name: entry.encoding for name, entry in file.tensors.items()} == {
            "dull": "zstd", "noise": "raw", "nothing": "raw", "s1": "raw", "s2": "zstd",
        }  # fmt: skip
        assert {name: entry.encoding for name, entry in file.attachments.items()} == {
            "dull.bin": "zstd", "noise.bin": "raw", "nothing.bin": "raw",
        }  # fmt: skip
        assert file.tensors["noise"].stored_bytes == 2000
        assert file.read_expert("s2", 1).tobytes() == noise[1].tobytes()


def test_the_dullest_content_stays_within_the_ratio(tmp_path: Path) -> None:
    """[Z-3] 48 MB of zeros take less than 6 KB at once: too few for a reader."""
    array = np.zeros(12 << 20, np.float32)
    path = tmp_path / "model.qmoe"
    with Writer(path) as writer:
        writer.add_tensor("zeros", array, "F32")
    with qmoe_format.open(path) as file:
        file.verify()
        entry = file.tensors["zeros"]
        assert entry.encoding == "zstd"
        assert array.nbytes / 1024 - 1024 < entry.stored_bytes < array.nbytes / 500
        assert not file.read("zeros").any()


def test_arrays_in_any_order_of_memory(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    path = tmp_path / "model.qmoe"
    with Writer(path) as writer:
        for encoding in ("raw", "zstd"):
            writer.add_tensor(f"{encoding}.turned", array.transpose(2, 0, 1), "I16", encoding)
            writer.add_tensor(f"{encoding}.part", array[::2, 1:, ::-1], "I16", encoding)
    with qmoe_format.open(path) as file:
        for encoding in ("raw", "zstd"):
            assert np.array_equal(file.read(f"{encoding}.turned"), array.transpose(2, 0, 1))
            assert np.array_equal(file.read(f"{encoding}.part"), array[::2, 1:, ::-1])


def test_dictionaries_are_shared_and_do_not_cut_a_stack(tmp_path: Path) -> None:
    """[T-1] An expert with a dictionary of its own, in the middle of a stack."""
    path = tmp_path / "model.qmoe"
    dictionaries = [fit_dictionary(share, 8) for share in (0.5, 0.9, 0.5)]
    levels = np.zeros((4, 30), np.int8)
    scale = np.zeros((4, 2), np.uint16)
    with Writer(path) as writer:
        for name in ("a", "b"):
            with writer.add_stack(name, (3, 4, 30), "BF16", "int-dict") as stack:
                for dictionary in dictionaries:
                    stack.append(encode_matrix(levels, scale, dictionary=dictionary))
    with qmoe_format.open(path) as file:
        file.verify()
        assert list(file.dictionaries) == dictionaries[:2]
        for name in ("a", "b"):
            assert [file.encoded(name, e).dictionary for e in range(3)] == dictionaries


U8 = np.zeros(2, np.uint8)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda w: w.add_tensor("there", U8, "U8"), "duplicate"),
        (lambda w: w.add_stack("there", (1, 2), "U8"), "duplicate"),
        (lambda w: w.add_attachment("there.txt", b""), "duplicate"),
        (lambda w: w.add_attachment("a/b", b""), "argument"),
        (lambda w: w.add_attachment(".a", b""), "argument"),
        (lambda w: w.add_tensor("a b", U8, "U8"), "argument"),
        (lambda w: w.add_tensor("", U8, "U8"), "argument"),
        (lambda w: w.add_tensor("tést", U8, "U8"), "argument"),
        (lambda w: w.add_tensor('a"b', U8, "U8"), "argument"),
        (lambda w: w.add_tensor("a\\b", U8, "U8"), "argument"),
        (lambda w: w.add_tensor("t", U8, "U9"), "argument"),
        (lambda w: w.add_tensor("t", U8, "I8"), "argument"),
        (lambda w: w.add_tensor("t", U8, "BF16"), "argument"),
        (lambda w: w.add_tensor("t", U8.astype(">u2"), "U16"), "argument"),
        (lambda w: w.add_tensor("t", [1, 2], "U8"), "argument"),
        (lambda w: w.add_tensor("t", U8, "U8", "new"), "argument"),
        (lambda w: w.add_tensor("t", U8, "F32", "int-dict"), "argument"),
        (lambda w: w.add_tensor("t", U8.reshape(1, 2), "F32", "int-dict"), "argument"),
        (lambda w: w.add_tensor("t", matrix(2, 2), "F32"), "argument"),
        (lambda w: w.add_tensor("t", matrix(2, 2), "U8", "int-dict"), "argument"),
        (lambda w: w.add_tensor("t", np.zeros((1,) * 9, np.uint8), "U8"), "limit"),
        (lambda w: w.add_stack("s", (), "U8"), "argument"),
        (lambda w: w.add_stack("s", (2**41,), "U8"), "limit"),
        (lambda w: w.add_stack("s", (-1, 2), "U8"), "limit"),
        (lambda w: w.add_stack("s", (1, 2), "U8", members="e"), "argument"),
        (lambda w: w.add_stack("s", (1, 2), "U8", members="é{}"), "argument"),
        (lambda w: w.add_stack("s", (1, 2), "U8", transposed=True), "argument"),
        (lambda w: w.add_stack("s", (1, 2, 2), "U8", transposed=1), "argument"),
        (lambda w: w.add_stack("s", (1, 2), "U8", "raw", symmetric=True), "argument"),
        (lambda w: w.add_stack("s", (1, 2), "F32", "int-dict"), "argument"),
        (lambda w: w.add_stack("s", (1, 2, 2), "F32", "int-dict", rows_per_segment=0), "limit"),
        (lambda w: w.add_stack("s", (1, 2, 2), "F32", "int-dict", symetric=True), "argument"),
        (lambda w: w.add_stack("s", (1, 2, 2), "F32", "int-dict", symmetric=1), "argument"),
    ],
)  # fmt: skip
def test_a_call_that_is_refused_changes_nothing(
    tmp_path: Path, call: Callable[[Writer], Any], code: str
) -> None:
    files = []
    for refuse in (False, True):
        path = tmp_path / "model.qmoe"
        with Writer(path) as writer:
            writer.add_tensor("there", U8, "U8")
            writer.add_attachment("there.txt", b"x")
            if refuse:
                with pytest.raises(QMoEError) as caught:
                    call(writer)
                assert caught.value.code == code
            writer.add_tensor("last", U8, "U8")
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_experts_that_do_not_fit_their_stack(tmp_path: Path) -> None:
    with Writer(tmp_path / "model.qmoe") as writer:
        stack = writer.add_stack("s", (2, 3, 40), "BF16", "int-dict", symmetric=False)
        for wrong in (
            np.zeros((3, 40), np.uint16),
            matrix(3, 41),
            matrix(40, 3),
            matrix(3, 40, values=1),
        ):
            with pytest.raises(QMoEError) as caught:
                stack.append(wrong)
            assert caught.value.code == "argument"
        stack.append(matrix(3, 40, width=8))
        # What the first expert was, all have to be.
        for wrong in (
            matrix(3, 40, rows_per_segment=2),
            matrix(3, 40, columns_scaled=True),
        ):
            with pytest.raises(QMoEError) as caught:
                stack.append(wrong)
            assert caught.value.code == "argument"
        calls: list[Callable[[], Any]] = [
            lambda: writer.add_tensor("t", U8, "U8"),
            lambda: writer.add_stack("t", (0,), "U8"),
            lambda: writer.add_attachment("t", b""),
        ]
        for call in calls:
            with pytest.raises(QMoEError, match="1 of 2 experts"):
                call()
        stack.append(matrix(3, 40, width=9, seed=1, most=3))  # but for these
        with pytest.raises(QMoEError, match="has all its 2 experts"):
            stack.append(matrix(3, 40, width=8))
    assert code_of((tmp_path / "model.qmoe").read_bytes()) is None


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    """[W-3] Such a matrix cannot even be made."""
    with pytest.raises(QMoEError) as caught:
        encode_matrix(np.zeros((1, 1), np.int8), np.array([[0x7F80, 0]], np.uint16))
    assert caught.value.code == "value"


@pytest.mark.parametrize("leave_block", [True, False])
def test_missing_experts(target: Path, leave_block: bool) -> None:
    with pytest.raises(QMoEError, match="1 of 2 experts") as caught, Writer(target) as writer:  # noqa: PT012
        if leave_block:
            with writer.add_stack("s", (2, 2), "U8") as stack:
                stack.append(U8)
        else:
            writer.add_stack("s", (2, 2), "U8").append(U8)
    assert caught.value.code == "argument"
    assert ls(target.parent) == [target.name]
    assert target.read_bytes() == OLD


def test_closing_a_stack_that_is_not_full(target: Path) -> None:
    writer = Writer(target)
    stack = writer.add_stack("s", (2, 2), "U8")
    stack.append(U8)
    with pytest.raises(QMoEError, match="1 of 2 experts") as caught:
        stack.close()
    assert caught.value.code == "argument"
    with pytest.raises(QMoEError, match="failed"):
        stack.append(U8)
    assert ls(target.parent) == [target.name]


def test_a_writer_that_has_failed_or_finished_takes_nothing_more(target: Path) -> None:
    writer = Writer(target)
    writer.add_tensor("t", U8, "U8")
    writer.finish()
    good = target.read_bytes()
    assert code_of(good) is None
    calls: list[Callable[[], None]] = [lambda: writer.add_tensor("u", U8, "U8"), writer.finish]
    for call in calls:
        with pytest.raises(QMoEError, match="finished") as caught:
            call()
        assert caught.value.code == "argument"
    writer.abort()
    assert target.read_bytes() == good
    writer = Writer(target)
    writer.abort()
    writer.abort()
    with pytest.raises(QMoEError, match="aborted"):
        writer.finish()
    assert target.read_bytes() == good
    assert ls(target.parent) == [target.name]


def test_finishing_early_and_giving_up_inside_the_block(target: Path) -> None:
    with Writer(target) as writer:
        writer.abort()
    assert target.read_bytes() == OLD
    with Writer(target) as writer:
        writer.finish()
    assert code_of(target.read_bytes()) is None
    assert ls(target.parent) == [target.name]


def test_a_failure_that_is_caught_is_not_forgotten(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(QMoEError, match="failed") as caught, Writer(target) as writer:  # noqa: PT012
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(QMoEError):
                writer.add_tensor("t", U8, "U8")
        assert ls(target.parent) == [target.name]
    assert caught.value.code == "argument"
    assert target.read_bytes() == OLD


def test_arrays_mapped_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.qmoe"
    with Writer(path) as writer:
        for encoding in ("raw", "zstd"):
            mapped = np.memmap(tmp_path / encoding, np.uint8, "w+", shape=(3, 400))
            mapped[:] = np.arange(400) % 7
            writer.add_tensor(encoding, mapped, "U8", encoding)
    with qmoe_format.open(path) as file:
        for encoding in ("raw", "zstd"):
            assert np.array_equal(file.read(encoding), mapped)


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    """Found before a conversion begins, not at its end."""
    for path, code in (
        (tmp_path, "argument"),
        (tmp_path / "no" / "folder.qmoe", "io"),
        (tmp_path / ("x" * 300), "io"),
    ):
        with pytest.raises(QMoEError) as caught:
            Writer(path)
        assert caught.value.code == code
    for options in ({"generator": "é"}, {"shard_bytes": 0}, {"shard_bytes": -1}):
        with pytest.raises(QMoEError) as caught:
            Writer(tmp_path / "m.qmoe", **options)
        assert caught.value.code == "argument"
    assert ls(tmp_path) == []


@pytest.mark.parametrize(
    ("limit", "value"),
    [("EXTENTS", 4), ("ENTRIES", 2), ("INTEGER", 300), ("INDEX_LENGTH", (2, 500))],
)
def test_limits_of_the_format(
    target: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: Any
) -> None:
    """A writer stops at them; the real ones take too long to reach."""
    monkeypatch.setattr(f"qmoe_format.container.limits.{limit}", value)
    with pytest.raises(QMoEError) as caught, Writer(target) as writer:  # noqa: PT012
        for number in range(5):
            writer.add_tensor(f"t{number}", np.zeros(60, np.uint8), "U8", "raw")
    assert caught.value.code == "limit"
    assert str(target) in str(caught.value)
    assert ls(target.parent) == [target.name]
    assert target.read_bytes() == OLD


def test_the_number_of_attachments_and_dictionaries(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmoe_format.container.limits.ENTRIES", 2)
    with Writer(target) as writer:
        for name in ("a", "b"):
            writer.add_attachment(name, b"")
        with pytest.raises(QMoEError) as caught:
            writer.add_attachment("c", b"")
        assert caught.value.code == "limit"
    assert code_of(target.read_bytes()) is None
    writer = Writer(target)
    stack = writer.add_stack("s", (3, 2, 9), "BF16", "int-dict")
    values = [
        encode_matrix(
            np.zeros((2, 9), np.int8),
            np.zeros((2, 2), np.uint16),
            dictionary=fit_dictionary(share, 8),
        )
        for share in (0.5, 0.7, 0.9)
    ]
    for value in values[:2]:
        stack.append(value)
    with pytest.raises(QMoEError) as caught:
        stack.append(values[2])
    assert caught.value.code == "limit"
    writer.abort()
