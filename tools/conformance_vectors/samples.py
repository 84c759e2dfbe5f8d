"""The small files that defects are put into, and numbers to fill them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.conformance_vectors.file_builder import Content, canonical
from tools.conformance_vectors.int_dict_builder import Book, Matrix, bits_of, tunstall

ONE = 0x3F80  # 1 as BF16
TINY = Book(8, "codeword", [[], []])  # entries 0 and 1: three codewords, a tree of one byte
PLANE8 = tunstall(8, "plane", 0.885)
CODEWORD8 = tunstall(8, "codeword", 0.7)


def small() -> Content:
    """One raw tensor of three bytes: preamble, 3 bytes and 61 zero bytes, index, one record."""
    return Content().tensor("a", "U8", [3], b"abc")


def mixed() -> Content:
    """All kinds of objects. Extents: 0 and 1 attachments, 2 dictionary, 3 raw tensor, 4 ternary."""
    content = Content().attach("a.json", b"{}").attach("b.txt", b"text").dictionary(TINY)
    return content.tensor("raw", "U16", [2], b"\1\2\3\4").ternary("ternary", "F32", symmetric([1]))


def unknown(**keys: Any) -> Content:
    """A tensor with an encoding that no reader knows, so that it may have any other keys."""
    return Content().tensor("a", "U8", [3], b"abc", encoding="future", **keys)


def ternary(matrix: Matrix, book: Book = PLANE8, dtype: str = "F32", **defects: Any) -> Content:
    """A matrix and its dictionary; ``defects`` are those of ``Matrix.extent``."""
    return Content().dictionary(book).ternary("w", dtype, matrix, defects=defects)


def symmetric(*levels: Sequence[int], rows_per_segment: int = 1) -> Matrix:
    """A matrix with a scale of 1 for each row."""
    scales = [ONE] * len(levels)
    return Matrix(levels, scales, symmetric=True, rows_per_segment=rows_per_segment)


def with_text(content: Content, old: str, new: str) -> bytes:
    """The file with its index's text changed in one place."""
    text = canonical(content.index)
    assert text.count(old.encode()) == 1, old
    return content.pack(text=text.replace(old.encode(), new.encode()))


def noise(count: int, zeros_in_16: int, seed: int) -> list[int]:
    """Levels from a small generator that any language has: x -> 1664525 x + 1013904223 mod 2^32."""
    result = []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        result.append(0 if seed >> 28 < zeros_in_16 else 1 - 2 * (seed >> 27 & 1))
    return result


def rows(levels: Sequence[int], columns: int) -> list[list[int]]:
    """``levels`` cut into rows."""
    return [list(levels[at : at + columns]) for at in range(0, len(levels), columns)]


def bf16(*values: float) -> list[int]:
    """The bits of ``values`` in BF16."""
    return [bits_of(value, "BF16") for value in values]
