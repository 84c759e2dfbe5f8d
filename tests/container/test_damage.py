"""Damaged files: whatever happens to the bytes, the answer is a coded error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmoe_format
from qmoe_format import QMoEError
from qmoe_format.errors import FORMAT_CODES
from tests.container.files import (
    SIGNATURE,
    assemble,
    code_at_opening,
    code_of,
    dumps,
    index_of,
    one_matrix,
    opened,
    read_all,
    sample,
    take_apart,
    tensor,
)

SAMPLE = sample()


def test_the_sample_is_good_and_small() -> None:
    assert code_of(SAMPLE) is None
    assert len(SAMPLE) < 4096


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "cut.qmoe"
    path.write_bytes(SAMPLE)
    for length in reversed(range(len(SAMPLE))):
        os.truncate(path, length)
        with pytest.raises(QMoEError) as caught:
            qmoe_format.open(path)
        assert caught.value.code == "truncated", length


def test_bytes_after_the_end() -> None:
    assert code_at_opening(SAMPLE + b"\0") == "trailing"
    assert code_at_opening(SAMPLE + SAMPLE) == "trailing"


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
def test_every_byte_changed(change: int) -> None:
    """[F-2] and the checksums leave no byte out."""
    found = set()
    for at in range(len(SAMPLE)):
        data = bytearray(SAMPLE)
        data[at] ^= change
        code = code_of(bytes(data))
        assert code is not None, f"byte {at} may change unnoticed"
        found.add(code)
    assert found == {"signature", "checksum", "padding"}


def test_every_byte_changed_and_all_checksums_repaired() -> None:
    """What a hostile author can do: the checks behind the checksums have to hold alone."""
    index, extents = take_apart(SAMPLE)
    text = dumps(index)
    for at in range(len(text)):
        for change in (0x01, 0x02, 0x20, 0x80):
            changed = bytearray(text)
            changed[at] ^= change
            assert_sound(assemble(bytes(changed), extents))
    for number, extent in enumerate(extents):
        for at in range(len(extent)):
            for change in (0x01, 0x10, 0x80, 0xFF):
                changed = bytearray(extent)
                changed[at] ^= change
                assert_sound(
                    assemble(index, [*extents[:number], bytes(changed), *extents[number + 1 :]])
                )
    for at in range(len(SIGNATURE), 60):
        for bit in range(8):
            data = bytearray(SAMPLE)
            data[at] ^= 1 << bit
            assert_sound(repaired(data))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_pieces_of_extents_moved_about(data: st.DataObject) -> None:
    index, extents = take_apart(SAMPLE)
    number = data.draw(st.integers(0, len(extents) - 1))
    changed = bytearray(extents[number])
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(changed))] * 2)))
    changed[first:last] = data.draw(st.binary(max_size=40))
    extents[number] = bytes(changed)
    assert_sound(assemble(index, extents))


def test_extents_swapped() -> None:
    """Also two that are equally long: a checksum belongs to its place in the table."""
    _, extents = take_apart(SAMPLE)
    for first in range(len(extents)):
        for second in range(first):
            swapped = bytearray(SAMPLE)
            if len(extents[first]) != len(extents[second]) or extents[first] == extents[second]:
                continue
            for here, there in ((first, second), (second, first)):
                at = sum(-(-len(extent) // 64) * 64 for extent in extents[:here]) + 64
                swapped[at : at + len(extents[there])] = extents[there]
            assert code_at_opening(bytes(swapped)) is None
            assert code_of(bytes(swapped)) == "checksum"


def test_reading_finds_what_it_touches_and_nothing_else() -> None:
    """One bad extent does not hide the others. [F-7]"""
    index, extents = take_apart(SAMPLE)
    stack = next(each for each in index["tensors"] if each["name"] == "moe.experts.wi")
    at = sum(-(-len(extent) // 64) * 64 for extent in extents[: stack["extent"] + 1]) + 64
    data = bytearray(SAMPLE)
    data[at + 40] ^= 1
    with opened(bytes(data)) as file:
        file.read_expert("moe.experts.wi", 0)
        for _ in range(2):
            with pytest.raises(QMoEError, match="expert 1") as caught:
                file.read_expert("moe.experts.wi", 1)
            assert caught.value.code == "checksum"


def test_messages_say_what_where_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "cut.qmoe"
    path.write_bytes(SAMPLE[:-1])
    with pytest.raises(QMoEError) as caught:
        qmoe_format.open(path)
    what = f"the file has {len(SAMPLE) - 1} bytes, its preamble says {len(SAMPLE)}"
    assert str(caught.value) == f"{path}: {what}; copy or download it again, completely"


@pytest.mark.parametrize("memory_map", [True, False])
def test_a_file_that_grows_or_shrinks_while_it_is_open(tmp_path: Path, memory_map: bool) -> None:
    """Touching a mapped page beyond the end would kill the process."""
    path = tmp_path / "changing.qmoe"
    array = np.random.default_rng(0).integers(0, 255, 1 << 16, np.uint8)
    for change, code in ((-4096, "truncated"), (-(1 << 16), "truncated"), (1, "trailing")):
        with qmoe_format.Writer(path) as writer:
            writer.add_tensor("t", array, "U8", "raw")
        with qmoe_format.open(path, memory_map=memory_map) as file:
            os.truncate(path, file.file_length + change)
            for call in (lambda: file.read("t"), file.verify):
                with pytest.raises(QMoEError) as caught:
                    call()
                assert caught.value.code == code
    with qmoe_format.Writer(path) as writer:
        writer.add_tensor("t", array, "U8", "raw")
    with qmoe_format.open(path, memory_map=memory_map) as file:
        path.unlink()  # or replaced by a rename: the open file is still the old one
        file.verify()


def test_a_file_that_shrinks_in_the_moment_of_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its length was asked for; a mapped file is not safe from this, see the module."""
    path = tmp_path / "changing.qmoe"
    path.write_bytes(SAMPLE)
    with qmoe_format.open(path, memory_map=False) as file:
        before = path.stat()
        os.truncate(path, 64)
        monkeypatch.setattr(os, "fstat", lambda fd: before)
        with pytest.raises(QMoEError) as caught:
            file.verify()
        assert caught.value.code == "truncated"


