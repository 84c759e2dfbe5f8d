"""A second reader of `.qmoe` files, in plain Python, written from SPEC.md alone.

Read it next to the specification. It exists to disagree with the package where one of the two is
wrong, so it follows SPEC.md section by section, imports nothing from the package, and prefers
clarity to speed. Each ``require`` states what must be true, the requirement that says so, and the
error code of its violation.

    python second_reader.py FILE

prints the contents of a file or of a set of shards as canonical JSON (a sha256 instead of the
bytes), or ``error[CODE]: ...`` and exits with 1. Needs Python 3.11 and, for section 5, zstandard.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard

VERSION = (0, 2)


class Rejected(Exception):
    """An invalid file.

    Attributes:
        requirement: the one that the file violates.
        code: one of section 1.
    """

    def __init__(self, requirement: str, code: str, message: str) -> None:
        super().__init__(message)
        self.requirement = requirement
        self.code = code


def require(condition: bool, requirement: str, code: str, message: str) -> None:
    """Raise ``Rejected`` unless ``condition`` holds."""
    if not condition:
        raise Rejected(requirement, code, message)


# -- Section 1: conventions ------------------------------------------------------------------------


def checked(number: int) -> int:
    # [N-2] Python's integers do not wrap around; this bound is for languages whose integers do.
    require(number < 2**63, "N-2", "limit", f"{number} is beyond 63 bits")
    return number


def align(number: int, unit: int) -> int:
    return checked(-(-number // unit) * unit)


def zero(data: bytes) -> bool:
    return not any(data)


# -- Section 2: the file ---------------------------------------------------------------------------

SIGNATURE = b"\x8fQMOE\r\n\x1a"
PREAMBLE = struct.Struct("<8sHHIIIQQQI8sI")  # [N-1] little-endian throughout


@dataclass(frozen=True, slots=True)
class Extent:
    offset: int
    length: int
    crc32: int


class File:
    """One `.qmoe` file: the constructor opens it, [C-1], and ``contents`` verifies all of it."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("rb")
        try:
            self._open()
        except BaseException:
            self.stream.close()
            raise

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def read(self, offset: int, length: int) -> bytes:
        # [N-3] Only called with ranges inside the file, so these bytes exist.
        self.stream.seek(offset)
        data = self.stream.read(length)
        require(len(data) == length, "P-7", "truncated", "the file has become shorter")
        return data

    def _open(self) -> None:
        real_length = self.stream.seek(0, 2)
        preamble = self.read(0, min(real_length, PREAMBLE.size))

        # 2.1: in this order.
        cut = len(preamble) < 8 and SIGNATURE.startswith(preamble)
        require(not cut, "P-1", "truncated", "the file ends within the signature")
        require(preamble[:8] == SIGNATURE, "P-1", "signature", "this is not a .qmoe file")
        require(len(preamble) == 64, "P-2", "truncated", "the file ends within the preamble")
        (
            _,
            major,
            minor,
            required_features,
            _optional_features,  # [P-5] none is known: ignored
            extent_count,
            file_length,
            index_offset,
            index_length,
            index_crc32,
            reserved,
            preamble_crc32,
        ) = PREAMBLE.unpack(preamble)
        right = zlib.crc32(preamble[:60]) == preamble_crc32
        require(right, "P-3", "checksum", "the preamble is damaged")
        known = (major, minor) == VERSION
        require(known, "P-4", "version", f"version {major}.{minor} is unknown")
        require(required_features == 0, "P-5", "feature", "a required feature is unknown")
        require(zero(reserved), "P-6", "padding", "reserved bytes of the preamble are not zero")
        require(real_length >= file_length, "P-7", "truncated", "the file is too short")
        require(real_length <= file_length, "P-7", "trailing", "the file is too long")
        require(2 <= index_length <= 2**28, "P-8", "limit", f"index_length is {index_length}")
        require(extent_count <= 2**24, "P-8", "limit", f"extent_count is {extent_count}")
        table_offset = checked(index_offset + align(index_length, 8))
        end = checked(table_offset + 16 * extent_count)
        aligned = index_offset % 64 == 0 and index_offset >= 64
        require(aligned, "P-8", "malformed", f"the index begins at {index_offset}")
        require(end == file_length, "P-8", "malformed", f"the parts end at {end}")  # and [F-3]
        tail = self.read(index_offset, file_length - index_offset)
        right = zlib.crc32(tail) == index_crc32
        require(right, "P-9", "checksum", "the index or the extent table is damaged")
        self.identity = preamble_crc32
        self.length = file_length

        text, table = tail[:index_length], tail[table_offset - index_offset :]
        between = tail[index_length : table_offset - index_offset]
        require(zero(between), "F-2", "padding", "after the JSON text")

        # 2.2
        self.extents: list[Extent] = []
        position = 64
        for length, crc32, nothing in struct.iter_unpack("<QII", table):
            require(nothing == 0, "F-4", "padding", "in the extent table")
            offset = align(position, 64)  # [F-1]
            self.extents.append(Extent(offset, length, crc32))
            position = checked(offset + length)
        end = align(position, 64)
        require(end == index_offset, "F-5", "malformed", f"the extents end at {end}")

        self._check_index(Json(text).document())

    def extent(self, number: int) -> bytes:
        place = self.extents[number]
        data = self.read(place.offset, place.length)
        require(zlib.crc32(data) == place.crc32, "F-7", "checksum", f"extent {number} is damaged")
        return data

    def gaps(self) -> Iterator[bytes]:
        for place in self.extents:
            end = place.offset + place.length
            yield self.read(end, align(end, 64) - end)

    # -- Section 3: the index, as parsed by Json below ---------------------------------------------

    def _check_index(self, value: Any) -> None:
        index = record(value, attachments=list, dictionaries=list, generator=str, tensors=list)
        for part in ("attachments", "dictionaries", "tensors"):
            require(len(index[part]) <= 2**20, "L-1", "limit", f"number of {part}")
        self.attachments = [attachment(entry) for entry in index["attachments"]]
        self.dictionaries = [dictionary_entry(entry) for entry in index["dictionaries"]]
        self.tensors = [tensor(entry) for entry in index["tensors"]]
        check_order([entry.name for entry in self.attachments])
        check_order([entry.name for entry in self.tensors])

        # [F-6] Sorted by first extent, each owner begins where the one before it ends.
        owned = [(entry.extent, 1) for entry in self.attachments]
        owned += [(entry.extent, 1) for entry in self.dictionaries]
        owned += [(entry.extent, entry.extent_count) for entry in self.tensors]
        position = 0
        for first, count in sorted(item for item in owned if item[1] > 0):
            require(first == position, "F-6", "malformed", f"owner of extent {position}")
            position = first + count
        right = position == len(self.extents)
        require(right, "F-6", "malformed", f"{position} extents of {len(self.extents)} are owned")

        for entry in self.attachments:
            if entry.encoding == "raw":
                right = self.extents[entry.extent].length == entry.bytes
                require(right, "A-1", "malformed", f"length of {entry.name}")

    # -- Section 11 --------------------------------------------------------------------------------

    def contents(self) -> dict[str, Any]:
        """Verify everything, [C-3]; the file's contents in the form of the manifest."""
        for gap in self.gaps():
            require(zero(gap), "F-2", "padding", "after an extent")
        tables = []
        for d in self.dictionaries:
            tree = decode_bytes(self.extent(d.extent), d.encoding, d.bytes, 1)
            tables.append(dictionary(tree, d))
        attachments = []
        for a in self.attachments:
            data = decode_bytes(self.extent(a.extent), a.encoding, a.bytes, 1)
            attachments.append({"bytes": len(data), "name": a.name, "sha256": sha256(data)})
        tensors = []
        for t in self.tensors:
            entry = {key: getattr(t, key) for key in COMMON if key != "extent"}
            numbers = range(t.extent, t.extent + t.extent_count)
            entry["parts"] = [self._part(self.extent(number), t, tables) for number in numbers]
            tensors.append(entry)
        return {"attachments": attachments, "tensors": tensors}

    def _part(self, data: bytes, t: Tensor, tables: list[Dictionary]) -> dict[str, str]:
        shape = t.shape[1:] if t.stack else t.shape  # [T-1]
        # [T-5] decode_bytes rejects an unknown encoding.
        require(t.dtype in DTYPES, "T-5", "unsupported", f"dtype of {t.name}")
        if t.encoding == "int-dict":
            return decode_int_dict(data, t, shape, tables)
        if t.encoding == "int-group":
            return decode_int_group(data, t, shape)
        return {"sha256": sha256(decode_bytes(data, t.encoding, math.prod(shape), DTYPES[t.dtype]))}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- Section 3: the index --------------------------------------------------------------------------


