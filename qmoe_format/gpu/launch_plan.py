"""From a call to the kernel launches it takes. Nothing here needs a GPU.

Arrays belong to whoever executes the launches: CuPy's, torch's, or, where kernels run on a CPU,
numpy's (bf16 as uint16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from qmoe_format.gpu.arrays import element_type
from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.launch import Kernel, Launch
from qmoe_format.gpu.packing import Layout, PackedStack

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SCALES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}

# Threads per block, by the number of tokens that share a walk. The more threads share a table and x
# in shared memory, the better; but with several sums, or scales of column groups, a thread needs
# more than the 64 registers that it can have if there are 1024.
THREADS = {1: 1024, 4: 512, 8: 512, 16: 512}
SCALE_GROUP_THREADS = 512
SMALL_TILE = 4  # tokens; the kernel for larger tiles has code for this size, too
GROUP_THREADS = 256
DECODE_THREADS = 256
WINDOW = 4096  # bytes that a warp decodes at a time
ELEMENTWISE_THREADS = 256

FEW = 8  # this many pairs are not worth grouping
# Codewords per lane and step, by words per dictionary entry: as many as fit the registers. Fewer
# with several sums, or with the table or x in global memory, whose addresses have 64 bits.
MOST_CODEWORDS = {1: 4, 2: 3, 4: 2, 8: 1}
FEW_CODEWORDS = {1: 2, 2: 2, 4: 1, 8: 1}
# Instructions on sm_90: of a step of the walk, per codeword in it, per slot for a non-zero.
STEP_COST, CODEWORD_COST, SLOT_COST = 52, 8, 9

# The files of kernels/ that make up the text of each kernel.
_FILES = {
    "product": ("types.cu", "entry.cu", "walk.cu", "product.cu"),
    "decode": ("types.cu", "entry.cu", "walk.cu", "decode.cu"),
    "prepare": ("types.cu", "prepare.cu"),
    "group": ("types.cu", "group.cu"),
    "combine": ("types.cu", "combine.cu"),
}


@dataclass(frozen=True, slots=True)
class Workspace:
    """What a call needs of the GPU besides the caller's arrays.

    Attributes:
        limits: of the GPU.
        allocate: makes an array of a shape and an element type there.
        scratch: the arrays made so far.
    """

    limits: DeviceLimits
    allocate: Callable[[tuple[int, ...], str], Any]
    scratch: list[Any] = field(default_factory=list)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate a scratch array."""
        self.scratch.append(self.allocate(shape, dtype))
        return self.scratch[-1]


def matmul(stack: PackedStack, expert: int, x: Any, y: Any, workspace: Workspace) -> list[Launch]:
    """y [tokens, rows] = x [tokens, columns] times the transpose of matrix ``expert``."""
    return _products(stack, x, y, _Pairs(x.shape[0], 1, expert), workspace)


def expert_matvec(
    stack: PackedStack, x: Any, experts: Any, weights: Any, y: Any, workspace: Workspace
) -> list[Launch]:
    """Products of (token, expert) pairs, or their weighted sums over each token's experts.

    Args:
        stack: the matrices W.
        x: [tokens, columns], or [tokens, k, columns] with an x for each pair.
        experts: int32 [tokens, k].
        weights: [tokens, k] or None.
        y: [tokens, k, rows]; with weights [tokens, rows].
        workspace: for scratch arrays.
    """
    tokens, k = experts.shape
    pairs = _Pairs(tokens * k, k if len(x.shape) == 2 else 1, -1, experts)
    if weights is None:
        return _products(stack, x, y, pairs, workspace)
    rows = stack.layout.rows
    if not tokens * rows:
        return []
    products = workspace.empty((pairs.count, rows), "fp32")
    return [
        *_products(stack, x, products, pairs, workspace),
        _elementwise(
            "combine",
            tokens * rows,
            workspace,
            (products, weights, y, *_ints(tokens, k, rows)),
            WEIGHT_TYPE=element_type(weights.dtype),
            Y_TYPE=element_type(y.dtype),
        ),
    ]


