"""The kernels for a stack of ``int-group`` matrices."""

from __future__ import annotations

from functools import lru_cache

from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.int_group_packing import RUN, GroupLayout
from qmoe_format.gpu.kernel_text import source
from qmoe_format.gpu.launch import Kernel
from qmoe_format.gpu.layout import align
from qmoe_format.gpu.tiles import ELEMENT_BYTES, THREADS, Product, largest_tile, tile_bytes

GLOBAL_THREADS = 512  # where x is in global memory, whose addresses take more registers
DECODE_THREADS = 256


def product(layout: GroupLayout, product: Product) -> Kernel:
    """The kernel for y = W x."""
    threads = THREADS.get(product.tile, GLOBAL_THREADS)
    text = product.source(
        *("types", "share", "int_group", "tiles", "pairs", "int_group_product"),
        tile_type=product.x,
        threads=threads,
        LINE=RUN,
        COLUMN_SCALES=0,
        **_defines(layout),
    )
    return Kernel("product", text, threads, _x_bytes(layout, product.x, product.tile))


def decode(layout: GroupLayout, y_dtype: str) -> Kernel:
    """The kernel that writes W."""
    files = ("types", "int_group", "int_group_decode")
    text = source(*files, Y_TYPE=y_dtype, THREADS=DECODE_THREADS, **_defines(layout))
    return Kernel("decode", text, DECODE_THREADS)


@lru_cache(maxsize=1024)
def tile(layout: GroupLayout, x_dtype: str, wanted: int, limits: DeviceLimits) -> int:
    """The most tokens, up to ``wanted``, whose x fits into shared memory; 0 if none does."""
    if ELEMENT_BYTES[x_dtype] == 4:
        wanted = min(wanted, 8)
    return largest_tile(
        wanted, lambda tokens: _x_bytes(layout, x_dtype, tokens), limits.shared_bytes
    )


def _x_bytes(layout: GroupLayout, x_dtype: str, tokens: int) -> int:
    """Shared memory for a tile's x in whole runs, with a column left free after each."""
    return tile_bytes(align(layout.columns, RUN) // RUN * (RUN + 1), x_dtype, tokens)


def _defines(layout: GroupLayout) -> dict[str, str | int]:
    return {
        "BITS": layout.bits,
        "LOG": int(layout.grid == "log"),
        "ZERO_POINTS": int(layout.zero_points),
    }
