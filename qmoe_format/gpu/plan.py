"""From a call to the kernels that it takes. No GPU is needed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.packing import Layout, Stack
from qmoe_format.gpu.sources import source

# CUDA names of the element types.
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
SCALES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}

THREADS = 1024  # of a block that multiplies: the more share a table and x in shared memory
BLOCKS = 1  # of them on a multiprocessor

Empty = Callable[[tuple[int, ...], str], Any]


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan has to know of a device.

    ``shared_bytes``: most shared memory of one block (on request).
    """

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Operand:
    """x or y: an array and its element type, ``bf16`` (which numpy lacks), ``fp16`` or ``fp32``."""

    array: Any
    dtype: str


def matmul(stack: Stack, expert: int, x: Operand, y: Operand, device: Device) -> list[Launch]:
    """y [tokens, rows] = x [tokens, columns] times the transpose of matrix ``expert``."""
    tokens = x.array.shape[0]
    tile = 1 if tokens == 1 else 4 if tokens <= 4 else 8
    nothing = stack.arrays.table_of
    return [
        _product(
            stack,
            (x.dtype, y.dtype),
            device,
            (tokens, tile, "ONE"),
            (x.array, y.array, nothing, nothing, np.int32(expert), np.int32(tokens), np.int32(1)),
        )
    ]


def _product(
    stack: Stack,
    dtypes: tuple[str, str],
    device: Device,
    pairs: tuple[int, int, str],
    arguments: tuple[Any, ...],
) -> Launch:
    layout = stack.layout
    count, tokens, mode = pairs
    table = layout.entry_bytes << layout.width
    table_shared = layout.width <= 12 and table <= device.shared_bytes // 2
    tile_type = dtypes[0] if not layout.column_scales else "fp32"
    room = device.shared_bytes - table * table_shared

    def tile_bytes(tokens: int) -> int:
        one = 4 if tokens == 1 else ELEMENTS[tile_type] * tokens
        return layout.columns * max(one, 4)

    while tokens > 1 and tile_bytes(tokens) > room:
        tokens //= 2 if tokens == 8 else 4
    x_shared = tile_bytes(tokens) <= room
    defines = {
        **_walk_defines(layout),
        "X_TYPE": dtypes[0],
        "Y_TYPE": dtypes[1],
        "TILE_TYPE": tile_type,
        "TOKENS": tokens,
        "PAIRS": mode,
        "TABLE_SHARED": int(table_shared),
        "X_SHARED": int(x_shared),
    }
    blocks = min(device.multiprocessors * BLOCKS, count * layout.segments)
    return Launch(
        source=source("product", tuple(defines.items())),
        kernel="product",
        grid=(blocks, 1, 1),
        block=(THREADS, 1, 1),
        shared_bytes=table * table_shared + tile_bytes(tokens) * x_shared,
        arguments=(*_stack_arguments(stack), *arguments),
    )


def _walk_defines(layout: Layout) -> dict[str, str | int]:
    words = layout.position_words
    return {
        "POSITION_WORDS": words,
        # As many codewords a lane as 32 bits hold, whose signs are one word's, too.
        "CODEWORDS": min(32 // layout.width, 24 // (4 * words)),
        "SIGNS_IN_CODEWORD": int(layout.signs == "codeword"),
        "SCALE_TYPE": SCALES[layout.scale_dtype],
        "SCALES": layout.scales,
        "GROUPED": int(layout.group_size > 0),
        "COLUMN_SCALES": int(layout.column_scales),
    }


def _stack_arguments(stack: Stack) -> tuple[Any, ...]:
    arrays, layout = stack.arrays, stack.layout
    numbers = (
        layout.experts,
        layout.rows,
        layout.columns,
        layout.rows_per_segment,
        layout.width,
        layout.group_size,
    )
    return (
        arrays.segments,
        arrays.offsets,
        arrays.bases,
        arrays.row_scale,
        arrays.column_scale,
        arrays.table_of,
        arrays.tables,
        *map(np.int32, numbers),
    )