class Json:
    """A parser for the canonical form only, which spells each value in one way."""

    NUMBER = re.compile(rb"0|[1-9][0-9]{0,15}")

    def __init__(self, text: bytes) -> None:
        allowed = all(0x20 <= byte <= 0x7E and byte != 0x5C for byte in text)
        require(allowed, "J-1", "malformed", "a byte that is not allowed in the index")
        self.text = text
        self.at = 0

    def document(self) -> Any:
        value = self.value(1)
        self.expect(self.at == len(self.text), "the end of the text")
        return value

    def expect(self, condition: bool, what: str) -> None:
        space = self.text[self.at : self.at + 1] == b" "
        require(condition, "J-1" if space else "J-2", "malformed", f"expected {what} at {self.at}")

    def skip(self, token: bytes) -> bool:
        found = self.text.startswith(token, self.at)
        self.at += len(token) if found else 0
        return found

    def value(self, depth: int) -> Any:
        if self.skip(b"{"):
            return self.object(depth)
        if self.skip(b"["):
            return self.array(depth)
        if self.skip(b'"'):
            return self.string()
        if self.skip(b"true"):
            return True
        if self.skip(b"false"):
            return False
        number = self.NUMBER.match(self.text, self.at)
        self.expect(number is not None, "a value")
        assert number is not None
        self.at = number.end()
        small = int(number[0]) < 2**53
        require(small, "J-2", "malformed", f"the number before {self.at} is too large")
        return int(number[0])

    def string(self) -> str:
        end = self.text.find(b'"', self.at)
        self.expect(end >= 0, "the end of a string")
        start, self.at = self.at, end + 1
        return self.text[start:end].decode("ascii")

    def object(self, depth: int) -> dict[str, Any]:
        require(depth <= 8, "L-1", "limit", "nested too deep")
        result: dict[str, Any] = {}
        last = ""
        while not self.skip(b"}"):
            self.expect(not result or self.skip(b","), "a comma")
            self.expect(self.skip(b'"'), "a key")
            key = self.string()
            ascending = not result or last < key
            require(ascending, "J-3", "malformed", f"key {key!r} is out of order")
            self.expect(self.skip(b":"), "a colon")
            result[key] = self.value(depth + 1)
            last = key
        return result

    def array(self, depth: int) -> list[Any]:
        require(depth <= 8, "L-1", "limit", "nested too deep")
        result: list[Any] = []
        while not self.skip(b"]"):
            self.expect(not result or self.skip(b","), "a comma")
            result.append(self.value(depth + 1))
        return result


