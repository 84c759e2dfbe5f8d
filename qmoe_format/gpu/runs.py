"""Runs of gap codes, ``kernels/runs.cu``: the form of ``int-dict`` for products, made on the GPU.

The kernels that read codewords as they are stored need a look-up in a table, a scan and shuffles
for every step of a warp. Here a lane has codes of its own, and adds for each of them one x whose
address depends on nothing else. That takes more memory than the codewords, and much less time.

Where a stack has runs, products and decoding read them, and its codewords are gone. It has none,
and keeps its codewords, if ``choose`` says so or memory is short.

    offsets   uint32 [experts, groups + 1]: the first code of each group, and how many there are
    starts    uint16 [experts, groups, 32]: 32 * (slot + 1) + bank of the landing before each run
    order     uint16 [experts, rows]: the rows, group after group
    bases     uint64 [experts]: the first line of each matrix in ``words``
    words     uint32 [lines, 32]: a lane's codes one after another; GUARD lines are read beyond
    row_scale, column_scale: as in the stack, but the former's rows in that order
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

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
MOST_ROWS = 1 << 16  # so that a row's number has 16 bits
# Fewer lanes make fewer groups, each with 64 bytes of starts and some 100 instructions, but more
# lines of x, and longer runs. With a run for so many columns, starts take 1/32 of a bit per weight.
COLUMNS_PER_LANE = 1024
# More lanes where there are few rows: most warps of an H100 have something to do if eight or more
# such matrices are multiplied at once.
ROWS_TIMES_LANES = 4096


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
    """Runs in a device's memory.

    Attributes:
        arrays: by the names above, in the order of the kernels' parameters.
        highest: of all levels' magnitudes.
    """

    layout: RunLayout
    arrays: dict[str, Any]
    highest: int

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(int(array.nbytes) for array in self.arrays.values())


def choose(stack: DictLayout, limits: DeviceLimits) -> RunLayout | None:
    """How to cut the matrices of ``stack``; None if that does not pay.

    It does not for large levels, which are as many landings, for rows so long that their x does not
    fit into shared memory, and for more than ``MOST_ROWS``.
    """
    weights = stack.experts * stack.rows * stack.columns
    if not weights or stack.landings > MOST_LANDINGS * weights or stack.rows > MOST_ROWS:
        return None
    # Two bits more for a code's time.
    bits = min(range(3, 9), key=lambda bits: (bits + 2) * _codes_per_weight(stack, bits))
    wanted = max(stack.columns // COLUMNS_PER_LANE, ROWS_TIMES_LANES // stack.rows, 2)
    for lanes in (2, 4, 8, 16):
        shape = stack.experts, stack.rows, stack.columns
        found = RunLayout(*shape, bits, lanes, stack.scales, stack.column_scales)
        fits = found.slots <= MOST_SLOTS and shared_bytes(found) <= limits.shared_bytes
        if fits and (2 * lanes > wanted or lanes == 16):
            return found
    return None


def expected_bytes(stack: DictLayout, layout: RunLayout) -> int:
    """How much memory the runs of ``stack`` may take, if rows are about equally dense."""
    weights = stack.experts * stack.rows * stack.columns
    codes = 1.2 * _codes_per_weight(stack, layout.bits) * weights
    starts = stack.experts * layout.groups * 32 * (2 + layout.bits)
    scales = stack.experts * 2 * (stack.rows * stack.scales + stack.columns * stack.column_scales)
    return int(codes * layout.bits / 8) + starts + 2 * stack.experts * stack.rows + scales


def _codes_per_weight(stack: DictLayout, bits: int) -> float:
    """Landings and empty ones between them, if they are independent."""
    places = 2 * stack.experts * stack.rows * stack.columns
    density = min(max(stack.landings / places, 1e-4), 0.5)
    missed = (1 - density) ** ((1 << bits) - 1)
    return max(2 * density * (1 + missed / (1 - missed)), 2 * stack.landings / places)


def shared_bytes(layout: RunLayout) -> int:
    """Shared memory of a product: a line of x for each slot, and one before them."""
    return LINE_BYTES * (layout.slots + 1)


@lru_cache(maxsize=1024)
def product(layout: RunLayout, x: str, y: str, pairs: str) -> Kernel:
    """The kernel for y = W x, x and y of these element types; ``pairs``: ``ONE`` or ``LIST``."""
    return _product(layout, "product", "run_product", X_TYPE=x, Y_TYPE=y, PAIRS=pairs)


@lru_cache(maxsize=1024)
def inputs(layout: RunLayout, x: str, index: str, stacks: int) -> Kernel:
    """The kernel for an expert's gate and up, of one stack or two; ``index``: of experts."""
    return _product(layout, "inputs", "run_inputs", X_TYPE=x, Y_TYPE=x, INDEX=index, STACKS=stacks)


