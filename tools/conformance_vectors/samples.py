"""The small files that defects are put into, and numbers to fill them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.conformance_vectors.exact_numbers import bf16
from tools.conformance_vectors.file_builder import Content, canonical
from tools.conformance_vectors.int_dict_builder import Book, Matrix, tunstall
from tools.conformance_vectors.int_group_builder import Groups

ONE = 0x3F80  # 1 as BF16
BOOK = tunstall(8, 0.885)  # for masks
UNARY = tunstall(9, 0.7)  # for refinements

BASE = [[1, 0, -1, 0, 0], [0, 0, 1, 1, -1]]
LEVELS = [[1, 0, -3, 0, 0], [0, 0, 2, 1, -5]]
LOW_HIGH = bf16(-0.5, 0.75, -3, 0.1)


def small() -> Content:
    """One raw tensor of three bytes: preamble, 3 bytes and 61 zero bytes, index, one record."""
    return Content().tensor("a", "U8", [3], b"abc")


def mixed() -> Content:
    """All kinds of objects.

    Extents: 0 and 1 attachments, 2 dictionary, 3 raw, 4 int-dict, 5 int-group.
    """
    content = Content().attach("a.json", b"{}").attach("b.txt", b"text").dictionary(BOOK)
    content.tensor("a-raw", "U16", [2], b"\1\2\3\4").int_dict("b-dict", "F32", symmetric([1]))
    return content.int_group("c-group", "F32", Groups([[9]], [ONE], 4))


def unknown(**keys: Any) -> Content:
    """A tensor with an encoding that no reader knows, so that it may have any other keys."""
    return Content().tensor("a", "U8", [3], b"abc", encoding="future", **keys)


def coded(
    matrix: Matrix, book: Book = BOOK, dtype: str = "F32", unary: Book = UNARY, **defects: Any
) -> Content:
    """An int-dict matrix after its dictionaries; ``defects`` are those of ``Matrix.extent``."""
    content = Content().dictionary(book)
    if matrix.refined:
        content.dictionary(unary)
    return content.int_dict("w", dtype, matrix, defects=defects)


def symmetric(*levels: Sequence[int], **options: Any) -> Matrix:
    """A matrix with a scale of 1 for each row."""
    return Matrix(levels, [ONE] * len(levels), symmetric=True, **options)


def with_text(content: Content, old: str, new: str) -> bytes:
    """The file with its index's text changed in one place."""
    text = canonical(content.index)
    assert text.count(old.encode()) == 1, old
    return content.pack(text=text.replace(old.encode(), new.encode()))


def noise(count: int, zeros_in_16: int, seed: int, most: int = 1) -> list[int]:
    """Levels from a small generator that any language has: x -> 1664525 x + 1013904223 mod 2^32.

    Of the non-zeros, each magnitude up to ``most`` occurs half as often as the one before.
    """
    result = []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        trailing_ones = f"{seed >> 4:028b}"[::-1].index("0")
        level = min(1 + trailing_ones, most) * (1 - 2 * (seed >> 27 & 1))
        result.append(0 if seed >> 28 < zeros_in_16 else level)
    return result


def rows(levels: Sequence[int], columns: int) -> list[list[int]]:
    """``levels`` cut into rows."""
    return [list(levels[at : at + columns]) for at in range(0, len(levels), columns)]
