"""The kernels for a stack of ``int-dict`` matrices."""

from __future__ import annotations

from functools import lru_cache

from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.int_dict_packing import DictLayout, Tables
from qmoe_format.gpu.kernel_text import source
from qmoe_format.gpu.launch import Kernel
from qmoe_format.gpu.tiles import ELEMENT_BYTES, THREADS, Product, largest_tile, tile_bytes

REFINED_THREADS = 512  # at most: magnitudes take more than 64 registers
DECODE_THREADS = 256
WINDOW = 4096  # bytes that a warp decodes at a time
RING = 2048  # bytes for a warp's magnitudes

# Codewords per lane and step, by words per dictionary entry: as many as fit the registers. Fewer
# with several sums, or with the table or x in global memory, whose addresses have 64 bits.
MOST_CODEWORDS = {1: 4, 2: 3, 4: 2, 8: 1}
FEW_CODEWORDS = {1: 2, 2: 2, 4: 1, 8: 1}
# Instructions on sm_90: of a step of the walk, per codeword in it, per slot for a non-zero.
STEP_COST, CODEWORD_COST, SLOT_COST = 52, 8, 9


def product(layout: DictLayout, product: Product, limits: DeviceLimits) -> Kernel:
    """The kernel for y = W x; without a tile, x comes from the kernel ``prepare``."""
    threads = _threads(layout, max(product.tile, 1))
    tables = _table_bytes(layout, limits.shared_bytes - _rings(layout, threads))
    most = MOST_CODEWORDS if product.tile == 1 and tables[0] else FEW_CODEWORDS
    text = product.source(
        *_files(layout),
        "tiles",
        "pairs",
        "product",
        tile_type=_tile_type(layout, product.x),
        threads=threads,
        LINE=0,
        **_defines(layout, tables, most),
    )
    shared = sum(tables) + _rings(layout, threads) + _x_bytes(layout, product.x, product.tile)
    return Kernel("product", text, threads, shared)


def decode(layout: DictLayout, y_dtype: str, limits: DeviceLimits) -> Kernel:
    """The kernel that writes W."""
    own = WINDOW * DECODE_THREADS // 32 + _rings(layout, DECODE_THREADS)
    tables = _table_bytes(layout, limits.shared_bytes - own)
    text = source(
        *_files(layout),
        "decode",
        Y_TYPE=y_dtype,
        WINDOW=WINDOW,
        THREADS=DECODE_THREADS,
        **_defines(layout, tables, MOST_CODEWORDS),
    )
    return Kernel("decode", text, DECODE_THREADS, sum(tables) + own, together=True)


@lru_cache(maxsize=1024)
def tile(layout: DictLayout, x_dtype: str, wanted: int, limits: DeviceLimits) -> int:
    """The most tokens, up to ``wanted``, whose x fits into shared memory; 0 if none does."""
    if ELEMENT_BYTES[_tile_type(layout, x_dtype)] == 4:
        wanted = min(wanted, 8)  # at 4 bytes per element, larger tiles save only the walk
    rings = _rings(layout, _threads(layout, 1))
    room = limits.shared_bytes - rings
    room -= sum(_table_bytes(layout, room))
    return largest_tile(wanted, lambda tokens: _x_bytes(layout, x_dtype, tokens), room)


def _files(layout: DictLayout) -> tuple[str, ...]:
    magnitudes = "refinement" if layout.refinement else "ternary"
    return "types", "scan", "share", "entry", "stack", magnitudes, "walk"


def _threads(layout: DictLayout, tokens: int) -> int:
    return min(THREADS[tokens], REFINED_THREADS) if layout.refinement else THREADS[tokens]


def _rings(layout: DictLayout, threads: int) -> int:
    return RING * threads // 32 if layout.refinement else 0


def _tile_type(layout: DictLayout, x_dtype: str) -> str:
    """Column scales, rounded to 16 bits, would not be exact."""
    return "fp32" if layout.column_scales else x_dtype


def _x_bytes(layout: DictLayout, x_dtype: str, tokens: int) -> int:
    """Shared memory for a tile's x and a column of zeros."""
    return tile_bytes(layout.columns + 1, _tile_type(layout, x_dtype), tokens)


def _table_bytes(layout: DictLayout, room: int) -> tuple[int, int]:
    """Shared memory for the tables of mask and refinement; 0 if one stays in global memory."""
    found = []
    for tables in (layout.mask, layout.refinement):
        fits = tables and tables.width <= 12 and tables.bytes <= room // 2
        found.append(tables.bytes if tables and fits else 0)
        room -= found[-1]
    return found[0], found[1]


def _defines(
    layout: DictLayout, tables: tuple[int, int], most: dict[int, int]
) -> dict[str, str | int]:
    defines: dict[str, str | int] = {
        "WIDTH": layout.mask.width,
        "ENTRY": layout.mask.entry,
        "SLOTS": layout.mask.slots,
        "CODEWORDS": _codewords(layout, most[layout.mask.entry_bytes // 4]),
        "SCALES": layout.scales,
        "COLUMN_SCALES": int(layout.column_scales),
        "TABLE_SHARED": tables[0],
        "REFINED": int(layout.refinement is not None),
        "REFINEMENT_TABLE_SHARED": tables[1],
        "RING": RING if layout.refinement else 0,
    }
    if layout.refinement:
        defines["REFINEMENT_WIDTH"] = layout.refinement.width
        defines["REFINEMENT_ENTRY"] = layout.refinement.entry
        defines["REFINEMENT_SLOTS"] = layout.refinement.slots
    return defines


def _codewords(layout: DictLayout, most: int) -> int:
    """Codewords per lane and step: many share the cost of a step, few leave fewer lanes idle."""
    mask: Tables = layout.mask

    def cost(codewords: int) -> int:
        each = CODEWORD_COST + SLOT_COST * mask.slots
        return -(-layout.mean_codewords // (32 * codewords)) * (STEP_COST + each * codewords)

    # A lane holds its codewords in 64 bits, and their signs in 30 of 32.
    most = min(most, 64 // mask.width, 30 // mask.slots)
    return min(range(most, 0, -1), key=cost)