def record(value: Any, **kinds: type) -> dict[str, Any]:
    # [J-4] type(), not isinstance(): in Python, True is an instance of int.
    found = {key: type(item) for key, item in value.items()} if type(value) is dict else None
    require(found == kinds, "J-4", "malformed", f"wrong keys or types: expected {sorted(kinds)}")
    assert isinstance(value, dict)
    return value


def check_order(names: list[str]) -> None:
    # [J-5]
    for before, after in pairwise(names):
        require(before != after, "J-5", "duplicate", f"two are named {after}")
        require(before < after, "J-5", "malformed", f"{after} is out of order")


def check_name(name: str) -> None:
    right = 1 <= len(name) <= 512 and " " not in name
    require(right, "J-6", "malformed", f"name {name[:40]!r}")


def check_file_name(name: str) -> None:
    right = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", name) is not None
    require(right, "J-6", "malformed", f"file name {name[:40]!r}")


# 3.1


@dataclass(frozen=True, slots=True)
class Attachment:
    bytes: int
    encoding: str
    extent: int
    name: str


def attachment(value: Any) -> Attachment:
    entry = Attachment(**record(value, bytes=int, encoding=str, extent=int, name=str))
    check_file_name(entry.name)
    return entry


# 3.2


@dataclass(frozen=True, slots=True)
class DictionaryEntry:
    bytes: int
    encoding: str
    extent: int
    max_length: int
    max_ones: int
    width: int


def dictionary_entry(value: Any) -> DictionaryEntry:
    keys = record(
        value, bytes=int, encoding=str, extent=int, max_length=int, max_ones=int, width=int
    )
    entry = DictionaryEntry(**keys)
    # [D-1], [L-1]
    require(1 <= entry.bytes <= 2**14, "D-1", "limit", f"a tree of {entry.bytes} bytes")
    require(8 <= entry.width <= 16, "D-1", "limit", f"width {entry.width}")
    require(1 <= entry.max_length <= 255, "D-1", "limit", f"max_length {entry.max_length}")
    require(entry.max_ones <= 16, "D-1", "limit", f"max_ones {entry.max_ones}")
    return entry


# 3.3

DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
COMMON = {
    "dtype": str,
    "encoding": str,
    "extent": int,
    "members": str,
    "name": str,
    "shape": list,
    "stack": bool,
    "transposed": bool,
}
FURTHER: dict[str, dict[str, type]] = {
    "raw": {},
    "zstd": {},
    "int-dict": {"column_scale": bool, "rows_per_segment": int, "symmetric": bool},
    "int-group": {"bits": int, "grid": str, "zero_points": bool},
}


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    encoding: str
    extent: int
    members: str
    name: str
    shape: list[int]
    stack: bool
    transposed: bool
    keys: dict[str, Any]

    @property
    def extent_count(self) -> int:
        return self.shape[0] if self.stack else 1  # [T-1]


def tensor(value: Any) -> Tensor:
    common = value
    if type(value) is dict:
        common = {key: item for key, item in value.items() if key in COMMON}
    record(common, **COMMON)
    further = FURTHER.get(common["encoding"])
    if further is not None:  # [J-4] an unknown encoding may have other keys
        record(value, **COMMON, **further)
    t = Tensor(**common, keys={key: value[key] for key in further or {}})

    check_name(t.name)
    numbers = all(type(n) is int for n in t.shape)
    require(numbers, "J-4", "malformed", f"shape of {t.name}")
    require(len(t.shape) <= 8, "L-1", "limit", f"dimensions of {t.name}")
    require(all(n <= 2**40 for n in t.shape), "L-1", "limit", f"a dimension of {t.name}")
    size = math.prod(n for n in t.shape if n) * DTYPES.get(t.dtype, 1)
    require(size < 2**53, "L-1", "limit", f"size of {t.name}")
    require(t.shape != [] or not t.stack, "T-1", "malformed", f"shape of stack {t.name}")
    right = t.extent_count > 0 or t.extent == 0
    require(right, "T-1", "malformed", f"extent of {t.name}, an empty stack")
    require(t.stack or t.members == "", "T-2", "malformed", f"{t.name} has members")
    right = t.members == "" or t.members.count("{}") == 1
    require(right, "T-2", "malformed", f"members of {t.name}")
    right = not t.transposed or (t.stack and len(t.shape) >= 3)
    require(right, "T-3", "malformed", f"{t.name} cannot be transposed")

    if t.encoding in ("int-dict", "int-group"):
        right = t.dtype in ("BF16", "F16", "F32", "F64") or t.dtype not in DTYPES
        require(right, "E-2", "malformed", f"dtype of {t.name}")
        right = len(t.shape) == (3 if t.stack else 2)
        require(right, "E-2", "malformed", f"dimensions of {t.name}")
        small = all(n < 2**31 for n in t.shape[-2:])
        require(small, "L-1", "limit", f"rows or columns of {t.name}")
    if t.encoding == "int-dict":
        right = 0 < t.keys["rows_per_segment"] < 2**31
        require(right, "L-1", "limit", f"rows_per_segment of {t.name}")
    if t.encoding == "int-group":
        require(t.keys["bits"] in (2, 3, 4, 8), "G-1", "malformed", f"bits of {t.name}")
        require(t.keys["grid"] in ("linear", "log"), "G-1", "malformed", f"grid of {t.name}")
        right = t.keys["grid"] == "linear" or not t.keys["zero_points"]
        require(right, "G-1", "malformed", f"{t.name} has zero points on a log grid")
    return t


# -- Sections 4 and 5: raw and zstd ----------------------------------------------------------------


def decode_bytes(data: bytes, encoding: str, elements: int, size: int) -> bytes:
    """The bytes of a tensor; with size 1, those of an attachment or a tree."""
    require(encoding in ("raw", "zstd"), "T-5", "unsupported", f"encoding {encoding!r}")
    if encoding == "raw":
        require(len(data) == elements * size, "R-1", "malformed", "length of a raw extent")
        return data
    shuffled = decompress(data, elements * size)
    result = bytearray(len(shuffled))
    for b in range(size):  # [Z-1]
        result[b::size] = shuffled[b * elements : (b + 1) * elements]
    return bytes(result)


class Frame:
    """The header of a Zstandard frame, RFC 8878 section 3.1.1.1."""

    def __init__(self, frame: bytes) -> None:
        require(frame[:4] == b"\x28\xb5\x2f\xfd", "Z-2", "malformed", "not a Zstandard frame")
        self.position = 4
        flags = self.integer(frame, 1)
        single_segment = bool(flags & 0x20)
        self.has_checksum = bool(flags & 0x04)
        window = 0 if single_segment else self.integer(frame, 1)
        self.dictionary = self.integer(frame, (0, 1, 2, 4)[flags & 3])
        size_bytes = (1 if single_segment else 0, 2, 4, 8)[flags >> 6]
        self.content_size = self.integer(frame, size_bytes) + (256 if size_bytes == 2 else 0)
        self.has_content_size = size_bytes > 0
        base = 2 ** (10 + (window >> 3))
        self.window = self.content_size if single_segment else base + base // 8 * (window & 7)

    def integer(self, frame: bytes, size: int) -> int:
        data = frame[self.position : self.position + size]
        require(len(data) == size, "Z-4", "malformed", "the frame ends within its header")
        self.position += size
        return int.from_bytes(data, "little")


