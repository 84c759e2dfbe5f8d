"""From a call to the kernels that it takes. Nothing here needs a GPU.

Arrays are those of whoever executes the launches: CuPy's, or numpy's when kernels run on a CPU.
``Empty`` makes scratch arrays of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.packing import Layout, Stack
from qmoe_format.gpu.sources import source

# Element types by their names in CUDA, with their sizes.
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
SCALES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}

# Tokens that share a walk, and threads of a block then. The more of these share a table and x in
# shared memory, the better; with several sums, or scales of groups, one needs more than the 64
# registers that there are for 1024 of them.
THREADS = {1: 1024, 4: 512, 8: 512, 16: 512}
SCALE_GROUP_THREADS = 512
SOME = 4  # the other size that there is code for, where tiles are of more tokens than that
GROUP_THREADS = 256
DECODE_THREADS = 256
WINDOW = 4096  # bytes that a warp decodes at a time
SMALL = 256  # threads of a block of the kernels that are not about codewords

FEW = 8  # pairs that are not worth grouping
# Codewords a lane and step, by words of an entry: what fits the registers. Fewer with several sums,
# and with a table or x in global memory, whose addresses have 64 bits.
MOST_CODEWORDS = {1: 4, 2: 3, 4: 2, 8: 1}
FEW_CODEWORDS = {1: 2, 2: 2, 4: 1, 8: 1}
# Instructions of a step of the walk, of a codeword in it, of a place for a non-zero (sm_90).
STEP_COST, CODEWORD_COST, SLOT_COST = 52, 8, 9

Empty = Callable[[tuple[int, ...], str], Any]


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan has to know of a device; ``shared_bytes``: the most that a block can have."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Operand:
    """An array and the type of its elements, ``bf16`` (which numpy lacks), ``fp16`` or ``fp32``."""

    array: Any
    dtype: str


def matmul(
    stack: Stack, expert: int, x: Operand, y: Operand, device: Device, empty: Empty
) -> list[Launch]:
    """y [tokens, rows] = x [tokens, columns] times the transpose of matrix ``expert``."""
    tokens = x.array.shape[0]
    wanted = next((size for size in THREADS if tokens <= size), max(THREADS))
    pairs = _Pairs("ONE", tokens, 1, expert, _tile(stack.layout, x.dtype, wanted, device))
    return _products(stack, x, y, pairs, device, empty)


def expert_matvec(
    stack: Stack,
    x: Operand,
    experts: Any,
    weights: Operand | None,
    y: Operand,
    device: Device,
    empty: Empty,
) -> list[Launch]:
    """y [tokens, k, rows] = W[experts[t, i]] x[t], or x[t, i]; weighted sums [tokens, rows].

    ``experts`` int32 [tokens, k]; ``x`` [tokens, columns] or [tokens, k, columns].
    """
    tokens, k = experts.shape
    count = tokens * k
    per_x = k if len(x.array.shape) == 2 else 1
    wanted = 1 if count <= FEW else max(THREADS)
    tile = _tile(stack.layout, x.dtype, wanted, device)
    mode = "GROUPS" if tile > 1 else "LIST"
    pairs = _Pairs(mode, count, per_x, -1, tile, experts)
    if weights is None:
        return _products(stack, x, y, pairs, device, empty)
    rows = stack.layout.rows
    products = Operand(empty((count, rows), "fp32"), "fp32")
    combine = Launch(
        source=source("combine", (("WEIGHT_TYPE", weights.dtype), ("Y_TYPE", y.dtype))),
        kernel="combine",
        grid=_grid(tokens * rows, device),
        block=(SMALL, 1, 1),
        shared_bytes=0,
        arguments=(products.array, weights.array, y.array, *_ints(tokens, k, rows)),
    )
    if tokens * k * rows == 0:
        return [combine] if tokens * rows else []
    return [*_products(stack, x, products, pairs, device, empty), combine]


def decode(stack: Stack, first: int, count: int, y: Operand, device: Device) -> list[Launch]:
    """y [count, rows, columns]: the weights of ``count`` matrices from ``first`` on."""
    layout = stack.layout
    segments = count * layout.segments
    if not segments or not layout.columns:
        return []
    kernel = _decode_kernel(layout, y.dtype, device)
    blocks = device.multiprocessors * max(1, device.shared_bytes // kernel.shared_bytes)
    return [
        Launch(
            source=kernel.source,
            kernel="decode",
            grid=(min(blocks, segments), 1, 1),
            block=(kernel.threads, 1, 1),
            shared_bytes=kernel.shared_bytes,
            arguments=(*_stack_arguments(stack), y.array, *_ints(first, count)),
        )
    ]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of a token and an expert, as the kernel ``product`` takes them.

    ``mode``: ``ONE`` expert for all, a ``LIST`` of experts, or ``GROUPS`` to be made of that list.
    ``tile``: pairs of one expert that share a walk; 0: x does not fit into shared memory.
    """

    mode: str
    count: int
    per_x: int
    expert: int
    tile: int
    experts: Any = None