@lru_cache(maxsize=1024)
def output(layout: RunLayout, x: str, index: str, stacks: int) -> Kernel:
    """The kernel for an expert's down, from what ``inputs`` makes."""
    files, types = ("gate", "run_output"), {"X_TYPE": x, "Y_TYPE": "fp32", "INDEX": index}
    return _product(layout, "output", *files, **types, STACKS=stacks)


def _product(layout: RunLayout, name: str, *files: str, **more: str | int) -> Kernel:
    text = source(
        *("types", "runs", "run_lane", "run_groups", *files),
        **defines(layout),
        **more,
        COLUMNS=layout.columns,
        LINE_BYTES=LINE_BYTES,
        SLOTS=layout.slots,
        SCALES=layout.scales,
        COLUMN_SCALES=int(layout.column_scales),
        THREADS=THREADS,
    )
    return Kernel(name, text, THREADS, shared_bytes(layout))


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


def places(layout: RunLayout) -> npt.NDArray[np.int32]:
    """Where a matrix has its shortest row, the next one, and so on [rows].

    Half rows of a group take as much memory, and time, as the longest of them, so rows of a group
    are of like length. Groups of long rows and of short ones alternate, for a block takes groups
    that lie together, and blocks should have equal work.
    """
    groups, rows = layout.groups, 16 // layout.lanes
    step = round(groups * (math.sqrt(5) - 1) / 2)  # the golden section spreads any number evenly
    while math.gcd(step, groups) > 1:
        step += 1
    group = np.arange(groups)[::-1] * step % groups  # the last one, which may have fewer rows, is 0
    rank = group[:, None] * rows + np.arange(rows) - (groups * rows - layout.rows)
    return np.argsort(rank[rank >= 0]).astype(np.int32)


def order(
    layout: RunLayout, sizes: Any, places: Any, row_scale: Any, arrays: dict[str, Any]
) -> Launch:
    """Make the arrays ``order`` and ``row_scale`` from ``sizes`` and the scales of the stack."""
    text = source("types", "run_rows", THREADS=TRANSCODE_THREADS, SCALES=layout.scales)
    kernel = Kernel("run_rows", text, TRANSCODE_THREADS)
    made = (arrays["order"], arrays["row_scale"])
    blocks = layout.experts * -(-layout.rows // kernel.threads)
    sizes_of = _shape(layout, layout.experts)[:2]
    return Launch(kernel, blocks, (sizes, places, row_scale, *made, *sizes_of))


def offsets(layout: RunLayout, sizes: Any, arrays: dict[str, Any]) -> Launch:
    """Make the array ``offsets`` from ``sizes`` and ``order``."""
    text = source("types", "scan", "runs", "run_offsets", **_transcoding(layout))
    made = (arrays["order"], arrays["offsets"])
    arguments = (sizes, *made, *_shape(layout, layout.experts)[:2])
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
    of_matrices = tuple(arrays[name][first:] for name in ("order", "offsets", "bases"))
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
