"""Dictionaries and ternary matrices of SPEC.md sections 6 and 7, in exact arithmetic."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
Node = list[Any]  # a leaf is [], an inner node [first child, second child]


def patched(data: bytes, patches: Mapping[int, int]) -> bytes:
    """``data`` with the bytes at these offsets (negative ones from the end) replaced."""
    result = bytearray(data)
    for offset, byte in patches.items():
        assert result[offset] != byte
        result[offset] = byte
    return bytes(result)


def replaced(items: Sequence[Any], by: Mapping[int, Any]) -> list[Any]:
    """``items`` with those at the keys of ``by`` replaced."""
    return [by.get(place, item) for place, item in enumerate(items)]


# -- Dictionaries ----------------------------------------------------------------------------------


def preorder(node: Node) -> list[int]:
    return [1, *preorder(node[0]), *preorder(node[1])] if node else [0]


def paths(node: Node, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The entries, in preorder."""
    return paths(node[0], (*path, 0)) + paths(node[1], (*path, 1)) if node else [path]


def integer(bits: Sequence[int]) -> int:
    """Bit k of the result is ``bits[k]``."""
    return sum(bit << place for place, bit in enumerate(bits))


@dataclass
class Book:
    """A dictionary: ``root`` is its tree."""

    width: int
    signs: str
    root: Node

    def __post_init__(self) -> None:
        bits = preorder(self.root)
        self.tree = integer(bits).to_bytes(-(-len(bits) // 8), "little")
        self.entries = paths(self.root)
        self.max_length = max(map(len, self.entries))
        self.max_nonzeros = max(map(sum, self.entries))
        self.first: dict[tuple[int, ...], int] = {}
        self.codewords = 0
        for entry in self.entries:
            self.first[entry] = self.codewords
            self.codewords += 1 if self.signs == "plane" else 2 ** sum(entry)

    def parse(self, row: Sequence[int]) -> tuple[list[int], list[int]]:
        """The codewords and the sign bits of a row; the last entry continues with zeros."""
        codewords: list[int] = []
        signs: list[int] = []
        column = 0
        while column < len(row):
            node, entry, own = self.root, list[int](), list[int]()
            while node:
                level = row[column] if column < len(row) else 0
                node = node[abs(level)]
                entry.append(abs(level))
                own += [int(level < 0)] if level else []
                column += 1
            codewords.append(self.first[tuple(entry)])
            if self.signs == "plane":
                signs += own
            else:
                codewords[-1] += integer(own)
        return codewords, signs


def segment(
    codewords: Sequence[int], width: int, signs: Sequence[int], extra: int = 0, middle: int = 0
) -> bytes:
    """A segment with ``extra`` bytes, and ``middle`` in the bits between signs and codewords."""
    length = -(-(len(codewords) * width + len(signs)) // 8) + extra
    number = integer(signs) + (middle << len(signs))
    for i, codeword in enumerate(codewords):
        number |= codeword << (8 * length - (i + 1) * width)
    return number.to_bytes(length, "little")


def tunstall(width: int, signs: str, zeros: float) -> Book:
    """Split the most probable leaf while there is room, for a fraction of zeros of ``zeros``."""
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


# -- Numbers ---------------------------------------------------------------------------------------

FORMATS = {"F16": (5, 10), "BF16": (8, 7), "F32": (8, 23), "F64": (11, 52)}
Number = tuple[int, Fraction]  # sign bit and magnitude
INFINITY = Fraction(2) ** 2000  # beyond all formats


def number(bits: int, dtype: str) -> Number:
    """The exact value of a floating-point number."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign = bits >> (exponent_bits + fraction_bits)
    exponent = bits >> fraction_bits & (2**exponent_bits - 1)
    fraction = bits & (2**fraction_bits - 1)
    if exponent == 2**exponent_bits - 1:
        return sign, INFINITY
    least = 2 - 2 ** (exponent_bits - 1) - fraction_bits  # the unit of the subnormals
    if exponent == 0:
        return sign, fraction * Fraction(2) ** least
    return sign, (2**fraction_bits + fraction) * Fraction(2) ** (least + exponent - 1)


def nearest(value: Number, dtype: str) -> int:
    """The bits of the nearest number of a format, ties to even."""
    exponent_bits, fraction_bits = FORMATS[dtype]
    sign, magnitude = value
    sign <<= exponent_bits + fraction_bits
    if magnitude == 0:
        return sign
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    exponent = max(exponent, 1 - bias)
    # round() of a fraction takes ties to even; a carry goes into the exponent by itself.
    units: int = round(magnitude / Fraction(2) ** (exponent - fraction_bits))
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    return sign | min(((exponent + bias - 1) << fraction_bits) + units, infinity)


def bits_of(value: float, dtype: str) -> int:
    return nearest((int(value < 0), Fraction(abs(value))), dtype)


# -- Matrices --------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """Scales are bits of ``scale_dtype``: rows × groups × (s, or low and high), flat."""

    levels: Sequence[Sequence[int]]
    row_scales: Sequence[int]
    column_scales: Sequence[int] | None = None
    scale_dtype: str = "BF16"
    group_size: int = 0
    symmetric: bool = False
    columns: int = 0  # for a matrix without rows
    rows_per_segment: int = 1

    def __post_init__(self) -> None:
        self.columns = len(self.levels[0]) if self.levels else self.columns
        self.groups = -(-self.columns // self.group_size) if self.group_size else 1
        scales = len(self.levels) * self.groups * (1 if self.symmetric else 2)
        assert len(self.row_scales) == scales
        assert self.column_scales is None or len(self.column_scales) == self.columns

    def value(self, row: int, column: int) -> Number:
        """Section 7.3."""
        level = self.levels[row][column]
        if level == 0:
            return 0, Fraction(0)
        group = row * self.groups + (column // self.group_size if self.group_size else 0)
        place = group if self.symmetric else 2 * group + (level > 0)
        sign, magnitude = number(self.row_scales[place], self.scale_dtype)
        sign ^= self.symmetric and level < 0
        if self.column_scales is None:
            return sign, magnitude
        other_sign, other = number(self.column_scales[column], self.scale_dtype)
        return number(nearest((sign ^ other_sign, magnitude * other), "F32"), "F32")

    def values(self, dtype: str) -> bytes:
        if dtype not in FORMATS:  # a vector with a wrong dtype, rejected before it is decoded
            return b""
        return b"".join(
            nearest(self.value(row, column), dtype).to_bytes(SIZES[dtype], "little")
            for row in range(len(self.levels))
            for column in range(self.columns)
        )

    def extent(self, number: int, book: Book, **defects: Any) -> bytes:
        """Section 7.1.

        Args:
            number: of the dictionary ``book``.
            defects: ``segments``, ``lengths`` and ``offsets`` (of blocks) replace single ones;
                ``gaps`` are patches of the zero bytes after a section, from 0, the row scales, to
                4, the guard; everything else replaces a field of the header.
        """
        parts = []
        for first in range(0, len(self.levels), self.rows_per_segment):  # [E-3]
            rows = self.levels[first : first + self.rows_per_segment]
            codewords, signs = book.parse([level for row in rows for level in row])
            parts.append(segment(codewords, book.width, signs))
        parts = replaced(parts, defects.pop("segments", {}))
        base = defects.get("length_base", min(map(len, parts), default=0))
        above = [len(part) - base for part in parts]
        width = next(size for size in (1, 2, 4) if max(above, default=0) < 256**size)
        width = defects.get("length_width", width)
        above = replaced(above, defects.pop("lengths", {}))
        starts = [sum(map(len, parts[: 32 * block])) for block in range(-(-len(parts) // 32))]
        starts = replaced(starts, defects.pop("offsets", {}))
        gaps = defects.pop("gaps", {})
        size = SIZES[self.scale_dtype]
        sections = [
            b"".join(scale.to_bytes(size, "little") for scale in self.row_scales),
            b"".join(scale.to_bytes(size, "little") for scale in self.column_scales or ()),
            struct.pack(f"<{len(starts)}I", *starts),
            b"".join(length.to_bytes(width, "little") for length in above),
            b"".join(parts),
        ]
        header = {
            "dictionary": number,
            "length_base": base,
            "length_width": width,
            "zero": bytes(7),
            "nonzeros": sum(level != 0 for row in self.levels for level in row),
            "segment_bytes": len(sections[-1]),
        } | defects
        result = struct.pack("<IIB7sQQ", *header.values())
        for place, section in enumerate(sections):
            end = len(result) + len(section)
            gap = bytes(-end % 16 if place < 4 else -(end + 8) % 16 + 8)
            result += section + patched(gap, gaps.get(place, {}))
        return result
