"""A byte-level writer of `.qmoe` files that can also write what is wrong.

It shares no code with the package or with the second reader, and where arithmetic matters it works
with exact fractions: it is what both are compared with. Every defect is asked for by name; whatever
is not asked for (lengths, checksums, padding) is made right around it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

SIGNATURE = b"\x8fQMOE\r\n\x1a"
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def padded(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def patched(data: bytes, patches: Mapping[int, int]) -> bytes:
    """With the bytes at these offsets (negative ones from the end) replaced."""
    result = bytearray(data)
    for offset, byte in patches.items():
        assert result[offset] != byte
        result[offset] = byte
    return bytes(result)


# -- The file --------------------------------------------------------------------------------------


def preamble(**fields: Any) -> bytes:
    data = struct.pack(
        "<8sHHIIIQQQI8s",
        fields.get("signature", SIGNATURE),
        fields.get("major", 0),
        fields.get("minor", 1),
        fields.get("required_features", 0),
        fields.get("optional_features", 0),
        fields["extent_count"],
        fields["file_length"],
        fields["index_offset"],
        fields["index_length"],
        fields["index_crc32"],
        fields.get("reserved", bytes(8)),
    )
    return data + struct.pack("<I", fields.get("preamble_crc32", zlib.crc32(data)))


def pack(
    text: bytes,
    extents: Sequence[bytes],
    *,
    records: Mapping[int, Mapping[str, int]] | None = None,
    patches: Mapping[int, int] | None = None,
    hole: int = 0,
    **fields: Any,
) -> bytes:
    """A file. ``records`` replaces fields of the extent table, ``fields`` those of the preamble;
    ``patches`` are bytes changed before the checksums; ``hole`` zero bytes precede the index."""
    body = b""
    table = b""
    for number, extent in enumerate(extents):
        record = {"length": len(extent), "crc32": zlib.crc32(extent), "zero": 0}
        record |= (records or {}).get(number, {})
        table += struct.pack("<QII", record["length"], record["crc32"], record["zero"])
        body += padded(extent, 64)
    body += bytes(hole)
    index_offset = 64 + len(body)
    body = patched(bytes(64) + body + padded(text, 8) + table, patches or {})
    found = {
        "extent_count": len(extents),
        "file_length": len(body),
        "index_offset": index_offset,
        "index_length": len(text),
        "index_crc32": zlib.crc32(body[index_offset:]),
    }
    return preamble(**found | fields) + body[64:]


@dataclass
class Content:
    """The contents of a file, and what a reader is expected to find in it."""

    index: dict[str, Any] = field(
        default_factory=lambda: {
            "attachments": [],
            "dictionaries": [],
            "generator": "qmoe vectors",
            "tensors": [],
        }
    )
    extents: list[bytes] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=lambda: {"attachments": [], "tensors": []})
    books: list[Book] = field(default_factory=list)

    def attach(
        self, name: str, data: bytes, stored: bytes | None = None, encoding: str = "raw"
    ) -> None:
        entry = {"bytes": len(data), "encoding": encoding, "extent": len(self.extents)}
        self.index["attachments"].append(entry | {"name": name})
        self.extents.append(data if stored is None else stored)
        self.expected["attachments"].append(
            {"bytes": len(data), "name": name, "sha256": sha256(data)}
        )

    def dictionary(self, book: Book, stored: bytes | None = None, encoding: str = "raw") -> int:
        entry = {"extent": len(self.extents), "signs": book.signs, "width": book.width}
        entry |= {"max_length": book.max_length, "max_nonzeros": book.max_nonzeros}
        self.index["dictionaries"].append(entry | {"bytes": len(book.tree), "encoding": encoding})
        self.extents.append(book.tree if stored is None else stored)
        self.books.append(book)
        return len(self.books) - 1

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
        **keys: Any,
    ) -> dict[str, Any]:
        """``parts`` are the decoded bytes, ``stored`` the extents if they are not the same."""
        entry = {
            "dtype": dtype,
            "encoding": encoding,
            "extent": len(self.extents) if parts else 0,
            "members": members,
            "name": name,
            "shape": list(shape),
            "stack": stack,
        }
        self.index["tensors"].append(entry | keys)
        self.extents += parts if stored is None else stored
        expected = {key: value for key, value in entry.items() if key != "extent"}
        self.expected["tensors"].append(
            expected | {"parts": [{"sha256": sha256(part)} for part in parts]}
        )
        tensor: dict[str, Any] = self.index["tensors"][-1]
        return tensor

    def ternary(
        self,
        name: str,
        dtype: str,
        *matrices: Matrix,
        shape: Sequence[int] = (),
        stack: bool | None = None,
        members: str = "",
        dictionaries: Sequence[int] = (0,),
        defects: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``dictionaries`` are used in turn; ``defects`` go to the last matrix's extent."""
        first = matrices[0] if matrices else Matrix([], [])
        stack = len(matrices) != 1 if stack is None else stack
        own = (len(first.trits), first.columns)
        shape = shape or ((len(matrices), *own) if stack else own)
        numbers = [dictionaries[i % len(dictionaries)] for i in range(len(matrices))]
        book = self.books[dictionaries[0]]
        stored = [
            matrix.extent(number, self.books[number], **((defects or {}) if last else {}))
            for number, matrix, last in zip(
                numbers, matrices, [*[False] * (len(matrices) - 1), True], strict=False
            )
        ]
        tensor = self.tensor(
            name,
            dtype,
            shape,
            *[matrix.values(dtype) for matrix in matrices],
            stored=stored,
            encoding="ternary-dict",
            stack=stack,
            members=members,
            column_scale=first.column_scales is not None,
            group_size=first.group_size,
            rows_per_segment=first.rows_per_segment,
            scale_dtype=first.scale_dtype,
            signs=book.signs,
            symmetric=first.symmetric,
            width=book.width,
        )
        for part, matrix in zip(self.expected["tensors"][-1]["parts"], matrices, strict=True):
            trits = [trit for row in matrix.trits for trit in row]
            part["trits"] = sha256(struct.pack(f"{len(trits)}b", *trits))
        return tensor

    def pack(self, **defects: Any) -> bytes:
        return pack(defects.pop("text", None) or canonical(self.index), self.extents, **defects)


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
    flags |= (0x20 if window is None else 0) | (1 if dictionary is not None else 0)
    result = b"\x28\xb5\x2f\xfd" + bytes([flags])
    result += b"" if window is None else bytes([window])
    result += b"" if dictionary is None else bytes([dictionary])
    size = len(content) if size is None else size
    size -= 256 if size_bytes == 2 else 0
    result += size.to_bytes(size_bytes, "little") if size_bytes else b""
    return result + (raw_block(content) if blocks is None else blocks)