def _products(
    stack: Stack, x: Operand, y: Operand, pairs: _Pairs, device: Device, empty: Empty
) -> list[Launch]:
    """y [pairs, rows], with x [pairs / pairs.per_x, columns]."""
    layout = stack.layout
    if not pairs.count or not layout.rows:
        return []
    launches: list[Launch] = []
    listed = tiles = stack.arrays.table_of  # anything, where they are not read
    per_x = pairs.per_x
    if pairs.mode == "LIST":
        listed = pairs.experts
    if pairs.mode == "GROUPS":
        launches, listed, tiles = _group(layout, pairs, empty)
    if not pairs.tile:
        launches, x = _prepare(stack, x, pairs, device, empty)
        per_x = 1
    kernel = _product_kernel(layout, x.dtype, y.dtype, pairs.mode, pairs.tile, device)
    launches.append(
        Launch(
            source=kernel.source,
            kernel="product",
            grid=(min(device.multiprocessors, pairs.count * layout.segments), 1, 1),
            block=(kernel.threads, 1, 1),
            shared_bytes=kernel.shared_bytes,
            arguments=(
                *_stack_arguments(stack),
                *(x.array, y.array, listed, tiles),
                *_ints(pairs.expert, pairs.count, per_x),
            ),
        )
    )
    return launches


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What calls with the same types, of the same stack, have in common."""

    source: str
    threads: int
    shared_bytes: int


@lru_cache(maxsize=1024)
def _product_kernel(
    layout: Layout, x_dtype: str, y_dtype: str, mode: str, tile: int, device: Device
) -> _Kernel:
    tokens = max(tile, 1)
    table = _table_bytes(layout, device.shared_bytes)
    threads = SCALE_GROUP_THREADS if layout.group_size else THREADS[tokens]
    codewords = MOST_CODEWORDS if tile == 1 and table else FEW_CODEWORDS
    defines = {
        **_walk_defines(layout, table, threads, codewords),
        "X_TYPE": x_dtype,
        "Y_TYPE": y_dtype,
        "TILE_TYPE": "fp32" if layout.column_scales else x_dtype,
        "TOKENS": tokens,
        "SOME": SOME,
        "PAIRS": mode,
        "X_SHARED": int(tile > 0),
    }
    shared = table + _tile_bytes(layout, x_dtype, tile)
    return _Kernel(source("product", tuple(defines.items())), threads, shared)


@lru_cache(maxsize=1024)
def _decode_kernel(layout: Layout, y_dtype: str, device: Device) -> _Kernel:
    window = WINDOW * DECODE_THREADS // 32
    table = _table_bytes(layout, device.shared_bytes - window)
    defines = {
        **_walk_defines(layout, table, DECODE_THREADS, MOST_CODEWORDS),
        "Y_TYPE": y_dtype,
        "WINDOW": WINDOW,
    }
    text = source("decode", tuple(defines.items()))
    return _Kernel(text, DECODE_THREADS, table + window)


def _group(layout: Layout, pairs: _Pairs, empty: Empty) -> tuple[list[Launch], Any, Any]:
    """Order pairs by expert and cut them into tiles: launches, order, tiles."""
    order = empty((pairs.count,), "int32")
    tiles = empty((1 + 3 * pairs.count,), "int32")
    defines = {"THREADS": GROUP_THREADS, "TOKENS": pairs.tile, "SOME": SOME}
    launch = Launch(
        source=source("group", tuple(defines.items())),
        kernel="group",
        grid=(1, 1, 1),
        block=(GROUP_THREADS, 1, 1),
        shared_bytes=0,
        arguments=(
            *(pairs.experts, order, tiles),
            *(empty((pairs.count,), "int32"), empty((layout.experts + 1,), "int32")),
            *_ints(pairs.count, layout.experts),
        ),
    )
    return [launch], order, tiles


def _prepare(
    stack: Stack, x: Operand, pairs: _Pairs, device: Device, empty: Empty
) -> tuple[list[Launch], Operand]:
    """x of each pair times its expert's column scales, in global memory: launches and that x."""
    layout = stack.layout
    scaled = empty((pairs.count, layout.columns + 1), "fp32")
    defines = {
        "X_TYPE": x.dtype,
        "SCALE_TYPE": SCALES[layout.scale_dtype],
        "COLUMN_SCALES": int(layout.column_scales),
    }
    launch = Launch(
        source=source("prepare", tuple(defines.items())),
        kernel="prepare",
        grid=_grid(pairs.count * (layout.columns + 1), device),
        block=(SMALL, 1, 1),
        shared_bytes=0,
        arguments=(
            *(x.array, stack.arrays.column_scale),
            *(stack.arrays.table_of if pairs.experts is None else pairs.experts, scaled),
            *_ints(layout.experts, pairs.expert, pairs.count, pairs.per_x, layout.columns),
        ),
    )
    return [launch], Operand(scaled, "fp32")


