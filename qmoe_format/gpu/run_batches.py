"""Products of several tokens an expert from runs, on tensor cores: ``kernels/run_batch.cu``.

A group's codes are turned once into marks for up to ``TOKENS`` tokens: one bit for each place and
sign, or where levels go beyond 1, each place's level in 4 or 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.kernel_text import source
from qmoe_format.gpu.launch import Kernel
from qmoe_format.gpu.runs import RunLayout, defines

THREADS = 512
TERM_THREADS = 256
WARPS = THREADS // 32
OLDEST = 80  # the compute capability that has mma.m16n8k16 of bf16
TOKENS = 64  # of a tile: more would leave too much to the blocks of experts that many tokens want
WARP_ROWS = 48  # of a warp: their sums for 16 tokens and x fit into 128 registers
# In shared memory, so that four warps or more share a row. A tensor core does not round but cuts:
# each of eight products, a bit below the last one of their sum, and then the sum. That is an error
# of 10/8 x 2^-24 at worst for each of the columns that a warp adds up; [M-1] allows 2^-24 for every
# column of the row. A level is one product, however high. Of few columns, a warp may have most;
# there is little to gain, too.
MOST_MARKED_ROWS = 4 * WARP_ROWS
FEWEST_COLUMNS = 256
MAGNITUDES = {1: 1, 4: 7, 8: 63}  # the highest one for so many bits of a mark


@dataclass(frozen=True, slots=True)
class Batch:
    """How a stack is multiplied by several tokens.

    Attributes:
        layout: of the runs.
        place_bits: of a mark: 1 in ternary matrices.
        groups: so many are in shared memory at once.
        x: element type of x.
    """

    layout: RunLayout
    place_bits: int
    groups: int
    x: str

    @property
    def places(self) -> int:
        """Of a row, in the order of ``kernels/run_order.cu``."""
        return 32 * self.layout.lanes * _lines(self.layout)

    @property
    def terms(self) -> int:
        """How many numbers of 16 bits add up to one of x, times a column scale of 8 bits."""
        if self.layout.column_scales:
            return 2 if self.x == "bf16" else 3
        return 3 if self.x == "fp32" else 1

    @property
    def term(self) -> str:
        """Their element type: bf16 has the range of all products."""
        return "fp16" if self.x == "fp16" and not self.layout.column_scales else "bf16"

    @property
    def fewest(self) -> int:
        """Tokens of an expert from which on this is faster than one after another.

        A code takes 10 instructions instead of 6, but once for all tokens; a weight takes 2.6 more.
        The rarer codes are, the more that is: 2.7 tokens' at 60 % zeros, with 0.43 codes of 4 bits
        a weight, 5.3 at 88.5 %, with 0.12 of 6 bits. And there is a launch more. Beyond levels of 1
        a code takes 14 instructions: 0.7 tokens' more.
        """
        return self.layout.bits + (self.place_bits > 1)

    @property
    def line_bytes(self) -> int:
        """Of a line of marks: a word for each region of a group's half rows, or of its rows."""
        return 128 if self.place_bits == 1 else 64

    @property
    def ring(self) -> int:
        """Bytes from a region's end to the beginning of the next one."""
        between = 1 if self.place_bits == 1 else 16 // self.layout.lanes
        return self.line_bytes * self.layout.slots - 4 * between

    def _source(self, *names: str, pairs: str, threads: int, **more: str | int) -> str:
        return source(
            *names,
            **defines(self.layout),
            COLUMNS=self.layout.columns,
            SLOTS=self.layout.slots,
            COLUMN_SCALES=int(self.layout.column_scales),
            PLACE_BITS=self.place_bits,
            TERM_TYPE=self.term,
            TERMS=self.terms,
            PAIRS=pairs,
            TOKENS=TOKENS,
            THREADS=threads,
            **more,
        )

    def prepare(self, pairs: str) -> Kernel:
        """The kernel that cuts x into terms and sorts the pairs."""
        files = ("types", "runs", "run_order", "sort", "run_terms")
        text = self._source(*files, pairs=pairs, threads=TERM_THREADS, X_TYPE=self.x, SOME=TOKENS)
        return Kernel("run_terms", text, TERM_THREADS)

    def product(self, y: str, pairs: str) -> Kernel:
        """The kernel for y = W x; ``pairs``: ``ONE`` or ``GROUPS``."""
        marks = ("run_marks",) if self.place_bits == 1 else ("halves", "run_levels")
        text = self._source(
            *("types", "runs", "run_lane", "run_order", "share", "tiles", "mma"),
            *(*marks, "run_batch"),
            pairs=pairs,
            threads=THREADS,
            Y_TYPE=y,
            SCALES=self.layout.scales,
            LINE_BYTES=self.line_bytes,
            BATCH=self.groups,
            WARP_ROWS=WARP_ROWS,
        )
        shared = self.groups * _group_bytes(self.layout, self.place_bits) + _sum_bytes()
        return Kernel("product", text, THREADS, shared)


@lru_cache(maxsize=1024)
def choose(layout: RunLayout, highest: int, x: str, limits: DeviceLimits) -> Batch | None:
    """How to multiply matrices with magnitudes up to ``highest``.

    None on old GPUs, for short or very long rows, and for levels beyond 63.
    """
    place_bits = next((bits for bits, most in MAGNITUDES.items() if highest <= most), None)
    if place_bits is None:
        return None
    tile = (16 if layout.scales == 1 else 8) * layout.lanes // 16  # groups of a tile of A
    room = max(limits.shared_bytes - _sum_bytes(), 0)
    fit = min(room // _group_bytes(layout, place_bits), MOST_MARKED_ROWS * layout.lanes // 16)
    # A warp takes a group at a time: equally many each, if there are so many.
    groups = fit // WARPS * WARPS or fit // max(tile, 1) * tile
    short = layout.columns < FEWEST_COLUMNS or layout.lanes < 2
    if limits.capability < OLDEST or short or not groups:
        return None
    return Batch(layout, place_bits, groups, x)


def _lines(layout: RunLayout) -> int:
    """Of marks, as in ``kernels/run_order.cu``."""
    multiple = max(4 // layout.lanes, 1)
    return (layout.slots // 32 + multiple) // multiple * multiple


def _group_bytes(layout: RunLayout, place_bits: int) -> int:
    if place_bits == 1:
        return 128 * _lines(layout) + 16
    return 64 * place_bits * _lines(layout) + 256 // layout.lanes


def _sum_bytes() -> int:
    """Partial sums of 8 tokens by all warps."""
    return 4 * 8 * WARPS * (WARP_ROWS + 4)
