"""A byte-level writer of `.qmoe` files that can also write defective ones.

It shares no code with the package or the second reader: both are compared with it. Every defect is
asked for by name, and everything else (lengths, checksums, padding) is made right around it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tools.conformance_vectors.exact_numbers import FORMATS, SIZES, nearest
from tools.conformance_vectors.int_dict_builder import Book, Matrix, patched
from tools.conformance_vectors.int_group_builder import Groups

SIGNATURE = b"\x8fQMOE\r\n\x1a"


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def padded(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- The file --------------------------------------------------------------------------------------


def pack(
    text: bytes,
    extents: Sequence[bytes],
    *,
    records: Mapping[int, Mapping[str, int]] | None = None,
    patches: Mapping[int, int] | None = None,
    hole: int = 0,
    **fields: Any,
) -> bytes:
    """A file.

    Args:
        text: the index.
        extents: their contents.
        records: replace fields of the extent table, by the extent's number.
        patches: bytes that are changed before the checksums are computed, by offset.
        hole: the number of zero bytes before the index.
        fields: replace those of the preamble.
    """
    body = b""
    table = b""
    for number, extent in enumerate(extents):
        record = {"length": len(extent), "crc32": zlib.crc32(extent), "zero": 0}
        record |= (records or {}).get(number, {})
        table += struct.pack("<QII", record["length"], record["crc32"], record["zero"])
        body += padded(extent, 64)
    index_offset = 64 + len(body) + hole
    body = bytes(64) + body + bytes(hole) + padded(text, 8) + table
    body = patched(body, patches or {})
    fields = {
        "signature": SIGNATURE,
        "major": 0,
        "minor": 2,
        "required_features": 0,
        "optional_features": 0,
        "extent_count": len(extents),
        "file_length": len(body),
        "index_offset": index_offset,
        "index_length": len(text),
        "index_crc32": zlib.crc32(body[index_offset:]),
        "reserved": bytes(8),
    } | fields
    crc32 = fields.pop("preamble_crc32", None)
    preamble = struct.pack("<8sHHIIIQQQI8s", *fields.values())
    crc32 = zlib.crc32(preamble) if crc32 is None else crc32
    return preamble + struct.pack("<I", crc32) + body[64:]


class Content:
    """The contents of a file, and what a reader has to find in it. Methods return the object."""

    def __init__(self) -> None:
        self.index: dict[str, Any] = {"attachments": [], "dictionaries": [], "tensors": []}
        self.index["generator"] = "qmoe vectors"
        self.extents: list[bytes] = []
        self.books: list[Book] = []
        self.expected: dict[str, Any] = {"attachments": [], "tensors": []}

    def attach(
        self, name: str, data: bytes, stored: bytes | None = None, encoding: str = "raw"
    ) -> Self:
        """``stored`` is the extent, if it is not ``data`` itself."""
        entry = {"bytes": len(data), "encoding": encoding, "extent": len(self.extents)}
        self.index["attachments"].append(entry | {"name": name})
        expected = {"bytes": len(data), "name": name, "sha256": sha256(data)}
        self.expected["attachments"].append(expected)
        return self.extent(data if stored is None else stored)

    def dictionary(self, book: Book, stored: bytes | None = None, **keys: Any) -> Self:
        """``keys`` replace those of the index entry."""
        entry = {"bytes": len(book.tree), "encoding": "raw", "extent": len(self.extents)}
        entry |= {"max_length": book.max_length, "max_ones": book.max_ones, "width": book.width}
        self.index["dictionaries"].append(entry | keys)
        self.books.append(book)
        return self.extent(book.tree if stored is None else stored)

    def tensor(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        *parts: bytes,
        stored: Sequence[bytes] | None = None,
        encoding: str = "raw",
        stack: bool = False,
        members: str = "",
        transposed: bool = False,
        **keys: Any,
    ) -> Self:
        """``parts`` are the decoded bytes, ``stored`` the extents if they are not the same;
        ``keys`` are added to the index entry or replace the computed ones."""
        entry = {"dtype": dtype, "encoding": encoding, "shape": list(shape), "stack": stack}
        entry |= {"members": members, "name": name, "transposed": transposed}
        first = len(self.extents) if parts else 0
        self.index["tensors"].append(entry | {"extent": first} | keys)
        found = [{"sha256": sha256(part)} for part in parts]
        self.expected["tensors"].append(entry | {"parts": found})
        return self.extent(*(parts if stored is None else stored))

    def int_dict(
        self,
        name: str,
        dtype: str,
        *matrices: Matrix,
        dictionaries: Sequence[Sequence[int]] = ((0, -1),),
        defects: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Matrices, a stack unless there is one; ``options`` are those of ``tensor``.

        ``dictionaries`` are used in turn, each a pair for mask and refinement; ``defects`` go to
        the last matrix's extent.
        """
        stored = []
        for number, matrix in enumerate(matrices):
            pair = [n % len(self.books) for n in dictionaries[number % len(dictionaries)]]
            last = number == len(matrices) - 1
            stored.append(matrix.extent(self.books, pair, **(defects or {} if last else {})))
        first = matrices[0] if matrices else Matrix([], [])
        return self._matrices(name, dtype, "int-dict", first, matrices, stored, options)

    def int_group(
        self,
        name: str,
        dtype: str,
        *matrices: Groups,
        defects: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """As ``int_dict``."""
        stored = [matrix.extent() for matrix in matrices]
        if defects:
            stored[-1] = matrices[-1].extent(**defects)
        first = matrices[0] if matrices else Groups([], [], 4)
        return self._matrices(name, dtype, "int-group", first, matrices, stored, options)

    def _matrices(
        self,
        name: str,
        dtype: str,
        encoding: str,
        first: Matrix | Groups,
        matrices: Sequence[Matrix | Groups],
        stored: Sequence[bytes],
        options: dict[str, Any],
    ) -> Self:
        stack = options.pop("stack", len(matrices) != 1)
        own = first.shape
        shape = options.pop("shape", (len(matrices), *own) if stack else own)
        parts = [elements(matrix, dtype) for matrix in matrices]
        keys = {"encoding": encoding, "stack": stack, "stored": stored, **first.keys, **options}
        self.tensor(name, dtype, shape, *parts, **keys)
        found = self.expected["tensors"][-1]["parts"]
        for part, matrix in zip(found, matrices, strict=True):
            part["levels"] = sha256(matrix.plain)
        return self

    def extent(self, *data: bytes) -> Self:
        """Append extents."""
        self.extents += data
        return self

    def change(self, part: str = "tensors", number: int = -1, /, **keys: Any) -> Self:
        """Change an entry of the index, by default that of the last tensor."""
        self.index[part][number].update(keys)
        return self

    def pack(self, **defects: Any) -> bytes:
        """The file; ``defects`` are those of ``pack``, and ``text`` replaces the index."""
        return pack(defects.pop("text", None) or canonical(self.index), self.extents, **defects)


def elements(matrix: Matrix | Groups, dtype: str) -> bytes:
    """[V-3], [G-8]"""
    if dtype not in FORMATS:  # a vector with a wrong dtype, rejected before it is decoded
        return b""
    rows, columns = matrix.shape
    return b"".join(
        nearest(matrix.value(row, column), dtype).to_bytes(SIZES[dtype], "little")
        for row in range(rows)
        for column in range(columns)
    )


# -- Zstandard frames without a compressor, so that the bytes do not depend on its version ---------


def shuffled(data: bytes, size: int) -> bytes:
    return b"".join(data[b::size] for b in range(size))


def raw_block(data: bytes, last: bool = True, kind: int = 0) -> bytes:
    return (len(data) << 3 | kind << 1 | last).to_bytes(3, "little") + data


def run_block(byte: int, length: int, last: bool = True) -> bytes:
    return (length << 3 | 2 | last).to_bytes(3, "little") + bytes([byte])


def frame(
    content: bytes,
    *,
    size_bytes: int = 4,
    window: int | None = None,
    size: int | None = None,
    dictionary: int | None = None,
    flags: int = 0,
    blocks: bytes | None = None,
) -> bytes:
    """``window`` is the byte of the window descriptor; without one it is a single segment."""
    flags |= {0: 0, 1: 0, 2: 0x40, 4: 0x80, 8: 0xC0}[size_bytes]
    flags |= (0x20 if window is None else 0) | (dictionary is not None)
    size = (len(content) if size is None else size) - (256 if size_bytes == 2 else 0)
    optional = [byte for byte in (window, dictionary) if byte is not None]
    header = b"\x28\xb5\x2f\xfd" + bytes([flags, *optional])
    header += size.to_bytes(size_bytes, "little") if size_bytes else b""
    return header + (raw_block(content) if blocks is None else blocks)