def decompress(data: bytes, size: int) -> bytes:
    frame = Frame(data)
    require(frame.dictionary == 0, "Z-2", "malformed", "the frame needs a dictionary")
    require(frame.has_content_size, "Z-2", "malformed", "the frame has no content size")
    require(frame.content_size == size, "Z-2", "malformed", "the frame's content size is wrong")
    # [Z-3] after [Z-2], before memory is allocated
    require(frame.window <= 2**27, "Z-3", "limit", "the frame's window is too large")
    require(size <= 1024 * len(data) + 2**20, "Z-3", "limit", "the frame expands too much")
    # The blocks (3.1.1.2) end where the frame does; a library decodes each.
    decoder = zstandard.ZstdDecompressor().decompressobj()
    position = frame.position
    last = False
    try:
        result = decoder.decompress(data[:position])
        while not last and position < len(data):
            header = int.from_bytes(data[position : position + 3], "little")
            last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
            end = position + 3 + (1 if kind == 1 else length)  # kind 1 repeats a single byte
            end += 4 if last and frame.has_checksum else 0
            result += decoder.decompress(data[position:end])
            require(len(result) <= size, "Z-4", "malformed", "the frame has more content")
            position = end
    except zstandard.ZstdError as error:
        raise Rejected("Z-4", "malformed", str(error)) from None
    require(position >= len(data), "Z-2", "malformed", "there are bytes after the frame")
    right = decoder.eof and len(result) == size
    require(right, "Z-4", "malformed", "the frame is cut off")
    return result


# -- Section 6: dictionaries -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dictionary:
    width: int
    entries: list[tuple[int, ...]]  # of each codeword


