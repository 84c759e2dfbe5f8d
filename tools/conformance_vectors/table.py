"""How the table of conformance vectors is filled, and the files that its defects are put into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.conformance_vectors.file_builder import (
    Book,
    Content,
    Matrix,
    bits_of,
    canonical,
    tunstall,
)


@dataclass(frozen=True, slots=True)
class Vector:
    id: str
    requirements: tuple[str, ...]
    description: str
    files: Mapping[str, bytes]  # the first is the one to open
    outcome: str  # accept, or reject:CODE
    stage: str  # when a rejected one is found: open or verify
    contents: dict[str, Any] | None  # what is in an accepted one


VECTORS: list[Vector] = []


def accept(
    id: str, requirements: str, description: str, content: Content, data: bytes | None = None
) -> None:
    file = {f"{id}.qmoe": content.pack() if data is None else data}
    add(id, requirements, description, file, "accept", "", content.expected)


def reject(id: str, requirements: str, code: str, description: str, data: bytes | Content) -> None:
    """``code`` as found when the file is opened, or, with an asterisk, when it is verified."""
    stage = "verify" if code.endswith("*") else "open"
    file = {f"{id}.qmoe": data if isinstance(data, bytes) else data.pack()}
    add(id, requirements, description, file, f"reject:{code.rstrip('*')}", stage, None)


def add(
    id: str,
    requirements: str,
    description: str,
    files: Mapping[str, bytes],
    outcome: str,
    stage: str,
    contents: dict[str, Any] | None,
) -> None:
    assert id not in {vector.id for vector in VECTORS}, id
    needed = tuple(requirements.split())
    VECTORS.append(Vector(id, needed, description, files, outcome, stage, contents))


# -- The files that the defects are put into ----------------------------------------------------


def small() -> Content:
    """One raw tensor of three bytes: preamble, 3 bytes and 61 zero bytes, index, one record."""
    content = Content()
    content.tensor("a", "U8", [3], b"abc")
    return content


def mixed() -> Content:
    """All kinds of objects. Extents: 0 and 1 attachments, 2 dictionary, 3 raw tensor, 4 ternary."""
    content = Content()
    content.attach("a.json", b"{}")
    content.attach("b.txt", b"text")
    content.dictionary(TINY)
    content.tensor("raw", "U16", [2], b"\1\2\3\4")
    content.ternary("ternary", "F32", Matrix([[1]], [ONE], symmetric=True))
    return content


def unknown(**keys: Any) -> Content:
    """A tensor with an encoding that no reader knows, so that it may have any other keys."""
    content = Content()
    content.tensor("a", "U8", [3], b"abc", encoding="future", **keys)
    return content


def ternary(
    matrix: Matrix, book: Book | None = None, dtype: str = "F32", **defects: Any
) -> Content:
    content = Content()
    content.dictionary(book or PLANE8)
    content.ternary("w", dtype, matrix, defects=defects)
    return content


def with_text(content: Content, old: str, new: str) -> bytes:
    """The file with its index's text changed in one place."""
    text = canonical(content.index)
    assert text.count(old.encode()) == 1, old
    return content.pack(text=text.replace(old.encode(), new.encode()))


ONE = 0x3F80  # 1 as BF16
TINY = Book(8, "codeword", [[], []])  # entries 0 and 1: three codewords, a tree of one byte
PLANE8 = tunstall(8, "plane", 0.885)
CODEWORD8 = tunstall(8, "codeword", 0.7)


def noise(count: int, zeros_in_16: int, seed: int) -> list[int]:
    """Trits from a small generator that any language has: x -> 1664525 x + 1013904223 mod 2^32."""
    result = []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        result.append(0 if seed >> 28 < zeros_in_16 else 1 - 2 * (seed >> 27 & 1))
    return result


def rows(trits: Sequence[int], columns: int) -> list[list[int]]:
    return [list(trits[at : at + columns]) for at in range(0, len(trits), columns)]


def bf16(*values: float) -> list[int]:
    return [bits_of(value, "BF16") for value in values]


# Made by Zstandard 1.5.7 from the contents that stand beside them where they are used.
COMPRESSED_NUMBERS = bytes.fromhex(
    "28b52ffd6480004501009800100c00d8a0300050e03480aac1c0004041411298"
    "10f8060010e6e65976edff6758f4175e02019413c867"
)
COMPRESSED_TEXT = bytes.fromhex(
    "28b52ffd606800bd0100c40274686520717569636b2062726f776e20666f7820"
    "6a756d7073206f76657220746865206c617a7920646f673b0200345029c01066"
    "19"
)
