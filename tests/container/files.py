"""Files for the tests: a small good one, and bad ones put together byte by byte.

``assemble`` is written from SPEC.md and uses nothing of the package, so that a mistake in the
package's idea of the layout cannot hide. Whatever it is given, all checksums are right unless they
are given too: a bad file has exactly the defect that a test put there.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format import QMoEError, QMoEFile, Writer
from qmoe_format.codec import EncodedMatrix, encode_matrix

SIGNATURE = b"\x8fQMOE\r\n\x1a"
PREAMBLE = "<8sHHIIIQQQI8s"


def align(number: int, to: int) -> int:
    return (number + to - 1) // to * to


def padded(data: bytes, to: int) -> bytes:
    return data + bytes(align(len(data), to) - len(data))


def dumps(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def assemble(
    index: Any,
    extents: list[bytes],
    *,
    lengths: list[int] | None = None,
    gap: int = 0,
    record_zero: int = 0,
    after_json: int = 0,
    tail: bytes = b"",
    **preamble: Any,
) -> bytes:
    """A file of these extents and this index (an object, or its very bytes).

    Overrides: what the table says about ``lengths``; ``gap``: the first padding byte after the
    first extent; ``record_zero``: the first record's zero; ``after_json``: the byte after the JSON
    text; ``tail``: bytes after the table; ``preamble`` fields by name.
    """
    body = bytearray()
    for extent in extents:
        body += padded(extent, 64)
    if gap:
        body[len(extents[0])] = gap
    text = index if isinstance(index, bytes) else dumps(index)
    text_padding = bytearray(align(len(text), 8) - len(text))
    if after_json:
        text_padding[0] = after_json
    table = bytearray()
    for number, extent in enumerate(extents):
        length = len(extent) if lengths is None else lengths[number]
        table += struct.pack("<QII", length, zlib.crc32(extent), 0 if number else record_zero)
    index_bytes = text + text_padding + table
    values = {
        "signature": SIGNATURE,
        "major": 0,
        "minor": 2,
        "required_features": 0,
        "optional_features": 0,
        "extent_count": len(extents),
        "file_length": 64 + len(body) + len(index_bytes) + len(tail),
        "index_offset": 64 + len(body),
        "index_length": len(text),
        "index_crc32": zlib.crc32(index_bytes + tail),
        "reserved": bytes(8),
    }
    assert preamble.keys() <= values.keys() | {"preamble_crc32"}
    crc = preamble.pop("preamble_crc32", None)
    values |= preamble
    head = struct.pack(PREAMBLE, *values.values())
    head += struct.pack("<I", zlib.crc32(head) if crc is None else crc)
    return bytes(head + body + index_bytes + tail)


def index_of(**parts: Any) -> dict[str, Any]:
    """An index with these parts, the others empty."""
    return {"attachments": [], "dictionaries": [], "generator": "test", "tensors": []} | parts


def tensor(**keys: Any) -> dict[str, Any]:
    """A raw tensor of two bytes in extent 0, or with other keys."""
    return {
        "dtype": "U8",
        "encoding": "raw",
        "extent": 0,
        "members": "",
        "name": "t",
        "shape": [2],
        "stack": False,
        "transposed": False,
    } | keys


def with_tensor(**keys: Any) -> bytes:
    """A file with one such tensor."""
    return assemble(index_of(tensors=[tensor(**keys)]), [b"ab"])


def take_apart(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Index and extents of a good file; ``assemble`` puts them together again."""
    count, length, offset, text = struct.unpack_from("<IQQQ", data, 20)
    assert length == len(data)
    extents = []
    at = 64
    for size, _, _ in struct.iter_unpack("<QII", data[len(data) - 16 * count :]):
        extents.append(data[at : at + size])
        at = align(at + size, 64)
    return json.loads(data[offset : offset + text]), extents


@contextmanager
def opened(data: bytes) -> Iterator[QMoEFile]:
    """A file of these bytes, open."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.qmoe"
        path.write_bytes(data)
        with QMoEFile(path) as file:
            yield file


def read_all(data: bytes) -> dict[str, npt.NDArray[Any] | bytes]:
    """Open, read everything, verify."""
    with opened(data) as file:
        found: dict[str, npt.NDArray[Any] | bytes] = {}
        for name, entry in file.tensors.items():
            if entry.stack:
                for expert in range(entry.shape[0]):
                    found[f"{name}[{expert}]"] = file.read_expert(name, expert)
            else:
                found[name] = file.read(name)
        for name in file.attachments:
            found[f"/{name}"] = file.attachment(name)
        file.verify()
        return found


def code_of(data: bytes) -> str | None:
    """What is wrong with a file, or None. Another exception than ``QMoEError`` passes through."""
    try:
        with opened(data) as file:
            file.verify()
    except QMoEError as error:
        return error.code
    return None


def code_at_opening(data: bytes) -> str | None:
    """What is found without looking at an extent."""
    try:
        with opened(data):
            pass
    except QMoEError as error:
        return error.code
    return None


def matrix(
    rows: int,
    columns: int,
    *,
    seed: int = 0,
    zeros: float = 0.8,
    values: int = 2,
    columns_scaled: bool = False,
    most: int = 1,
    rows_per_segment: int | None = 1,
    **options: Any,
) -> EncodedMatrix:
    """A random matrix; ``values``: 2 scales a row or 1; ``most``: the largest magnitude."""
    rng = np.random.default_rng(seed)
    other = (1 - zeros) / 2
    levels = rng.choice(np.array([0, 1, -1], np.int8), (rows, columns), p=[zeros, other, other])
    scale = rng.integers(0x3C00, 0x3E00, (rows, values)).astype(np.uint16)
    column = rng.integers(0x3F00, 0x4000, columns).astype(np.uint16) if columns_scaled else None
    if most > 1:
        levels *= rng.integers(1, most, (rows, columns), dtype=np.int8, endpoint=True)
    return encode_matrix(levels, scale, column, rows_per_segment=rows_per_segment, **options)


def sample() -> bytes:
    """A small file with something of everything; about 2 KiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.qmoe"
        with Writer(path) as writer:
            writer.add_attachment("config.json", b'{"model_type":"sample"}' * 5)
            writer.add_attachment("vocab.txt", b"xyz")
            with writer.add_stack(
                "moe.experts.wi", (2, 5, 33), "BF16", "int-dict", transposed=True
            ) as stack:
                for expert in range(2):
                    stack.append(matrix(5, 33, seed=expert, width=8, most=1 + expert))
            writer.add_tensor("norm", np.arange(6, dtype=np.float32), "F32", "raw")
            writer.add_tensor("router", np.arange(200, dtype=np.uint16) // 9, "BF16")
            with writer.add_stack("bias", (3, 4), "I8", "raw", members="e.{}.bias") as stack:
                for expert in range(3):
                    stack.append(np.full(4, expert, np.int8))
        return path.read_bytes()


def one_matrix(
    rows: int = 40, columns: int = 50, **options: Any
) -> tuple[dict[str, Any], list[bytes], EncodedMatrix]:
    """Index and extents of one matrix: itself in 0, its dictionaries in 1 and perhaps 2."""
    value = matrix(rows, columns, width=8, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matrix.qmoe"
        with Writer(path) as writer:
            writer.add_tensor("w", value, "F32", "int-dict")
        return *take_apart(path.read_bytes()), value