# -- Dictionaries ----------------------------------------------------------------------------------

Node = list[Any]  # a leaf is [], an inner node [first child, second child]


def preorder(node: Node) -> list[int]:
    return [1, *preorder(node[0]), *preorder(node[1])] if node else [0]


def paths(node: Node, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The entries, in preorder."""
    return paths(node[0], (*path, 0)) + paths(node[1], (*path, 1)) if node else [path]


def bits_to_bytes(bits: Sequence[int]) -> bytes:
    number = int("".join(map(str, reversed(bits))), 2)
    return number.to_bytes(-(-len(bits) // 8), "little")


@dataclass
class Book:
    """A dictionary: ``root`` is its tree."""

    width: int
    signs: str
    root: Node

    def __post_init__(self) -> None:
        self.tree = bits_to_bytes(preorder(self.root))
        self.entries = paths(self.root)
        self.max_length = max(map(len, self.entries))
        self.max_nonzeros = max(map(sum, self.entries))
        self.first: dict[tuple[int, ...], int] = {}
        self.codewords = 0
        for entry in self.entries:
            self.first[entry] = self.codewords
            self.codewords += 1 if self.signs == "plane" else 2 ** sum(entry)

    def parse(self, row: Sequence[int]) -> tuple[list[int], list[int]]:
        """The codewords and the sign bits of a row; the last entry goes on with zeros."""
        codewords: list[int] = []
        signs: list[int] = []
        column = 0
        while column < len(row):
            node: Node = self.root
            entry: list[int] = []
            own: list[int] = []
            while node:
                trit = row[column] if column < len(row) else 0
                node = node[1 if trit else 0]
                entry.append(1 if trit else 0)
                own += [int(trit < 0)] if trit else []
                column += 1
            codeword = self.first[tuple(entry)]
            if self.signs == "plane":
                signs += own
            else:
                codeword += sum(bit << place for place, bit in enumerate(own))
            codewords.append(codeword)
        return codewords, signs


def segment(
    codewords: Sequence[int],
    width: int,
    signs: Sequence[int],
    extra_bytes: int = 0,
    middle: int = 0,
) -> bytes:
    """``middle`` is added to the bits between the signs and the codewords."""
    length = -(-(len(codewords) * width + len(signs)) // 8) + extra_bytes
    number = sum(bit << place for place, bit in enumerate(signs)) + (middle << len(signs))
    for i, codeword in enumerate(codewords):
        number |= codeword << (8 * length - (i + 1) * width)
    return number.to_bytes(length, "little")


def tunstall(width: int, signs: str, zeros: float) -> Book:
    """Split the most probable leaf while there is room: for a share of zeros of ``zeros``."""
    root: Node = []
    heap: list[tuple[float, int, Node, int, int]] = [(-1.0, 0, root, 0, 0)]
    codewords = order = 1
    while heap:
        weight, _, node, length, nonzeros = heapq.heappop(heap)
        more = 1 if signs == "plane" else 2 * 2**nonzeros
        if codewords + more > 2**width or length == 255 or nonzeros == 16:
            continue
        codewords += more
        node[:] = [], []
        heapq.heappush(heap, (weight * zeros, order, node[0], length + 1, nonzeros))
        heapq.heappush(heap, (weight * (1 - zeros), order + 1, node[1], length + 1, nonzeros + 1))
        order += 2
    return Book(width, signs, root)


def comb(turns: Sequence[int], leaves: int) -> Node:
    """A tree whose longest path is ``turns``, with the other leaves beside its first turn."""
    root: Node = []
    node = root
    for turn in turns:
        node[:] = [], []
        node = node[turn]
    free: list[Node] = [root[1 - turns[0]]]
    for _ in range(leaves - len(turns) - 1):
        node = free.pop(0)
        node[:] = [], []
        free += node
    return root


# -- Numbers, exactly ------------------------------------------------------------------------------

FORMATS = {"F16": (5, 10), "BF16": (8, 7), "F32": (8, 23), "F64": (11, 52)}
Number = tuple[int, Fraction | None]  # sign bit and magnitude; None is infinity


def number(bits: int, dtype: str) -> Number:
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign = bits >> (exponent_bits + fraction_bits)
    exponent = bits >> fraction_bits & (2**exponent_bits - 1)
    fraction = bits & (2**fraction_bits - 1)
    if exponent == 2**exponent_bits - 1:
        return sign, None
    least = 2 - 2 ** (exponent_bits - 1) - fraction_bits  # the unit of the subnormals
    if exponent == 0:
        return sign, fraction * Fraction(2) ** least
    return sign, (2**fraction_bits + fraction) * Fraction(2) ** (least + exponent - 1)


def nearest(value: Number, dtype: str) -> int:
    """The bits of the nearest number of a format, ties to even."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign, magnitude = value
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if magnitude is None:
        bits = infinity
    elif magnitude == 0:
        bits = 0
    else:
        bias = (1 << (exponent_bits - 1)) - 1
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        exponent -= magnitude < Fraction(2) ** exponent
        exponent = max(exponent, 1 - bias)
        # round() of a fraction takes ties to even; a carry goes into the exponent by itself.
        units: int = round(magnitude / Fraction(2) ** (exponent - fraction_bits))
        bits = min(((exponent + bias - 1) << fraction_bits) + units, infinity)
    return sign << (exponent_bits + fraction_bits) | bits


def bits_of(value: float, dtype: str) -> int:
    return nearest((int(value < 0), Fraction(abs(value))), dtype)


# -- Ternary matrices ------------------------------------------------------------------------------


@dataclass
class Matrix:
    """Scales are bits of ``scale_dtype``: rows × groups × (s, or low and high), flat."""

    trits: Sequence[Sequence[int]]
    row_scales: Sequence[int]
    column_scales: Sequence[int] | None = None
    scale_dtype: str = "BF16"
    group_size: int = 0
    symmetric: bool = False
    columns: int = 0  # for a matrix without rows
    rows_per_segment: int = 1

    def __post_init__(self) -> None:
        self.columns = len(self.trits[0]) if self.trits else self.columns
        self.groups = -(-self.columns // self.group_size) if self.group_size else 1
        scales = len(self.trits) * self.groups * (1 if self.symmetric else 2)
        assert len(self.row_scales) == scales
        assert self.column_scales is None or len(self.column_scales) == self.columns

    def value(self, row: int, column: int) -> Number:
        trit = self.trits[row][column]
        if trit == 0:
            return 0, Fraction(0)
        group = row * self.groups + (column // self.group_size if self.group_size else 0)
        if self.symmetric:
            sign, magnitude = number(self.row_scales[group], self.scale_dtype)
            sign ^= int(trit < 0)
        else:
            sign, magnitude = number(self.row_scales[2 * group + (trit > 0)], self.scale_dtype)
        if self.column_scales is not None:
            other_sign, other = number(self.column_scales[column], self.scale_dtype)
            assert magnitude is not None
            assert other is not None
            product = nearest((sign ^ other_sign, magnitude * other), "F32")
            sign, magnitude = number(product, "F32")
        return sign, magnitude

    def values(self, dtype: str) -> bytes:
        if dtype not in FORMATS:  # a vector with a wrong dtype: nobody gets this far
            return b""
        return b"".join(
            nearest(self.value(row, column), dtype).to_bytes(SIZES[dtype], "little")
            for row in range(len(self.trits))
            for column in range(self.columns)
        )

    def extent(
        self,
        number: int,
        book: Book,
        *,
        segments: Mapping[int, bytes] | None = None,
        lengths: Mapping[int, int] | None = None,
        offsets: Mapping[int, int] | None = None,
        gaps: Mapping[int, Mapping[int, int]] | None = None,
        **header: Any,
    ) -> bytes:
        """``segments``, ``lengths`` and ``offsets`` replace those of a segment or block; ``gaps``
        are patches of the zero bytes after a section: 0, the row scales, to 4, the guard."""
        parts: list[bytes] = []
        for first in range(0, len(self.trits), self.rows_per_segment):  # [E-15]
            rows = self.trits[first : first + self.rows_per_segment]
            codewords, signs = book.parse([trit for row in rows for trit in row])
            own = segment(codewords, book.width, signs)
            parts.append((segments or {}).get(len(parts), own))
        base = header.get("length_base", min(map(len, parts), default=0))
        above = [len(part) - base for part in parts]
        width = next(size for size in (1, 2, 4) if max(above, default=0) < 256**size)
        width = header.get("length_width", width)
        for place, length in (lengths or {}).items():
            above[place] = length
        starts = [sum(map(len, parts[: 32 * block])) for block in range(-(-len(parts) // 32))]
        for block, start in (offsets or {}).items():
            starts[block] = start
        nonzeros = sum(trit != 0 for row in self.trits for trit in row)

        size = SIZES[self.scale_dtype]
        sections = [
            b"".join(scale.to_bytes(size, "little") for scale in self.row_scales),
            b"".join(scale.to_bytes(size, "little") for scale in self.column_scales or ()),
            struct.pack(f"<{len(starts)}I", *starts),
            b"".join(length.to_bytes(width, "little") for length in above),
            b"".join(parts),
        ]
        result = struct.pack(
            "<IIB7sQQ",
            header.get("dictionary", number),
            base,
            width,
            header.get("zero", bytes(7)),
            header.get("nonzeros", nonzeros),
            header.get("segment_bytes", len(sections[-1])),
        )
        for place, section in enumerate(sections):
            end = len(result) + len(section)
            gap = bytes(-end % 16 if place < 4 else -(end + 8) % 16 + 8)
            result += section + patched(gap, (gaps or {}).get(place, {}))
        return result