def test_what_a_small_hostile_file_may_claim(tmp_path: Path) -> None:
    """[N-3]: terabytes in a number, 600 MiB for the whole process, an error in either case."""
    index, extents, _ = one_matrix(rows=3, columns=20)
    claims: dict[str, bytes] = {}
    big = 2**40
    for encoding in ("raw", "zstd"):
        claims[f"{encoding} tensor"] = assemble(
            index_of(tensors=[tensor(encoding=encoding, shape=[big])]), [zstd_frame(big)]
        )
        claims[f"{encoding} stack"] = assemble(
            index_of(tensors=[tensor(encoding=encoding, shape=[big, 2], stack=True)]), [b"ab"]
        )
        claims[f"{encoding} stack without elements"] = assemble(
            index_of(tensors=[tensor(encoding=encoding, shape=[big, 0], stack=True)]), [b""]
        )
    claims["zstd attachment"] = assemble(
        index_of(attachments=[{"bytes": big, "encoding": "zstd", "extent": 0, "name": "a"}]),
        [zstd_frame(big)],
    )
    for shape in ([2**31 - 1, 2**31 - 1], [0, 2**31 - 1], [2**31 - 1, 0], [3, 2**31 - 1]):
        changed = {**index, "tensors": [{**index["tensors"][0], "shape": shape}]}
        claims[f"matrix {shape}"] = assemble(changed, extents)
    claims["extent table"] = assemble(index_of(), [], extent_count=2**24)
    claims["index"] = assemble(index_of(), [], index_length=2**28)
    for number, (what, data) in enumerate(claims.items()):
        (tmp_path / f"{number}.qmoe").write_bytes(data)
        assert code_of(data) in FORMAT_CODES, what
    program = """
import resource, sys
import qmoe_format
resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
for path in sys.argv[1:]:
    try:
        with qmoe_format.open(path) as file:
            for name, entry in file.tensors.items():
                file.read_expert(name, 0) if entry.stack else file.read(name)
            for name in file.attachments:
                file.attachment(name)
        sys.exit(f"{path} was read")
    except qmoe_format.QMoEError as error:
        assert error.code in ("malformed", "limit"), error
"""
    paths = [str(tmp_path / f"{number}.qmoe") for number in range(len(claims))]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, *paths], check=True, env=environment)


def test_not_a_file_of_ours(tmp_path: Path) -> None:
    for name, content, code in (
        ("empty", b"", "truncated"),
        ("beginning", SIGNATURE[:3], "truncated"),
        ("text", b"hello", "signature"),
        ("line ends", SIGNATURE.replace(b"\r\n", b"\n") + bytes(99), "signature"),
        ("seven bits", bytes(byte & 0x7F for byte in SAMPLE), "signature"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(QMoEError) as caught:
            qmoe_format.open(path)
        assert caught.value.code == code, name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QMoEError) as caught:
        qmoe_format.open(tmp_path / "pipe")
    assert caught.value.code == "io"


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.qmoe"
    shutil.copyfile(__file__, path)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(QMoEError, match="check the permissions") as caught:
        qmoe_format.open(path)
    assert caught.value.code == "io"


def zstd_frame(size: int) -> bytes:
    """The header of a frame of this content size and a window of 1 MiB, and one empty block."""
    return b"\x28\xb5\x2f\xfd\xc0\x50" + size.to_bytes(8, "little") + b"\x01\0\0"


def repaired(data: bytearray) -> bytes:
    import zlib

    data[60:64] = zlib.crc32(data[:60]).to_bytes(4, "little")
    return bytes(data)


def assert_sound(data: bytes) -> None:
    """Either read in full, or refused with a code; another exception passes through."""
    code = code_of(data)
    if code is None:
        read_all(data)
    else:
        assert code in FORMAT_CODES
