"""Seconds that counted instructions take on an H100.

The constants come from data sheets, from NVIDIA's guides, and from small kernels that did one
thing; some are assumed; none is fitted to the figures that are predicted. Left out are caches,
clocks that change, and that a warp alone on its scheduler waits for each code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks import gpu_parts
from benchmarks.gpu_parts import Decoding, Marking, Walk
from qmoe_format.gpu import run_batches, runs
from qmoe_format.gpu.launch_plan import shares
from qmoe_format.gpu.run_batches import Batch
from qmoe_format.gpu.runs import RunLayout
from tests.gpu.variants import H200

CLOCK = 1.755e9  # under load, of both cards
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes/s, as measured by reading
# From L2, by all multiprocessors: chipsandcheese.com, "Nvidia's H100: Funny L2, and Tons of
# Bandwidth", of a card with fewer of them.
L2_BANDWIDTH = 5.5e12
SCHEDULERS = 4  # of a multiprocessor
ISSUED = SCHEDULERS * 0.80  # instructions of warps per clock, of all schedulers
WAVEFRONTS = 0.88  # of shared memory per clock
GATHER = 1.58  # wavefronts of one x for each lane of a warp, replayed on random matrices
LAUNCH = 1.3e-6  # from kernel to kernel in a graph
LATENCY = 1.0e-6  # offsets, then words, from memory; the last sums and y
SORTING = 14 * 300 / CLOCK  # 128 pairs by a block: so many waits for L2; assumed

# Clocks of a scheduler for an instruction of a warp.
ISSUE = SCHEDULERS / ISSUED
ALU = 2.0  # 64 lanes of a multiprocessor, by the CUDA programming guide for compute capability 9.0
# m16n8k16 of bf16: int8's m16n8k32, which the data sheet makes as long, took as many ("imma" in
# results/gpu_prototypes.json).
MMA = 6.1
ATOMIC = SCHEDULERS * 2.0  # of shared memory, without a return value or a bank conflict; assumed


class Times(NamedTuple):
    """Seconds of several tokens an expert.

    Attributes:
        first: the kernel that cuts x and sorts pairs.
        marking, products: by instructions.
        x: from L2, while there are products.
        rest: the launch, the prologue, and waiting whenever shared memory is filled.
        bound: what marking, products or x waits for, whichever takes longest.
    """

    first: float
    marking: float
    products: float
    x: float
    rest: float
    bound: str

    @property
    def all(self) -> float:
        """From beginning to end."""
        return self.first + self.marking + max(self.products, self.x) + self.rest


def product(layout: RunLayout, walk: Walk, codes: float, pairs: int) -> dict[str, float]:
    """Seconds on each card for one token and ``pairs`` matrices."""
    blocks, each = shares(layout, pairs, H200)
    turns = math.ceil(pairs * blocks / H200.multiprocessors)
    instructions = runs.THREADS // 32 * walk.prologue + each * walk.instructions(codes)
    wavefronts = layout.slots + each * codes * GATHER
    busy = turns * max(instructions / ISSUED, wavefronts / WAVEFRONTS) / CLOCK
    bits = layout.groups * 32 * (16 + codes * layout.bits) + layout.rows * 32
    return {
        card: LAUNCH + LATENCY + max(busy, pairs * bits / 8 / bandwidth)
        for card, bandwidth in BANDWIDTH.items()
    }


def several(batch: Batch, counted: Marking, cutting: int, codes: float, experts: int) -> Times:
    """Seconds for 16 tokens of each of ``experts``; ``cutting``: as in ``gpu_parts``."""
    layout, warps = batch.layout, run_batches.WARPS
    walk, step, most_tiles = counted.walk, counted.step, gpu_parts.most_tiles(batch)
    of_warps = warps / SCHEDULERS / CLOCK  # seconds, if each takes a clock of its scheduler
    of_group = {
        "issue": ISSUE * walk.instructions(codes),
        "ALU": ALU * walk.alu / 32 * codes,
        "atomics": ATOMIC * codes,
    }
    of_step = {
        "issue": ISSUE * step.issued,
        "ALU": ALU * step.alu,
        "tensor cores": MMA * step.mma,
    }

    def marking(groups: int) -> float:
        return of_warps * math.ceil(groups / warps) * max(of_group.values())

    def products(groups: int) -> float:
        tiles = math.ceil(groups * 16 / layout.lanes / gpu_parts.tile_rows(batch))
        shares = 1  # of the rows; the warps of each share out the steps
        while shares * most_tiles < tiles:
            shares *= 2
        steps = batch.terms * math.ceil(batch.places / 128 / (warps // shares))
        of_tiles = math.ceil(tiles / shares) / most_tiles * max(of_step.values())
        return of_warps * (steps * of_tiles + ISSUE * counted.rest)

    blocks = fills(layout.groups, experts, batch.groups)
    slowest = max(blocks, key=lambda each: sum(marking(n) + products(n) + LATENCY for n in each))
    marks, multiplied = sum(map(marking, slowest)), sum(map(products, slowest))
    # All warps of a block need the same x, which the L1 cache has for all but the first.
    x = sum(map(len, blocks)) * 16 * batch.terms * batch.places * 2 / L2_BANDWIDTH
    vectors = 16 * experts if layout.column_scales else 16
    cut = vectors * batch.places / 32 * cutting / ISSUED / H200.multiprocessors / CLOCK
    first = LAUNCH + max(LATENCY + cut, SORTING)
    rest = LAUNCH + of_warps * ISSUE * walk.prologue + len(slowest) * LATENCY
    if marks > max(multiplied, x):
        bound = f"marks: {max(of_group, key=of_group.__getitem__)}"
    elif multiplied > x:
        bound = f"products: {max(of_step, key=of_step.__getitem__)}"
    else:
        bound = "x from L2"
    return Times(first, marks, multiplied, x, rest, bound)


def fills(groups: int, experts: int, most: int) -> list[list[int]]:
    """Groups whenever a block fills its shared memory, block after block, as in ``tiles.cu``."""
    work = groups * experts
    blocks = min(H200.multiprocessors, work)
    found = []
    for block in range(blocks):
        begin, end = work * block // blocks, work * (block + 1) // blocks
        of_block = []
        while begin < end:
            upto = min(end, begin + most, (begin // groups + 1) * groups)
            of_block.append(upto - begin)
            begin = upto
        found.append(of_block)
    return found


def decode(layout: RunLayout, counted: Decoding, codes: float) -> float:
    """Seconds to make the weights of a matrix in 16 bits, if memory does not take longer."""
    walk, write = counted.walk, counted.write
    writes = layout.rows * math.ceil(layout.columns / 8 / 32) / counted.vectors
    issued = layout.groups * (walk.prologue + walk.instructions(codes)) + writes * write.issued
    alu = layout.groups * codes * walk.alu / 32 + writes * write.alu
    clocks = max(ISSUE * issued, ALU * alu) / SCHEDULERS / H200.multiprocessors
    return LAUNCH + LATENCY + clocks / CLOCK
