"""Runs of gap codes as ``kernels/runs.cu`` describes them, slowly, one landing at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import EncodedMatrix, decode
from qmoe_format.gpu.packing import Matrix, PackedStack, pack
from qmoe_format.gpu.runs import GUARD, PackedRuns, RunLayout, places


def stack(members: Sequence[Matrix], bits: int, lanes: int) -> PackedStack:
    """Matrices and their runs."""
    coded = [member for member in members if isinstance(member, EncodedMatrix)]
    scales, column_scales = coded[0].row_scale.shape[1], coded[0].column_scale is not None
    shape = (len(coded), coded[0].rows, coded[0].columns)
    levels = np.stack([decode(member.levels) for member in coded])
    layout = RunLayout(*shape, bits, lanes, scales, column_scales)
    packed, arrays = pack(coded), runs(levels, layout)
    row_scale = packed.arrays["row_scale"][np.arange(len(coded))[:, None], arrays["order"]]
    arrays |= {"row_scale": row_scale, "column_scale": packed.arrays["column_scale"]}
    highest = int(abs(levels.astype(int)).max(initial=0))
    return replace(packed, arrays={}, runs=PackedRuns(layout, arrays, highest))


def landings(levels: npt.NDArray[np.int_], layout: RunLayout) -> list[int]:
    """The places where a half row's path lands; of ``levels`` [columns] those above zero count."""
    reach = (1 << layout.bits) - 1
    by_place = {}
    for column, level in enumerate(levels.tolist()):
        slot, region = divmod(column, layout.lanes)
        by_place[region * layout.slots + slot + slot // (reach - 1)] = level
    path, here = [], -1
    for place in sorted(place for place, level in by_place.items() if level > 0):
        while place - here > reach:
            here = (here + reach + 1) // reach * reach - 1
            path.append(here)
        path += [place] * by_place[place]
        here = place
    return path


def runs(matrices: npt.NDArray[np.int8], layout: RunLayout) -> dict[str, npt.NDArray[Any]]:
    """Pack levels [experts, rows, columns]: all arrays but the scales."""
    reach, lanes = (1 << layout.bits) - 1, layout.lanes
    experts, rows, _ = matrices.shape
    offsets = np.zeros((experts, layout.groups + 1), np.uint32)
    starts = np.zeros((experts, layout.groups, 32), np.uint16)
    order = np.zeros((experts, rows), np.uint16)
    lines: list[npt.NDArray[np.uint32]] = []
    bases = []
    for e, levels in enumerate(matrices.astype(int)):
        paths = [[landings(sign * row, layout) for sign in (1, -1)] for row in levels]
        lengths = [max(map(len, halves)) for halves in paths]
        order[e, places(layout)] = np.argsort(lengths, stable=True)
        columns_of_codes: list[list[int]] = [[] for _ in range(32)]
        for group in range(layout.groups):
            first = group * 16 // lanes
            halves = [path for row in order[e, first : first + 16 // lanes] for path in paths[row]]
            halves += [[] for _ in range(32 // lanes - len(halves))]
            count = max(1, *(-(-len(path) // lanes) for path in halves))
            end = int(offsets[e, group]) + count
            if group == layout.groups - 1:
                count += -end % 32
            offsets[e, group + 1] = offsets[e, group] + count
            for half, path in enumerate(halves):
                last = path[-1] if path else -1
                rest = last if last < 0 else last // reach * reach + reach - 1
                path += [rest] * (count * lanes - len(path))
                codes = [after - before for before, after in pairwise([-1, *path])]
                for run in range(lanes):
                    bank = half * lanes + run
                    columns_of_codes[bank] += codes[run * count : (run + 1) * count]
                    before = path[run * count - 1] if run else -1
                    region, slot = divmod(before, layout.slots) if before >= 0 else (0, -1)
                    starts[e, group, bank] = 32 * (slot + 1) + half * lanes + region
        bits = np.array(columns_of_codes)[:, :, None] >> np.arange(layout.bits) & 1
        packed = np.packbits(bits.reshape(32, -1).astype(np.uint8), axis=1, bitorder="little")
        bases.append(sum(map(len, lines)))
        lines.append(packed.view("<u4").T)
    words = np.concatenate([*lines, np.zeros((GUARD, 32), np.uint32)])
    return {
        "offsets": offsets,
        "starts": starts,
        "order": order,
        "bases": np.array(bases, np.uint64),
        "words": np.ascontiguousarray(words),
    }
