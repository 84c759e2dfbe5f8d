"""Instructions of the parts of the kernels that read runs, counted in their machine code."""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks.gpu_listing import Listing
from qmoe_format.gpu import run_batches
from qmoe_format.gpu.run_batches import Batch

# Of the pipe for integers, but not for products of them, and for comparisons, by the guide to
# Nsight Compute.
ALU = r"LOP3|SHF|IADD3|VIADD\w*|VIMNMX|LEA|PRMT|SEL|FSEL|FMNMX|[IF]SETP|PLOP3|BMSK|SGXT"


class Loop(NamedTuple):
    """Instructions of a warp in a loop; ``alu``, ``mma``: those of them for these pipes."""

    issued: int
    alu: int
    mma: int


class Walk(NamedTuple):
    """Instructions of a warp that follows paths.

    Attributes:
        prologue: up to its first group, on the longest way there.
        walk: for 32 codes.
        alu: those of them for the ALU.
        group: for a group besides its codes.
        tail: for the last 25 to 32 codes of a group.
    """

    prologue: int
    walk: int
    alu: int
    group: int
    tail: int

    def instructions(self, codes: float) -> float:
        """For a group of so many codes a lane."""
        walks = max(0, math.ceil(codes / 32) - 1)
        tail = self.tail * math.ceil((codes - 32 * walks) / 8) / 4
        return self.group + walks * self.walk + tail


class Marking(NamedTuple):
    """``run_batch.cu``.

    Attributes:
        walk: marks.
        step: multiplies the most tiles that a warp may have by 16 tokens, 128 places of them.
        rest: for the marks in shared memory besides steps, on the longest way.
    """

    walk: Walk
    step: Loop
    rest: int


class Decoding(NamedTuple):
    """``run_decode.cu``.

    Attributes:
        walk: levels into shared memory.
        write: levels become weights, ``vectors`` times 8 of each lane.
    """

    walk: Walk
    write: Loop
    vectors: int


def product(listing: Listing) -> Walk:
    """Of ``run_product.cu``: each code is a load of x."""
    return _walk(listing, "LDS", None)


def marking(listing: Listing, batch: Batch) -> Marking:
    """Of ``run_batch.cu``: each code is an atomic; a tile has four quarters of two ``mma``."""
    eights = 2  # 16 tokens
    step = listing.loop("HMMA", eights * 2 * 4 * most_tiles(batch))
    tokens = listing.loop("STG", inner=step)
    rest = listing.longest(tokens.start, step.start) + listing.longest(step.stop, tokens.stop)
    return Marking(_walk(listing, "ATOMS", None), _loop(listing, step), rest)


def cutting(listing: Listing, batch: Batch) -> int:
    """Of ``run_terms.cu``, for 32 numbers of x."""
    return len(listing.loop(r"STG\.E\.U16", batch.terms))


def decoding(listing: Listing, refined: bool) -> Decoding:
    """Of ``run_decode.cu`` for weights of 16 bits: a warp has one group."""
    landing, store = "ATOMS" if refined else "STS", r"STG\.E\.128"
    write = listing.loop(store)
    walk = _walk(listing, landing, range(listing.loop(landing, 32).start, write.start))
    return Decoding(walk, _loop(listing, write), listing.count(store, write))


def tile_rows(batch: Batch) -> int:
    """Rows of a tile, as in ``run_batch.cu``."""
    return 16 if batch.layout.scales == 1 else 8


def most_tiles(batch: Batch) -> int:
    """Tiles that a warp may have."""
    return run_batches.WARP_ROWS // tile_rows(batch)


def _loop(listing: Listing, part: range) -> Loop:
    return Loop(len(part), listing.count(ALU, part), listing.count("HMMA", part))


def _walk(listing: Listing, code: str, group: range | None) -> Walk:
    """The innermost loop with 32 of the instruction that each code has; None: a loop around it."""
    walk = listing.loop(code, 32)
    group = group or listing.loop(code, 32, inner=walk)
    last = listing.places(code, range(walk.stop, group.stop))[-1]  # ends the tail
    return Walk(
        listing.longest(0, walk.start),
        len(walk),
        listing.count(ALU, walk),
        listing.longest(group.start, walk.start) + listing.longest(last, group.stop),
        listing.longest(walk.stop, last),
    )
