"""Runs of gap codes, ``kernels/runs.cu``: the form of ``int-dict`` for products, made on the GPU.

The kernels that read codewords as they are stored need a look-up in a table, a scan and shuffles
for every step of a warp. Here a lane has codes of its own, and adds for each of them one x whose
address depends on nothing else. That takes more memory than the codewords, and much less time.

Where a stack has runs, products and decoding read them, and its codewords are gone. It has none,
and keeps its codewords, if ``choose`` says so or memory is short.

    offsets   uint32 [experts, groups + 1]: the first code of each group, and how many there are
    starts    uint16 [experts, groups, 32]: 32 * (slot + 1) + bank of the landing before each run
    bases     uint64 [experts]: the first line of each matrix in ``words``
    words     uint32 [lines, 32]: a lane's codes one after another; GUARD lines are read beyond
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.kernel_text import source
from qmoe_format.gpu.launch import Kernel, Launch

THREADS = 1024
TRANSCODE_THREADS = 256
DECODE_THREADS = 128  # so many that levels of wide rows fit wherever their x does
GUARD = 16  # lines
LINE_BYTES = 128  # x of a slot, once for each lane of a warp
MOST_SLOTS = 2046  # so that a start has 16 bits
MOST_LANDINGS = 1.5  # per weight
# A group's starts take 64 bytes: with a run for so many columns, 1/16 of a bit per weight.
COLUMNS_PER_LANE = 512
# More lanes where there are few rows: a warp of an H100 has something to do if eight such matrices
# are multiplied at once.
ROWS_TIMES_LANES = 8192


@dataclass(frozen=True, slots=True)
class RunLayout:
    """How matrices of one shape are cut into runs.

    Attributes:
        bits: of a code.
        lanes: to a half row, a power of two up to 16.
        scales: per row, 1 or 2.
    """

    experts: int
    rows: int
    columns: int
    bits: int
    lanes: int
    scales: int
    column_scales: bool

    @property
    def groups(self) -> int:
        """Parts of a matrix that a warp takes at a time."""
        return -(-self.rows * self.lanes // 16)

    @property
    def slots(self) -> int:
        """Places of a region; x of each takes a line of 128 bytes in shared memory."""
        reach = (1 << self.bits) - 1
        return reach * -(-math.ceil(self.columns / self.lanes) // (reach - 1))


@dataclass(frozen=True, slots=True)
class PackedRuns:
    """Runs in a device's memory, by the names above; ``highest``: of all levels' magnitudes."""

    layout: RunLayout
    arrays: dict[str, Any]
    highest: int

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(int(array.nbytes) for array in self.arrays.values())


def choose(stack: DictLayout, limits: DeviceLimits) -> RunLayout | None:
    """How to cut the matrices of ``stack``; None if that does not pay.

    It does not for large levels, which are as many landings, and for rows so long that their x does
    not fit into shared memory.
    """
    weights = stack.experts * stack.rows * stack.columns
    if not weights or stack.landings > MOST_LANDINGS * weights:
        return None
    wanted = max(stack.columns // COLUMNS_PER_LANE, ROWS_TIMES_LANES // stack.rows, 2)
    found = RunLayout(
        stack.experts,
        stack.rows,
        stack.columns,
        # Two bits more for a code's time.
        bits=min(range(3, 9), key=lambda bits: (bits + 2) * _codes_per_weight(stack, bits)),
        lanes=1 << min(wanted.bit_length() - 1, 4),
        scales=stack.scales,
        column_scales=stack.column_scales,
    )
    fits = found.slots <= MOST_SLOTS and shared_bytes(found) <= limits.shared_bytes
    return found if fits else None


def expected_bytes(stack: DictLayout, layout: RunLayout) -> int:
    """How much memory the runs of ``stack`` may take, if rows are about equally dense."""
    weights = stack.experts * stack.rows * stack.columns
    codes = 1.2 * _codes_per_weight(stack, layout.bits) * weights
    return int(codes * layout.bits / 8) + stack.experts * layout.groups * 32 * (2 + layout.bits)


def _codes_per_weight(stack: DictLayout, bits: int) -> float:
    """Landings and empty ones between them, if they are independent."""
    places = 2 * stack.experts * stack.rows * stack.columns
    density = min(max(stack.landings / places, 1e-4), 0.5)
    missed = (1 - density) ** ((1 << bits) - 1)
    return max(2 * density * (1 + missed / (1 - missed)), 2 * stack.landings / places)


def shared_bytes(layout: RunLayout) -> int:
    """Shared memory of a product: a line of x for each slot, and one before them."""
    return LINE_BYTES * (layout.slots + 1)


def product(layout: RunLayout, x: str, y: str, pairs: str) -> Kernel:
    """The kernel for y = W x, x and y of these element types; ``pairs``: ``ONE`` or ``LIST``."""
    text = source(
        *("types", "runs", "run_lane", "run_product"),
        **defines(layout),
        X_TYPE=x,
        Y_TYPE=y,
        PAIRS=pairs,
        COLUMNS=layout.columns,
        LINE_BYTES=LINE_BYTES,
        SLOTS=layout.slots,
        SCALES=layout.scales,
        COLUMN_SCALES=int(layout.column_scales),
        THREADS=THREADS,
    )
    return Kernel("product", text, THREADS, shared_bytes(layout))


def decode(layout: RunLayout, y: str, refined: bool) -> Kernel:
    """The kernel that writes W; ``refined``: some levels are beyond 1."""
    text = source(
        *("types", "runs", "run_lane", "run_decode"),
        **defines(layout),
        Y_TYPE=y,
        LINE_BYTES=layout.lanes,  # a level takes a byte
        SCALES=layout.scales,
        COLUMN_SCALES=int(layout.column_scales),
        REFINED=int(refined),
        THREADS=DECODE_THREADS,
    )
    shared = DECODE_THREADS // 2 * (layout.slots + 2)
    return Kernel("decode", text, DECODE_THREADS, shared, together=True)


def sizes(layout: RunLayout, levels: Any, found: Any, highest: Any, limits: DeviceLimits) -> Launch:
    """Count the landings of ``levels`` fp16 [count, rows, columns].

    They go to ``found``, uint32 [count, rows, 2]; the highest magnitude to ``highest``, int32 [1],
    if it is more than is there.
    """
    text = source("types", "scan", "runs", "run_walk", "run_sizes", **_transcoding(layout))
    arguments = (levels, found, highest, *_shape(layout, len(levels)))
    return _by_warps("run_sizes", text, 2 * len(levels) * layout.rows, limits, arguments)


def offsets(layout: RunLayout, sizes: Any, found: Any) -> Launch:
    """Make ``found``, the array ``offsets``, from ``sizes``."""
    text = source("types", "scan", "runs", "run_offsets", **_transcoding(layout))
    arguments = (sizes, found, *_shape(layout, layout.experts)[:2])
    return Launch(Kernel("run_offsets", text, 32), layout.experts, arguments)


def codes(
    layout: RunLayout,
    levels: Any,
    arrays: dict[str, Any],
    first: int,
    limits: DeviceLimits,
) -> Launch:
    """Write the runs of ``levels``, matrices from ``first`` on, into ``words`` and ``starts``."""
    text = source("types", "scan", "runs", "run_walk", "run_codes", **_transcoding(layout))
    of_matrices = (arrays["offsets"][first:], arrays["bases"][first:])
    written = (arrays["words"], arrays["starts"][first:])
    arguments = (levels, *of_matrices, *written, *_shape(layout, len(levels)))
    warps = len(levels) * layout.groups * 32 // layout.lanes
    return _by_warps("run_codes", text, warps, limits, arguments)


def _shape(layout: RunLayout, count: int) -> tuple[np.int32, ...]:
    return np.int32(count), np.int32(layout.rows), np.int32(layout.columns)


def defines(layout: RunLayout) -> dict[str, int]:
    return {"BITS": layout.bits, "LANES": layout.lanes}


def _transcoding(layout: RunLayout) -> dict[str, int]:
    return {**defines(layout), "THREADS": TRANSCODE_THREADS}


def _by_warps(
    name: str, text: str, warps: int, limits: DeviceLimits, arguments: tuple[Any, ...]
) -> Launch:
    """A launch whose warps share out the work."""
    kernel = Kernel(name, text, TRANSCODE_THREADS)
    return Launch(kernel, kernel.blocks(32 * warps, limits), arguments)