def dictionary(tree: bytes, stated: DictionaryEntry) -> Dictionary:
    # [D-3] first: the whole tree is walked before anything is compared with the index.
    entries: list[tuple[int, ...]] = []
    path: list[int] = []  # from the root to the next node
    position = 0
    while True:
        require(position < 8 * len(tree), "D-2", "malformed", "the tree is cut off")
        inner = tree[position // 8] >> position % 8 & 1
        position += 1
        if inner:
            path.append(0)
            require(len(path) <= 255, "D-3", "limit", "an entry is too long")
            continue
        require(path != [], "D-3", "malformed", "the tree is a single leaf")
        entries.append(tuple(path))  # [D-4]
        while path and path[-1] == 1:  # back to the last node whose second child comes next
            path.pop()
        if not path:
            break
        path[-1] = 1
        require(sum(path) <= 16, "D-3", "limit", "an entry has too many ones")
    right = len(entries) == 2**stated.width
    require(right, "D-4", "malformed", f"the tree has {len(entries)} leaves")
    rest = int.from_bytes(tree, "little") >> position
    require(8 * len(tree) - position < 8, "D-2", "malformed", "there are bytes after the tree")
    require(rest == 0, "D-2", "padding", "bits after the tree")
    right = max(len(entry) for entry in entries) == stated.max_length
    require(right, "D-1", "malformed", "max_length is wrong")
    right = max(sum(entry) for entry in entries) == stated.max_ones
    require(right, "D-1", "malformed", "max_ones is wrong")
    return Dictionary(stated.width, entries)


# -- Section 7: int-dict ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """32 bytes that describe the mask or the refinement."""

    dictionary: int
    length_base: int
    length_width: int
    refined: int
    zero: bytes
    ones: int
    segment_bytes: int


HEADER = struct.Struct("<IIBB6sQQ")


def sections(
    data: bytes, position: int, sizes: list[int], guard: int, length_rule: str, zero_rule: str
) -> list[bytes]:
    """Cut an extent into sections of ``sizes``, each from a multiple of 16 on."""
    places = []
    gaps = []
    for size in sizes:
        start = align(position, 16)
        gaps.append((position, start))
        position = checked(start + size)
        places.append((start, position))
    end = align(position + guard, 16)
    gaps.append((position, end))
    require(len(data) == end, length_rule, "malformed", f"the extent must have {end} bytes")
    right = all(zero(data[a:b]) for a, b in gaps)
    require(right, zero_rule, "padding", "between sections or at the end of an extent")
    return [data[a:b] for a, b in places]


def decode_int_dict(
    data: bytes, t: Tensor, shape: Sequence[int], tables: list[Dictionary]
) -> dict[str, str]:
    rows, columns = shape
    together = t.keys["rows_per_segment"]
    count = -(-rows // together)  # [E-3]
    symmetric, with_columns = t.keys["symmetric"], t.keys["column_scale"]

    # 7.1: [E-4] in its order
    require(len(data) >= 32, "E-4", "malformed", "the extent ends within its header")
    refined = data[9]
    require(refined <= 1, "E-4", "malformed", f"refined is {refined}")
    headers = [Header(*HEADER.unpack_from(data))]
    if refined:
        require(len(data) >= 64, "E-4", "malformed", "the extent ends within its second header")
        headers.append(Header(*HEADER.unpack_from(data, 32)))
    for header in headers:
        require(header.segment_bytes < 2**32, "E-4", "limit", "segment_bytes")
    for header in headers:
        right = header.length_width in (1, 2, 4)
        require(right, "E-4", "malformed", f"length_width {header.length_width}")
    right = not refined or headers[1].refined == 0
    require(right, "E-4", "malformed", "the refinement is refined")
    sizes = [rows * (1 if symmetric else 2) * 2, columns * 2 if with_columns else 0]
    for header in headers:
        sizes += [-(-count // 32) * 4, count * header.length_width, header.segment_bytes]
    row_bytes, column_bytes, *parts = sections(data, 32 * len(headers), sizes, 8, "E-4", "E-5")
    right = all(zero(header.zero) for header in headers)
    require(right, "E-5", "padding", "in a header")

    row_scales = scales(row_bytes)
    column_scales = scales(column_bytes)
    finite = all(map(math.isfinite, row_scales)) and all(map(math.isfinite, column_scales))
    require(finite, "E-8", "value", "a scale is not finite")

    strings = []
    for header in headers:
        number = header.dictionary
        require(number < len(tables), "E-1", "malformed", f"dictionary {number} does not exist")
        segments = segments_of(header, count, parts[:3])
        strings.append([(segment, tables[number]) for segment in segments])
        del parts[:3]

    # 7.2, 7.3
    values = hashlib.sha256()
    all_levels = hashlib.sha256()
    ones = [0] * len(headers)
    for number, encoded in enumerate(zip(*strings, strict=True)):
        first = number * together
        levels = decode_segment(encoded, (min(first + together, rows) - first) * columns)
        magnitudes = [abs(level) for level in levels if level]
        ones[0] += len(magnitudes)
        ones[-1] += sum(magnitudes) - len(magnitudes)  # in a ternary matrix, 0
        all_levels.update(struct.pack(f"{len(levels)}b", *levels))
        for place, level in enumerate(levels):
            row, column = first + place // columns, place % columns
            high = row_scales[row if symmetric else 2 * row + 1]
            low = -high if symmetric else row_scales[2 * row]  # [V-1]
            value = rounded(level * high if level > 0 else -level * low if level else 0.0, "<f")
            if with_columns and level:
                # [V-2] The product is exact in binary64: one rounding, to binary32.
                value = rounded(value * column_scales[column], "<f")
            values.update(element(value, t.dtype))
    right = ones == [header.ones for header in headers]
    require(right, "E-14", "malformed", f"the ones are {ones}")
    right = not refined or ones[1] > 0
    require(right, "E-16", "malformed", "a refined matrix is ternary")
    return {"sha256": values.hexdigest(), "levels": all_levels.hexdigest()}


def segments_of(header: Header, count: int, parts: list[bytes]) -> list[bytes]:
    """The segments of a string, from its sections block offsets, lengths and segments."""
    offsets = [n for (n,) in struct.iter_unpack("<I", parts[0])]
    width = header.length_width
    numbers = range(0, len(parts[1]), width)
    lengths = [int.from_bytes(parts[1][i : i + width], "little") for i in numbers]
    right = sum(lengths) + count * header.length_base == header.segment_bytes
    require(right, "E-6", "malformed", "the lengths do not add up to segment_bytes")
    # [E-9] If the least of the stored lengths is 0, length_base is the least length.
    right = min(lengths) == 0 if count else header.length_base == 0
    require(right, "E-9", "malformed", "length_base is not the least length")
    least = next(size for size in (1, 2, 4) if max(lengths, default=0) < 256**size)
    require(width == least, "E-9", "malformed", "length_width is not the least")
    segments = []
    position = 0
    for number, length in enumerate(lengths):
        if number % 32 == 0:
            right = offsets[number // 32] == position
            require(right, "E-6", "malformed", f"offset of block {number // 32}")
        end = position + header.length_base + length
        segments.append(parts[2][position:end])
        position = end
    return segments


def decode_segment(encoded: Sequence[tuple[bytes, Dictionary]], weights: int) -> list[int]:
    """The levels of a segment, from its mask and, in a refined matrix, its refinement."""
    mask, table = encoded[0]
    enough = len(mask) >= -(-table.width * -(-weights // 255) // 8)
    require(enough, "E-7", "malformed", "a segment is too short for its weights")
    string, left = decode_string(mask, table, weights, True)
    nonzeros = sum(string)
    check_rest(mask, left, nonzeros)
    magnitudes = [1] * nonzeros
    if len(encoded) == 2:
        unary, left = decode_string(*encoded[1], nonzeros, False)
        check_rest(encoded[1][0], left, 0)
        magnitudes = []
        magnitude = 1
        for bit in unary:
            magnitude += 1
            if bit:
                require(magnitude <= 127, "E-15", "limit", "a level beyond -127 to 127")
            else:
                magnitudes.append(magnitude - 1)
                magnitude = 1
    signs = int.from_bytes(mask, "little")
    # [E-12]
    signed = iter([m * (1 - 2 * (signs >> k & 1)) for k, m in enumerate(magnitudes)])
    return [next(signed) if bit else 0 for bit in string]


def decode_string(
    segment: bytes, table: Dictionary, count: int, is_mask: bool
) -> tuple[list[int], int]:
    """A mask of ``count`` bits or a refinement of ``count`` zeros; bits below its codewords."""
    s, left = int.from_bytes(segment, "little"), 8 * len(segment)
    string: list[int] = []
    while count > 0:  # [E-10]
        left -= table.width
        require(left >= 0, "E-13", "malformed", "a segment has too few codewords")
        for bit in table.entries[s >> left & (2**table.width - 1)]:
            require(count > 0 or bit == 0, "E-11", "malformed", "a one beyond the end")
            if count > 0:
                string.append(bit)
                count -= is_mask or bit == 0
    return string, left


def check_rest(segment: bytes, left: int, signs: int) -> None:
    """[E-13]: of the ``left`` bits below the codewords, the lowest are ``signs`` signs."""
    s, middle = int.from_bytes(segment, "little"), left - signs
    require(middle >= 0, "E-13", "malformed", "codewords and signs overlap")
    require(middle < 8, "E-13", "malformed", "a segment is longer than necessary")
    require(s >> signs & (2**middle - 1) == 0, "E-13", "padding", "above the signs")


# 7.3. All values are Python floats: binary64, which represents every binary32 number exactly.


def scales(data: bytes) -> list[float]:
    halves = struct.iter_unpack("<H", data)
    return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for (half,) in halves]


def rounded(value: float, form: str) -> float:
    """Round to the format ``<f`` or ``<e``, ties to even; infinite beyond its range."""
    try:
        (result,) = struct.unpack(form, struct.pack(form, value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return float(result)


def element(value: float, dtype: str) -> bytes:
    # [V-3]
    if dtype == "BF16":
        bits = int.from_bytes(struct.pack("<f", value), "little")
        bits += 0x7FFF + (bits >> 16 & 1)  # up from half a unit; at a tie, only if odd
        return struct.pack("<H", bits >> 16)
    form = {"F16": "<e", "F32": "<f", "F64": "<d"}[dtype]
    return struct.pack(form, rounded(value, form))


# -- Section 8: int-group --------------------------------------------------------------------------


def decode_int_group(data: bytes, t: Tensor, shape: Sequence[int]) -> dict[str, str]:
    rows, columns = shape
    b = t.keys["bits"]
    require(len(data) >= 16, "G-3", "malformed", "the extent ends within its 16 bytes")
    group_size = int.from_bytes(data[:4], "little")
    require(group_size in (0, 32, 64, 128), "G-3", "malformed", f"group_size {group_size}")
    groups = -(-columns // group_size) if group_size else 1  # [G-2]
    row_bytes = align(-(-columns * b // 8), 16)
    points = rows * groups if t.keys["zero_points"] else 0
    sizes = [rows * groups * 2, points, rows * row_bytes]
    scale_bytes, zero_points, packed = sections(data, 16, sizes, 0, "G-3", "G-4")
    require(zero(data[4:16]), "G-4", "padding", "in a header")
    all_scales = scales(scale_bytes)
    require(all(map(math.isfinite, all_scales)), "G-5", "value", "a scale is not finite")
    right = all(point < 2**b for point in zero_points)
    require(right, "G-5", "malformed", "a zero point is too great")

    values = hashlib.sha256()
    codes = hashlib.sha256()
    half = 2 ** (b - 1)
    for start in range(0, len(packed), row_bytes or 1):
        row = int.from_bytes(packed[start : start + row_bytes], "little")
        require(row >> columns * b == 0, "G-4", "padding", "after the last weight of a row")
        for column in range(columns):
            group = start // row_bytes * groups + (column // group_size if group_size else 0)
            scale, u = all_scales[group], row >> column * b & (2**b - 1)
            codes.update(bytes([u]))
            if t.keys["grid"] == "log":  # [G-7] exact in binary64, like (u - z) x scale
                value = scale * 2.0**-u if u < half else -(scale * 2.0 ** (half - u))
            else:
                z = zero_points[group] if zero_points else half
                value = (u - z) * scale if u != z else 0.0  # [G-6]
            values.update(element(rounded(value, "<f"), t.dtype))  # [G-8]
    return {"sha256": values.hexdigest(), "levels": codes.hexdigest()}


# -- Section 9: shards -----------------------------------------------------------------------------

SHARDS = b'{"format":"qmoe-shards"'


def shard_set(path: Path) -> list[Path]:
    """Open a set, [C-1]; the paths of its files."""
    require(path.stat().st_size <= 2**28, "L-1", "limit", "length of the text")
    value = Json(path.read_bytes()).document()
    # [S-1] The version goes before the other keys.
    version = value.get("version") if type(value) is dict else None
    pair = type(version) is list and [type(number) for number in version] == [int, int]
    require(pair, "J-4", "malformed", "version is not a pair of integers")
    require(version == list(VERSION), "S-1", "version", f"version {version} is unknown")
    index = record(value, format=str, shards=list, version=list)
    require(len(index["shards"]) <= 2**20, "L-1", "limit", "number of shards")
    paths: list[Path] = []
    for value in index["shards"]:
        shard = record(value, bytes=int, file=str, preamble_crc32=int)
        check_file_name(shard["file"])
        paths.append(path.parent / shard["file"])
        right = paths[-1].is_file() and os.access(paths[-1], os.R_OK)
        require(right, "S-2", "truncated", f"{shard['file']} cannot be opened as a file")
        with paths[-1].open("rb") as stream:
            preamble = stream.read(64)
            crc32 = int.from_bytes(preamble[60:], "little") if len(preamble) == 64 else 0
            right = stream.seek(0, 2) == shard["bytes"]
        require(right, "S-2", "checksum", f"{shard['file']} has another length")
        right = crc32 == shard["preamble_crc32"]
        require(right, "S-2", "checksum", f"{shard['file']} has another preamble_crc32")
    require(len(set(paths)) == len(paths), "S-3", "duplicate", "a shard is listed twice")
    names: dict[str, set[str]] = {"attachments": set(), "tensors": set()}
    for shard_path in paths:
        with File(shard_path) as file:
            for part, entries in (("attachments", file.attachments), ("tensors", file.tensors)):
                for entry in entries:
                    new = entry.name not in names[part]
                    require(new, "S-3", "duplicate", f"{entry.name} is in two shards")
                    names[part].add(entry.name)
    return paths


def opened(path: Path) -> list[Path]:
    """Open a file or a set of shards, [C-1]; the paths of its files."""
    with path.open("rb") as stream:
        is_set = stream.read(len(SHARDS)) == SHARDS  # [S-1]
    if is_set:
        return shard_set(path)
    with File(path):
        return [path]


def contents(path: Path) -> dict[str, Any]:
    """Open and verify a file or a set of shards; its contents in the form of the manifest."""
    result: dict[str, Any] = {"attachments": [], "tensors": []}
    for one in opened(path):
        with File(one) as file:
            found = file.contents()
        for part, entries in result.items():
            entries += found[part]
    for entries in result.values():
        entries.sort(key=lambda entry: entry["name"])
    return result


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: second_reader.py FILE", file=sys.stderr)
        return 2
    try:
        found = contents(Path(arguments[0]))
    except Rejected as error:
        print(
            f"error[{error.code}]: {arguments[0]}: [{error.requirement}] {error}", file=sys.stderr
        )
        return 1
    print(json.dumps(found, sort_keys=True, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