def _table_bytes(layout: Layout, room: int) -> int:
    """Shared memory for a dictionary's table; 0: it stays in global memory."""
    size = layout.entry_bytes << layout.width
    return size if layout.width <= 12 and size <= room // 2 else 0


def _tile_bytes(layout: Layout, x_dtype: str, tokens: int) -> int:
    """Shared memory for x of a tile, and a column of zeros; the last tile may be of one token."""
    element = ELEMENTS["fp32" if layout.column_scales or tokens == 1 else x_dtype]
    return (layout.columns + 1) * element * tokens


@lru_cache(maxsize=1024)
def _tile(layout: Layout, x_dtype: str, wanted: int, device: Device) -> int:
    """The most tokens, up to ``wanted``, whose x fits into shared memory; 0 if one's does not."""
    room = device.shared_bytes - _table_bytes(layout, device.shared_bytes)
    if layout.column_scales or ELEMENTS[x_dtype] == 4:
        wanted = min(wanted, 8)  # of 4 bytes each, more take as long, but for the walk
    sizes = (size for size in reversed(THREADS) if size <= wanted)
    return next((size for size in sizes if _tile_bytes(layout, x_dtype, size) <= room), 0)


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


def _codewords(layout: Layout, most: int) -> int:
    """Codewords a lane and step: many share the cost of a step, few leave fewer lanes idle."""

    def cost(codewords: int) -> int:
        each = CODEWORD_COST + SLOT_COST * layout.slots
        return -(-layout.codewords // (32 * codewords)) * (STEP_COST + each * codewords)

    # A lane has its codewords in 64 bits and their signs in 30 of 32.
    fitting = min(most, 64 // layout.width, 30 // layout.slots)
    return min(range(fitting, 0, -1), key=cost)


def _grid(size: int, device: Device) -> tuple[int, int, int]:
    return (max(1, min(device.multiprocessors * 8, -(-size // SMALL))), 1, 1)


def _ints(*numbers: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(number) for number in numbers)


def _stack_arguments(stack: Stack) -> tuple[Any, ...]:
    arrays, layout = stack.arrays, stack.layout
    return (
        *(arrays.segments, arrays.offsets, arrays.bases, arrays.row_scale, arrays.column_scale),
        *(arrays.table_of, arrays.tables),
        *_ints(layout.experts, layout.rows, layout.columns),
        *_ints(layout.rows_per_segment, layout.group_size),
    )
