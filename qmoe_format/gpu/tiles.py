"""What products have in common, however W is stored: ``kernels/pairs.cu``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qmoe_format.gpu.kernel_text import source

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Threads per block, by the number of tokens in a tile. The more threads share what is in shared
# memory, the better; but with several sums, a thread needs more than the 64 registers that it can
# have if there are 1024.
THREADS = {1: 1024, 4: 512, 8: 512, 16: 512}
SMALL_TILE = 4  # tokens; the kernel for larger tiles has code for this size, too


@dataclass(frozen=True, slots=True)
class Product:
    """What decides a product's kernel besides W.

    Attributes:
        x, y: element types.
        pairs: ``ONE``, ``LIST`` or ``GROUPS``.
        tile: most tokens whose x is in shared memory; 0 if it stays in global memory.
    """

    x: str
    y: str
    pairs: str
    tile: int

    def source(self, *names: str, tile_type: str, threads: int, **defines: str | int) -> str:
        """The kernel's text; x of several tokens is ``tile_type`` in shared memory."""
        return source(
            *names,
            X_TYPE=self.x,
            Y_TYPE=self.y,
            TILE_TYPE=tile_type,
            TOKENS=max(self.tile, 1),
            SOME=SMALL_TILE,
            PAIRS=self.pairs,
            X_SHARED=int(self.tile > 0),
            THREADS=threads,
            **defines,
        )


def tile_bytes(columns: int, tile_type: str, tokens: int) -> int:
    """Shared memory for x; the last tile may be of one token, which is fp32."""
    return columns * tokens * ELEMENT_BYTES["fp32" if tokens == 1 else tile_type]


def largest_tile(wanted: int, bytes_of: Callable[[int], int], room: int) -> int:
    """The most tokens, up to ``wanted``, for which there is room; 0 if there is for none."""
    sizes = (size for size in reversed(THREADS) if size <= wanted)
    return next((size for size in sizes if bytes_of(size) <= room), 0)
