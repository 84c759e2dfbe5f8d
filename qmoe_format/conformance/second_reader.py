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
import re
import struct
import sys
import zlib
from bisect import bisect_right
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

    # -- Section 10 --------------------------------------------------------------------------------

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
            return decode_ternary(data, t, shape, tables)
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
    check_name(name)
    right = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is not None
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
    max_nonzeros: int
    signs: str
    width: int


def dictionary_entry(value: Any) -> DictionaryEntry:
    keys = record(
        value,
        bytes=int,
        encoding=str,
        extent=int,
        max_length=int,
        max_nonzeros=int,
        signs=str,
        width=int,
    )
    entry = DictionaryEntry(**keys)
    # [D-1], [L-1]
    require(1 <= entry.bytes <= 2**14, "D-1", "limit", f"a tree of {entry.bytes} bytes")
    require(8 <= entry.width <= 16, "D-1", "limit", f"width {entry.width}")
    require(entry.signs in ("plane", "codeword"), "D-1", "malformed", f"signs {entry.signs!r}")
    require(1 <= entry.max_length <= 255, "D-1", "limit", f"max_length {entry.max_length}")
    require(entry.max_nonzeros <= 16, "D-1", "limit", f"max_nonzeros {entry.max_nonzeros}")
    return entry


# 3.3

DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
ENCODINGS = ("raw", "zstd", "int-dict")
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
TERNARY = {  # section 7
    "column_scale": bool,
    "group_size": int,
    "rows_per_segment": int,
    "scale_dtype": str,
    "signs": str,
    "symmetric": bool,
    "width": int,
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
    encoding = value.get("encoding") if type(value) is dict else None
    ternary = TERNARY if encoding == "int-dict" else {}
    if encoding in ENCODINGS:
        record(value, **COMMON, **ternary)
        common = {key: value[key] for key in COMMON}
    else:  # [J-4] an unknown encoding may have other keys, too
        common = {key: item for key, item in value.items() if key in COMMON} if encoding else value
        record(common, **COMMON)
    t = Tensor(**common, keys={key: value[key] for key in ternary})

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

    if t.encoding == "int-dict":
        require(8 <= t.keys["width"] <= 16, "L-1", "limit", f"width of {t.name}")
        require(t.keys["group_size"] < 2**31, "L-1", "limit", f"group_size of {t.name}")
        right = 0 < t.keys["rows_per_segment"] < 2**31
        require(right, "L-1", "limit", f"rows_per_segment of {t.name}")
        right = t.keys["signs"] in ("plane", "codeword")
        require(right, "J-4", "malformed", f"signs of {t.name}")
        right = t.keys["scale_dtype"] in ("BF16", "F16", "F32")
        require(right, "J-4", "malformed", f"scale_dtype of {t.name}")
        right = t.dtype in ("BF16", "F16", "F32", "F64") or t.dtype not in DTYPES
        require(right, "E-2", "malformed", f"dtype of {t.name}")
        right = len(t.shape) == (3 if t.stack else 2)
        require(right, "E-2", "malformed", f"dimensions of {t.name}")
        small = all(n < 2**31 for n in t.shape[-2:])
        require(small, "L-1", "limit", f"rows or columns of {t.name}")
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
    # [Z-3] before memory is allocated
    require(frame.window <= 2**27, "Z-3", "limit", "the frame's window is too large")
    require(size <= 1024 * len(data) + 2**20, "Z-3", "limit", "the frame expands too much")
    # Walk the blocks only to find the end of the frame (3.1.1.2); a library decodes them.
    position = frame.position
    last = False
    while not last and position < len(data):
        header = int.from_bytes(data[position : position + 3], "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == 1 else length)  # kind 1 repeats a single byte
    position += 4 if frame.has_checksum else 0
    require(position >= len(data), "Z-2", "malformed", "there are bytes after the frame")
    try:
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise Rejected("Z-4", "malformed", str(error)) from None


# -- Section 6: dictionaries -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dictionary:
    width: int
    signs: str
    first: list[int]  # each entry's first codeword, ascending
    entries: list[tuple[int, ...]]  # the same order: 1 where the weight is not zero
    codewords: int  # their number


def dictionary(tree: bytes, stated: DictionaryEntry) -> Dictionary:
    first: list[int] = []
    entries: list[tuple[int, ...]] = []
    codewords = 0
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
        first.append(codewords)
        entries.append(tuple(path))
        codewords += 1 if stated.signs == "plane" else 2 ** sum(path)  # [D-4], [D-X]
        rule = "D-4" if stated.signs == "plane" else "D-X"
        require(codewords <= 2**stated.width, rule, "malformed", "there are too many codewords")
        while path and path[-1] == 1:  # back to the last node whose second child comes next
            path.pop()
        if not path:
            break
        path[-1] = 1
        require(sum(path) <= 16, "D-3", "limit", "an entry has too many non-zeros")
    full = codewords == 2**stated.width or stated.signs != "plane"
    require(full, "D-4", "malformed", "there are too few codewords")
    rest = int.from_bytes(tree, "little") >> position
    require(8 * len(tree) - position < 8, "D-2", "malformed", "there are bytes after the tree")
    require(rest == 0, "D-2", "padding", "bits after the tree")
    right = max(len(entry) for entry in entries) == stated.max_length
    require(right, "D-1", "malformed", "max_length is wrong")
    right = max(sum(entry) for entry in entries) == stated.max_nonzeros
    require(right, "D-1", "malformed", "max_nonzeros is wrong")
    return Dictionary(stated.width, stated.signs, first, entries, codewords)


# -- Section 7: int-dict -----------------------------------------------------------------------

HEADER = struct.Struct("<IIB7sQQ")


def decode_ternary(
    data: bytes, t: Tensor, shape: Sequence[int], tables: list[Dictionary]
) -> dict[str, str]:
    rows, columns = shape
    group_size = t.keys["group_size"]
    groups = -(-columns // group_size) if group_size else 1  # [E-X]
    together = t.keys["rows_per_segment"]
    count = -(-rows // together)  # [E-3]
    symmetric, with_columns = t.keys["symmetric"], t.keys["column_scale"]
    scale_dtype = t.keys["scale_dtype"]
    scale_size = DTYPES[scale_dtype]

    # 7.1: where the sections are
    require(len(data) >= 32, "E-4", "malformed", "the extent ends within its header")
    number, length_base, length_width, header_zero, nonzeros, segment_bytes = HEADER.unpack_from(
        data
    )
    require(segment_bytes < 2**32, "E-4", "limit", "segment_bytes")
    require(length_width in (1, 2, 4), "E-4", "malformed", f"length_width {length_width}")
    sizes = [
        rows * groups * (1 if symmetric else 2) * scale_size,
        columns * scale_size if with_columns else 0,
        -(-count // 32) * 4,
        count * length_width,
        segment_bytes,
    ]
    ends = []
    starts = []
    position = 32
    for size in sizes:
        starts.append(align(position, 16))
        position = checked(starts[-1] + size)
        ends.append(position)
    end = align(position + 8, 16)
    require(len(data) == end, "E-4", "malformed", f"the extent must have {end} bytes")
    gaps = [header_zero]
    gaps += [data[a:b] for a, b in zip(ends, [*starts[1:], end], strict=True)]
    require(all(zero(gap) for gap in gaps), "E-5", "padding", "in a ternary extent")
    row_bytes, column_bytes, offset_bytes, length_bytes, segments = (
        data[a:b] for a, b in zip(starts, ends, strict=True)
    )

    require(number < len(tables), "E-1", "malformed", f"dictionary {number} does not exist")
    table = tables[number]
    right = (table.signs, table.width) == (t.keys["signs"], t.keys["width"])
    require(right, "E-1", "malformed", f"dictionary {number} has another width or signs")

    row_scales = scales(row_bytes, scale_dtype)
    column_scales = scales(column_bytes, scale_dtype)
    finite = all(map(math.isfinite, row_scales)) and all(map(math.isfinite, column_scales))
    require(finite, "E-8", "value", "a scale is not finite")

    numbers = range(0, len(length_bytes), length_width)
    lengths = [int.from_bytes(length_bytes[i : i + length_width], "little") for i in numbers]
    right = sum(lengths) + count * length_base == segment_bytes
    require(right, "E-6", "malformed", "the lengths do not add up to segment_bytes")
    # [E-9] If the minimum of the stored lengths is 0, length_base is the minimum length.
    right = min(lengths) == 0 if count else length_base == 0
    require(right, "E-9", "malformed", "length_base is not the minimum length")
    least = next(width for width in (1, 2, 4) if max(lengths, default=0) < 256**width)
    require(length_width == least, "E-9", "malformed", "length_width is not the minimum")
    offsets = [n for (n,) in struct.iter_unpack("<I", offset_bytes)]

    # 7.2, 7.3
    values = hashlib.sha256()
    all_levels = hashlib.sha256()
    found_nonzeros = 0
    position = 0
    for number in range(count):
        if number % 32 == 0:
            right = offsets[number // 32] == position
            require(right, "E-6", "malformed", f"offset of block {number // 32}")
        length = length_base + lengths[number]
        segment = segments[position : position + length]
        position += length
        first = number * together
        levels = decode_segment(segment, (min(first + together, rows) - first) * columns, table)
        found_nonzeros += sum(map(abs, levels))
        all_levels.update(struct.pack(f"{len(levels)}b", *levels))
        for place, level in enumerate(levels):
            row, column = first + place // columns, place % columns
            group = row * groups + (column // group_size if group_size else 0)
            if symmetric:
                low, high = -row_scales[group], row_scales[group]  # [V-1]
            else:
                low, high = row_scales[2 * group : 2 * group + 2]
            value = {0: 0.0, 1: high, -1: low}[level]
            if with_columns and level:
                # [V-2] The product is exact in binary64: one rounding, to binary32.
                value = rounded(value * column_scales[column], "<f")
            values.update(element(value, t.dtype))
    right = found_nonzeros == nonzeros
    require(right, "E-14", "malformed", f"there are {found_nonzeros} nonzeros, not {nonzeros}")
    return {"sha256": values.hexdigest(), "levels": all_levels.hexdigest()}


def decode_segment(segment: bytes, weights: int, table: Dictionary) -> list[int]:
    width, plane = table.width, table.signs == "plane"
    bits = 8 * len(segment)
    enough = len(segment) >= -(-width * -(-weights // 255) // 8)
    require(enough, "E-7", "malformed", "a segment is too short for its weights")
    s = int.from_bytes(segment, "little")
    levels: list[int] = []
    signs = 0  # bits of signs used so far, from the low end
    used = 0  # bits of codewords used so far, from the high end
    while len(levels) < weights:  # [E-10]
        used += width
        require(used <= bits, "E-13", "malformed", "a segment has too few codewords")
        codeword = s >> (bits - used) & (2**width - 1)
        exists = codeword < table.codewords
        require(exists, "D-X", "malformed", f"codeword {codeword} is not in the dictionary")
        leaf = bisect_right(table.first, codeword) - 1
        sign_bits = codeword - table.first[leaf]  # [D-X]
        for weight in table.entries[leaf]:
            if not weight:
                levels.append(0)
                continue
            inside = len(levels) < weights
            require(inside, "E-11", "malformed", "a weight after the last row is not zero")
            if plane:  # [E-12]
                negative = s >> signs & 1
                signs += 1
            else:
                negative = sign_bits & 1
                sign_bits >>= 1
            levels.append(-1 if negative else 1)  # [E-12]
    left = bits - used - signs
    require(left >= 0, "E-13", "malformed", "codewords and signs overlap")
    require(left < 8, "E-13", "malformed", "a segment is longer than necessary")
    require(s >> signs & (2**left - 1) == 0, "E-13", "padding", "between codewords and signs")
    return levels[:weights]


# 7.3. All values are Python floats: binary64, which represents every binary32 number exactly.


def scales(data: bytes, dtype: str) -> list[float]:
    if dtype == "BF16":
        halves = struct.iter_unpack("<H", data)
        return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for (half,) in halves]
    return [value for (value,) in struct.iter_unpack("<f" if dtype == "F32" else "<e", data)]


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


# -- Section 8: shards -----------------------------------------------------------------------------

SHARDS = b'{"format":"qmoe-shards"'


def shard_set(path: Path) -> list[Path]:
    """Open a set, [C-1]; the paths of its files."""
    require(path.stat().st_size <= 2**28, "L-1", "limit", "length of the text")
    index = record(Json(path.read_bytes()).document(), format=str, shards=list, version=list)
    kinds = [type(number) for number in index["version"]] == [int, int]
    require(kinds, "S-1", "malformed", "version is not a pair of integers")
    known = tuple(index["version"]) == VERSION
    require(known, "S-1", "version", f"version {index['version']} is unknown")
    require(len(index["shards"]) <= 2**20, "L-1", "limit", "number of shards")
    paths: list[Path] = []
    for value in index["shards"]:
        shard = record(value, bytes=int, file=str, preamble_crc32=int)
        check_file_name(shard["file"])
        paths.append(path.parent / shard["file"])
        require(paths[-1].is_file(), "S-2", "truncated", f"{shard['file']} is missing")
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