def decode(
    stack: PackedStack, first: int, count: int, y: Any, workspace: Workspace
) -> list[Launch]:
    """y [count, rows, columns]: the weights of ``count`` matrices from ``first`` on."""
    layout, limits = stack.layout, workspace.limits
    segments = count * layout.segments
    if not segments or not layout.columns:
        return []
    kernel = _decode_kernel(layout, element_type(y.dtype), limits)
    blocks = limits.multiprocessors * max(1, limits.shared_bytes // kernel.shared_bytes)
    return [Launch(kernel, min(blocks, segments), (*_stack(stack), y, *_ints(first, count)))]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The (token, expert) pairs of a call.

    Attributes:
        count: number of pairs.
        per_x: pairs that share a row of x.
        expert: the expert of all of them, or -1.
        experts: int32 [count], the expert of each, if ``expert`` is -1.
    """

    count: int
    per_x: int
    expert: int
    experts: Any = None


def _products(
    stack: PackedStack, x: Any, y: Any, pairs: _Pairs, workspace: Workspace
) -> list[Launch]:
    """y [pairs, rows], with x [pairs / pairs.per_x, columns]."""
    layout, limits, per_x = stack.layout, workspace.limits, pairs.per_x
    if not pairs.count or not layout.rows:
        return []
    if pairs.experts is None:
        wanted = next((size for size in THREADS if pairs.count <= size), max(THREADS))
    else:
        wanted = 1 if pairs.count <= FEW else max(THREADS)
    tile = _tile(layout, element_type(x.dtype), wanted, limits)
    launches: list[Launch] = []
    listed = tiles = stack.arrays.table_of  # any array will do where the kernel reads none
    if pairs.experts is None:
        mode = "ONE"
    elif tile > 1:
        mode = "GROUPS"
        launches, listed, tiles = _group(layout, pairs, tile, workspace)
    else:
        mode, listed = "LIST", pairs.experts
    if not tile:
        launches, x = _prepare(stack, x, pairs, workspace)
        per_x = 1
    kernel = _product_kernel(
        layout, element_type(x.dtype), element_type(y.dtype), mode, tile, limits
    )
    arguments = (x, y, listed, tiles, *_ints(pairs.expert, pairs.count, per_x))
    blocks = min(limits.multiprocessors, pairs.count * layout.segments)
    return [*launches, Launch(kernel, blocks, (*_stack(stack), *arguments))]


def _group(
    layout: Layout, pairs: _Pairs, tile: int, workspace: Workspace
) -> tuple[list[Launch], Any, Any]:
    """Order pairs by expert and cut them into tiles: launches, order, tiles."""
    order = workspace.empty((pairs.count,), "int32")
    tiles = workspace.empty((1 + 3 * pairs.count,), "int32")
    ranks = workspace.empty((pairs.count,), "int32")
    counts = workspace.empty((layout.experts + 1,), "int32")
    source = _source("group", THREADS=GROUP_THREADS, TOKENS=tile, SOME=SMALL_TILE)
    sizes = _ints(pairs.count, layout.experts)
    arguments = (pairs.experts, order, tiles, ranks, counts, *sizes)
    return [Launch(Kernel("group", source, GROUP_THREADS), 1, arguments)], order, tiles


def _prepare(
    stack: PackedStack, x: Any, pairs: _Pairs, workspace: Workspace
) -> tuple[list[Launch], Any]:
    """x of each pair times its expert's column scales, in global memory: launches and that x."""
    layout, arrays = stack.layout, stack.arrays
    scaled = workspace.empty((pairs.count, layout.columns + 1), "fp32")
    experts = arrays.table_of if pairs.experts is None else pairs.experts
    sizes = _ints(layout.experts, pairs.expert, pairs.count, pairs.per_x, layout.columns)
    launch = _elementwise(
        "prepare",
        pairs.count * (layout.columns + 1),
        workspace,
        (x, arrays.column_scale, experts, scaled, *sizes),
        X_TYPE=element_type(x.dtype),
        SCALE_TYPE=SCALES[layout.scale_dtype],
        COLUMN_SCALES=int(layout.column_scales),
    )
    return [launch], scaled


def _elementwise(
    name: str, size: int, workspace: Workspace, arguments: tuple[Any, ...], **defines: str | int
) -> Launch:
    """A launch of a kernel whose threads share out ``size`` elements."""
    blocks = max(1, min(workspace.limits.multiprocessors * 8, -(-size // ELEMENTWISE_THREADS)))
    return Launch(Kernel(name, _source(name, **defines), ELEMENTWISE_THREADS), blocks, arguments)


@lru_cache(maxsize=1024)
def _product_kernel(
    layout: Layout, x_dtype: str, y_dtype: str, mode: str, tile: int, limits: DeviceLimits
) -> Kernel:
    tokens = max(tile, 1)
    table = _table_bytes(layout, limits.shared_bytes)
    threads = SCALE_GROUP_THREADS if layout.group_size else THREADS[tokens]
    codewords = MOST_CODEWORDS if tile == 1 and table else FEW_CODEWORDS
    source = _source(
        "product",
        **_walk_defines(layout, table, threads, codewords),
        X_TYPE=x_dtype,
        Y_TYPE=y_dtype,
        TILE_TYPE="fp32" if layout.column_scales else x_dtype,
        TOKENS=tokens,
        SOME=SMALL_TILE,
        PAIRS=mode,
        X_SHARED=int(tile > 0),
    )
    return Kernel("product", source, threads, table + _tile_bytes(layout, x_dtype, tile))


@lru_cache(maxsize=1024)
def _decode_kernel(layout: Layout, y_dtype: str, limits: DeviceLimits) -> Kernel:
    windows = WINDOW * DECODE_THREADS // 32
    table = _table_bytes(layout, limits.shared_bytes - windows)
    defines = _walk_defines(layout, table, DECODE_THREADS, MOST_CODEWORDS)
    source = _source("decode", **defines, Y_TYPE=y_dtype, WINDOW=WINDOW)
    return Kernel("decode", source, DECODE_THREADS, table + windows)


def _walk_defines(
    layout: Layout, table: int, threads: int, most_codewords: dict[int, int]
) -> dict[str, str | int]:
    return {
        "WIDTH": layout.width,
        "ENTRY": layout.entry,
        "SLOTS": layout.slots,
        "CODEWORDS": _codewords(layout, most_codewords[layout.entry_bytes // 4]),
        "SIGNS_IN_CODEWORD": int(layout.signs == "codeword"),
        "SCALE_TYPE": SCALES[layout.scale_dtype],
        "SCALES": layout.scales,
        "GROUPED": int(layout.group_size > 0),
        "COLUMN_SCALES": int(layout.column_scales),
        "TABLE_SHARED": table,
        "THREADS": threads,
    }


def _table_bytes(layout: Layout, room: int) -> int:
    """Shared memory for a dictionary's table; 0 if it stays in global memory."""
    size = layout.entry_bytes << layout.width
    return size if layout.width <= 12 and size <= room // 2 else 0


@lru_cache(maxsize=1024)
def _tile(layout: Layout, x_dtype: str, wanted: int, limits: DeviceLimits) -> int:
    """The most tokens, up to ``wanted``, whose x fits into shared memory; 0 if none does."""
    room = limits.shared_bytes - _table_bytes(layout, limits.shared_bytes)
    if layout.column_scales or ELEMENT_BYTES[x_dtype] == 4:
        wanted = min(wanted, 8)  # at 4 bytes per element, larger tiles save only the walk
    sizes = (size for size in reversed(THREADS) if size <= wanted)
    return next((size for size in sizes if _tile_bytes(layout, x_dtype, size) <= room), 0)


def _tile_bytes(layout: Layout, x_dtype: str, tokens: int) -> int:
    """Shared memory for a tile's x and a column of zeros; the last tile may be of one token."""
    element = ELEMENT_BYTES["fp32" if layout.column_scales or tokens == 1 else x_dtype]
    return (layout.columns + 1) * element * tokens


def _codewords(layout: Layout, most: int) -> int:
    """Codewords per lane and step: many share the cost of a step, few leave fewer lanes idle."""

    def cost(codewords: int) -> int:
        each = CODEWORD_COST + SLOT_COST * layout.slots
        return -(-layout.mean_codewords // (32 * codewords)) * (STEP_COST + each * codewords)

    # A lane holds its codewords in 64 bits, and their signs in 30 of 32.
    most = min(most, 64 // layout.width, 30 // layout.slots)
    return min(range(most, 0, -1), key=cost)


def _stack(stack: PackedStack) -> tuple[Any, ...]:
    """The arguments for a ``PackedStack`` of ``walk.cu``."""
    layout = stack.layout
    sizes = (layout.experts, layout.rows, layout.columns)
    return (*stack.arrays, *_ints(*sizes, layout.rows_per_segment, layout.group_size))


def _ints(*numbers: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(number) for number in numbers)


@lru_cache(maxsize=256)
def _source(kernel: str, **defines: str | int) -> str:
    """The CUDA text of ``kernel``: its defines, then its files."""
    lines = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    return lines + "".join(map(_text, _FILES[kernel]))


@cache
def _text(name: str) -> str:
    text = files("qmoe_format.gpu").joinpath("kernels", name).read_text("utf-8")
    return f'#line 1 "{name}"\n{text}'
