"""Levels and dictionaries of every kind, for property tests."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt

from qmoe_format.codec import Dictionary, EncodedBits, EncodedLevels, fit_dictionary


def random_levels(
    rows: int, columns: int, zero_fraction: float, seed: int = 0, most: int = 1
) -> npt.NDArray[np.int8]:
    """Independent levels int8 [rows, columns]; magnitudes 1 to ``most``, small ones more often."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (rows, columns), dtype=np.int8) * 2 - 1
    levels = np.where(rng.random((rows, columns)) < zero_fraction, 0, signs).astype(np.int8)
    if most > 1:
        magnitudes = 1 + (most * rng.random((rows, columns)) ** 3).astype(np.int8)
        levels *= np.minimum(magnitudes, most).astype(np.int8)
    return levels


@lru_cache(maxsize=64)
def dictionary(zero_fraction: float, width: int) -> Dictionary:
    """Small widths only where many are made: fitting 16 bits takes a second."""
    return fit_dictionary(zero_fraction, width)


dictionaries = st.builds(
    dictionary, st.sampled_from([0.03, 0.3, 0.6, 0.885, 0.97]), st.sampled_from([8, 9, 11, 12])
)


@st.composite
def levels(draw: Any, max_rows: int = 70, max_columns: int = 600) -> npt.NDArray[np.int8]:
    """Any shape, empty ones included; any share of zeros, runs and constant rows included."""
    rows = draw(st.integers(0, max_rows))
    columns = draw(st.integers(0, max_columns))
    most = draw(st.sampled_from([1, 1, 2, 5, 127]))
    matrix = random_levels(
        rows,
        columns,
        draw(st.sampled_from([0.0, 0.1, 0.6, 0.9, 0.99, 1.0])),
        draw(st.integers(0, 9)),
        most,
    )
    for row in draw(st.lists(st.integers(0, max(rows - 1, 0)), max_size=3)) if rows else []:
        matrix[row] = draw(st.sampled_from([-most, -1, 0, 1, most]))
    return matrix


def with_string(encoded: EncodedLevels, name: str, bits: EncodedBits) -> EncodedLevels:
    """``encoded`` with another ``mask`` or ``refinement``."""
    if name == "mask":
        return replace(encoded, mask=bits)
    return replace(encoded, refinement=bits)
