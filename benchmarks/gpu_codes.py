"""Runs of random levels, without making them: how many codes, and how much memory."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from qmoe_format.gpu import runs
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.runs import RunLayout
from tests.gpu.variants import H200

MOST_ROWS = 2048  # that are drawn


class Bits(NamedTuple):
    """Bits per weight: all that is kept of a matrix, row scales included, and starts alone."""

    all: float
    starts: float


def layout_of(rows: int, columns: int, zeros: float) -> RunLayout:
    """What ``gpu.upload`` chooses for independent levels."""
    landings = round((1 - zeros) * rows * columns)
    shape = {"experts": 1, "rows": rows, "columns": columns}
    stack = SimpleNamespace(**shape, landings=landings, scales=2, column_scales=False)
    found = runs.choose(cast(DictLayout, stack), H200)
    assert found is not None
    return found


def as_measured(layout: RunLayout) -> RunLayout:
    """With as many lanes as when benchmarks/results/gpu.json was measured."""
    wanted = max(layout.columns // 512, 8192 // layout.rows, 2)
    return replace(layout, lanes=1 << min(wanted.bit_length() - 1, 4))


def codes_of(layout: RunLayout, zeros: float, ordered: bool = True) -> float:
    """Codes of a lane in a group, the mean over groups.

    ``ordered``: rows of a group are of like length, as the transcoder makes them; otherwise they
    come as in the file.
    """
    longer = _longer_halves(layout, zeros)
    if ordered:
        longer = np.sort(longer)
    groups = np.arange(0, len(longer), 16 // layout.lanes)
    longest = np.maximum.reduceat(longer, groups)
    return float(np.maximum(1, -(-longest // layout.lanes)).mean())


def bits_of(layout: RunLayout, zeros: float, ordered: bool = True) -> Bits:
    """Memory of a matrix in a stack of many: without the lines that are read beyond the last."""
    lines = math.ceil(layout.groups * codes_of(layout, zeros, ordered) / 32) * layout.bits
    starts = 16 * 32 * layout.groups
    offsets, base, order = 32 * (layout.groups + 1), 64, 16 * layout.rows
    scales = 16 * layout.scales * layout.rows
    weights = layout.rows * layout.columns
    every = 32 * 32 * lines + starts + offsets + base + order + scales
    return Bits(every / weights, starts / weights)


@cache
def _longer_halves(layout: RunLayout, zeros: float) -> npt.NDArray[np.int_]:
    """Codes of the longer half of each of some random rows."""
    reach = (1 << layout.bits) - 1
    slot, region = np.divmod(np.arange(layout.columns), layout.lanes)
    places = np.sort(region * layout.slots + slot + slot // (reach - 1))
    random = np.random.default_rng(0)

    def codes(at: npt.NDArray[np.int_]) -> int:
        before = np.concatenate([[-1], at[:-1]])
        empty = (before + reach + 1) // reach * reach - 1  # the first empty place after
        jumps = np.where(at - before > reach, 1 + np.maximum(0, (at - empty - 1) // reach), 0)
        return at.size + int(jumps.sum())

    found = []
    for _ in range(min(layout.rows, MOST_ROWS)):
        share, half = random.random(places.size), (1 - zeros) / 2
        found.append(max(codes(places[share < half]), codes(places[share >= 1 - half])))
    return np.array(found)
