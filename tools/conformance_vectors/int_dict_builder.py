"""Dictionaries and matrices of SPEC.md sections 6 and 7, byte by byte."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tools.conformance_vectors.exact_numbers import ZERO, Number, number, product

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


def laid_out(
    start: bytes, sections: Sequence[bytes], guard: int, gaps: Mapping[int, Mapping[int, int]]
) -> bytes:
    """Sections at multiples of 16; ``gaps`` are patches of the zero bytes after a section."""
    result = start + bytes(-len(start) % 16)
    for place, section in enumerate(sections):
        end = len(result) + len(section)
        gap = bytes(-end % 16 if place < len(sections) - 1 else -(end + guard) % 16 + guard)
        result += section + patched(gap, gaps.get(place, {}))
    return result


# -- Dictionaries ----------------------------------------------------------------------------------


def preorder(node: Node) -> list[int]:
    return [1, *preorder(node[0]), *preorder(node[1])] if node else [0]


def paths(node: Node, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The entries, in preorder."""
    return paths(node[0], (*path, 0)) + paths(node[1], (*path, 1)) if node else [path]


def integer(bits: Sequence[int]) -> int:
    """Bit k of the result is ``bits[k]``."""
    return int("".join(map(str, reversed(bits))) or "0", 2)


@dataclass
class Book:
    """A dictionary: ``root`` is its tree."""

    width: int
    root: Node

    def __post_init__(self) -> None:
        bits = preorder(self.root)
        self.tree = integer(bits).to_bytes(-(-len(bits) // 8), "little")
        self.entries = paths(self.root)
        self.max_length = max(map(len, self.entries))
        self.max_ones = max(map(sum, self.entries))
        self.codewords = {entry: number for number, entry in enumerate(self.entries)}

    def parse(self, string: Sequence[int]) -> list[int]:
        """The codewords of a string; the last entry continues with zeros."""
        codewords: list[int] = []
        place = 0
        while place < len(string):
            node, entry = self.root, list[int]()
            while node:
                entry.append(string[place] if place < len(string) else 0)
                node = node[entry[-1]]
                place += 1
            codewords.append(self.codewords[tuple(entry)])
        return codewords


def segment(
    codewords: Sequence[int],
    width: int,
    signs: Sequence[int] = (),
    extra: int = 0,
    middle: int = 0,
) -> bytes:
    """A segment with ``extra`` bytes, and ``middle`` in the bits between signs and codewords."""
    bits = len(codewords) * width + len(signs)
    length = -(-bits // 8) + extra
    number = integer(signs) | middle << len(signs)
    text = "".join(f"{codeword:0{width}b}" for codeword in codewords)
    number |= int(text or "0", 2) << (8 * length - len(text))
    return number.to_bytes(length, "little")


def tunstall(width: int, zeros: float) -> Book:
    """Split the most probable leaf while there is room, for a fraction of zeros of ``zeros``."""
    root: Node = []
    heap: list[tuple[float, int, Node, int, int]] = [(-1.0, 0, root, 0, 0)]
    leaves = 1
    while leaves < 2**width:
        weight, _, node, length, ones = heapq.heappop(heap)
        if length == 255 or ones == 16:
            continue
        node[:] = [], []
        heapq.heappush(heap, (weight * zeros, 2 * leaves, node[0], length + 1, ones))
        heapq.heappush(heap, (weight * (1 - zeros), 2 * leaves + 1, node[1], length + 1, ones + 1))
        leaves += 1
    return Book(width, root)


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


# -- Matrices --------------------------------------------------------------------------------------


def nonzero(levels: Sequence[int]) -> list[int]:
    return [level for level in levels if level]


def mask(levels: Sequence[int]) -> list[int]:
    return [int(level != 0) for level in levels]


def signs(levels: Sequence[int]) -> list[int]:
    return [int(level < 0) for level in nonzero(levels)]


def refinement(levels: Sequence[int]) -> list[int]:
    return [bit for level in nonzero(levels) for bit in (*[1] * (abs(level) - 1), 0)]


@dataclass
class Matrix:
    """Scales are bits of BF16: rows × (s, or low and high), flat."""

    levels: Sequence[Sequence[int]]
    row_scales: Sequence[int]
    column_scales: Sequence[int] | None = None
    symmetric: bool = False
    columns: int = 0  # for a matrix without rows
    rows_per_segment: int = 1
    refined: bool | None = None  # None: if there is a level beyond -1 to 1

    def __post_init__(self) -> None:
        self.columns = len(self.levels[0]) if self.levels else self.columns
        if self.refined is None:
            self.refined = any(abs(level) > 1 for row in self.levels for level in row)
        assert len(self.row_scales) == len(self.levels) * (1 if self.symmetric else 2)
        assert self.column_scales is None or len(self.column_scales) == self.columns

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.levels), self.columns

    @property
    def keys(self) -> dict[str, Any]:
        """Those of the index entry."""
        return {
            "column_scale": self.column_scales is not None,
            "rows_per_segment": self.rows_per_segment,
            "symmetric": self.symmetric,
        }

    @property
    def plain(self) -> bytes:
        """The levels as signed bytes."""
        return bytes(level & 0xFF for row in self.levels for level in row)

    def value(self, row: int, column: int) -> Number:
        """Section 7.3."""
        level = self.levels[row][column]
        if level == 0:
            return ZERO
        sign, scale = number(
            self.row_scales[row if self.symmetric else 2 * row + (level > 0)], "BF16"
        )
        value = product(Fraction(abs(level)), (sign ^ (self.symmetric and level < 0), scale))
        if self.column_scales is None:
            return value
        sign, scale = number(self.column_scales[column], "BF16")
        return product(scale * (1 - 2 * sign), value) if scale else (sign ^ value[0], scale)

    def extent(self, books: Sequence[Book], numbers: Sequence[int], **defects: Any) -> bytes:
        """Section 7.1.

        Args:
            books: all dictionaries.
            numbers: of the mask's dictionary, and the refinement's.
            defects: of the mask, see ``_string``; ``refinement`` has those of the refinement;
                ``gaps`` are patches of the zero bytes after a section, from 0, the row scales.
        """
        gaps = defects.pop("gaps", {})
        further = defects.pop("refinement", {})
        segments: list[Sequence[int]] = []
        for first in range(0, len(self.levels), self.rows_per_segment):  # [E-3]
            rows = self.levels[first : first + self.rows_per_segment]
            segments.append([level for row in rows for level in row])
        book = books[numbers[0]]
        parts = [segment(book.parse(mask(s)), book.width, signs(s)) for s in segments]
        ones = sum(sum(mask(s)) for s in segments)
        fields = {"dictionary": numbers[0], "refined": int(bool(self.refined)), "ones": ones}
        header, sections = _string(parts, fields, defects)
        if self.refined:
            book = books[numbers[1]]
            parts = [segment(book.parse(refinement(s)), book.width) for s in segments]
            ones = sum(sum(refinement(s)) for s in segments)
            fields = {"dictionary": numbers[1], "refined": 0, "ones": ones}
            second, more = _string(parts, fields, further)
            header, sections = header + second, sections + more
        scales = [self.row_scales, self.column_scales or ()]
        packed = [struct.pack(f"<{len(each)}H", *each) for each in scales]
        return laid_out(header, [*packed, *sections], 8, gaps)


def _string(
    parts: Sequence[bytes], fields: Mapping[str, int], defects: Mapping[str, Any]
) -> tuple[bytes, list[bytes]]:
    """The header and the sections of a string whose segments are ``parts``.

    ``defects``: ``segments``, ``lengths`` and ``offsets`` (of blocks) replace single ones;
    everything else replaces a field of the header.
    """
    parts = replaced(parts, defects.get("segments", {}))
    base = defects.get("length_base", min(map(len, parts), default=0))
    above = [len(part) - base for part in parts]
    width = next(size for size in (1, 2, 4) if max(above, default=0) < 256**size)
    width = defects.get("length_width", width)
    above = replaced(above, defects.get("lengths", {}))
    starts = [sum(map(len, parts[: 32 * block])) for block in range(-(-len(parts) // 32))]
    starts = replaced(starts, defects.get("offsets", {}))
    sections = [
        struct.pack(f"<{len(starts)}I", *starts),
        b"".join(length.to_bytes(width, "little") for length in above),
        b"".join(parts),
    ]
    header = {
        "dictionary": fields["dictionary"],
        "length_base": base,
        "length_width": width,
        "refined": fields["refined"],
        "zero": bytes(6),
        "ones": fields["ones"],
        "segment_bytes": len(sections[-1]),
    }
    for name in header.keys() & defects.keys():
        header[name] = defects[name]
    assert defects.keys() <= header.keys() | {"segments", "lengths", "offsets"}
    return struct.pack("<IIBB6sQQ", *header.values()), sections
