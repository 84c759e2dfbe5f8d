"""Matrices of SPEC.md section 8, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tools.conformance_vectors.exact_numbers import ZERO, Number, number, product
from tools.conformance_vectors.int_dict_builder import laid_out, patched


@dataclass
class Groups:
    """``codes`` are the integers u; scales are bits of BF16, rows × groups, flat."""

    codes: Sequence[Sequence[int]]
    scales: Sequence[int]
    bits: int
    grid: str = "linear"
    group_size: int = 0
    zero_points: Sequence[int] | None = None
    columns: int = 0  # for a matrix without rows

    def __post_init__(self) -> None:
        self.columns = len(self.codes[0]) if self.codes else self.columns
        self.groups = -(-self.columns // self.group_size) if self.group_size else 1
        assert len(self.scales) == len(self.codes) * self.groups
        assert self.zero_points is None or len(self.zero_points) == len(self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.columns

    @property
    def keys(self) -> dict[str, Any]:
        """Those of the index entry."""
        return {
            "bits": self.bits,
            "grid": self.grid,
            "zero_points": self.zero_points is not None,
        }

    @property
    def plain(self) -> bytes:
        """The integers as bytes."""
        return bytes(u for row in self.codes for u in row)

    def value(self, row: int, column: int) -> Number:
        """Section 8.1."""
        u, half = self.codes[row][column], 2 ** (self.bits - 1)
        group = row * self.groups + (column // self.group_size if self.group_size else 0)
        scale = number(self.scales[group], "BF16")
        if self.grid == "log":
            exponent = u if u < half else u - half
            return product((1 if u < half else -1) / Fraction(2) ** exponent, scale)
        z = half if self.zero_points is None else self.zero_points[group]
        return product(Fraction(u - z), scale) if u != z else ZERO

    def extent(
        self,
        group_size: int | None = None,
        zero: bytes = bytes(12),
        gaps: Mapping[int, Mapping[int, int]] | None = None,
        patches: Mapping[int, int] | None = None,
    ) -> bytes:
        """The first two replace fields of the header; ``gaps`` as in ``laid_out``; ``patches``
        are those of the section rows."""
        header = struct.pack("<I", self.group_size if group_size is None else group_size) + zero
        rows = b""
        for row in self.codes:
            number = sum(u << column * self.bits for column, u in enumerate(row))
            size = -(-len(row) * self.bits // 8)
            rows += number.to_bytes(size + -size % 16, "little")
        sections = [
            struct.pack(f"<{len(self.scales)}H", *self.scales),
            bytes(self.zero_points or ()),
            patched(rows, patches or {}),
        ]
        return laid_out(header, sections, 0, gaps or {})
