"""QMoE's own encoding, kept for comparison."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import qmoe_scheme
from tests.codec.strategies import random_levels


@pytest.mark.parametrize(("rows", "columns"), [(50, 3072), (3, 7), (1, 1), (4, 28)])
def test_round_trip(rows: int, columns: int) -> None:
    for zero_fraction in (0.0, 0.885, 1.0):
        levels = random_levels(rows, columns, zero_fraction)
        codewords, offsets = qmoe_scheme.encode(levels)
        out = np.empty_like(levels)
        qmoe_scheme.decode(codewords, offsets, out)
        assert np.array_equal(out, levels)


def test_the_rate_matches_the_paper() -> None:
    levels = random_levels(200, 3072, 0.885)
    codewords, _ = qmoe_scheme.encode(levels)
    assert 16 * codewords.size / levels.size == pytest.approx(0.738, abs=0.003)
