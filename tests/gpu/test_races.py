"""Faults planted in the kernels' text: each is noticed, so a real one would be.

The kernels as they are run without races in every test of ``test_kernels``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.resources import files

import numpy as np
import pytest

from qmoe_format.codec import EncodedMatrix, dequantize
from qmoe_format.dtypes import from_float32
from qmoe_format.gpu.packing import pack
from tests.gpu import shim
from tests.gpu.problems import (
    LARGE,
    SMALL,
    Floats,
    Kind,
    Machine,
    Shape,
    decode,
    expert_matvec,
    matmul,
    matrix,
    vectors,
)

pytestmark = shim.needs_compiler

ORDERS = (shim.FORWARD, shim.BACKWARD, 2)

# Blocks have segments of several matrices; a segment has more signs than 32 words hold and more
# weights than a window; the last segment has fewer rows, the last tile fewer tokens.
KIND = Kind(("plane", 0.885, 12), "BF16", 2, 0, False, "fp32", 11, True, LARGE)
SHAPE = Shape(28, 301, 0.2, 12, 0, exact=True)


@cache
def members() -> list[EncodedMatrix]:
    return [matrix(KIND, SHAPE, seed) for seed in range(4)]


@cache
def weights() -> Floats:
    """[4, rows, columns]"""
    return np.stack([dequantize(member) for member in members()])


def products(machine: Machine, kind: Kind = KIND) -> None:
    x = vectors(KIND, SHAPE, KIND.tokens)
    y = matmul(kind, pack(members()), x, machine, 3)
    assert np.array_equal(y, x @ weights()[3].T), "wrong result"


def products_of_large_x(machine: Machine) -> None:
    products(machine, replace(KIND, limits=SMALL))


def mixtures(machine: Machine) -> None:
    x = vectors(KIND, SHAPE, KIND.tokens)
    experts = np.random.default_rng(0).choice([0, 0, 2], (KIND.tokens, 2)).astype(np.int32)
    y = expert_matvec(
        KIND, pack(members()), x, experts, np.ones(experts.shape, np.float32), machine
    )
    assert np.array_equal(y, np.einsum("tc,tkrc->tr", x, weights()[experts])), "wrong result"


def decoded(machine: Machine) -> None:
    bits = decode(pack(members()), "bf16", machine)
    assert bits.tobytes() == from_float32(weights(), "BF16").tobytes(), "wrong result"


Call = Callable[[Machine], None]
CALLS: tuple[Call, ...] = (products, products_of_large_x, mixtures, decoded)

RACE = "race: |which was never written"
OUTSIDE = "outside all arrays"
WRONG = "wrong result"

# A call, a text in one of its kernels, its replacement, and the error that is expected.
FAULTS: dict[str, tuple[Call, str, str, str]] = {
    # Barriers.
    "x and table, no barrier": (
        products,
        "__syncthreads();\n    for (; number",
        "for (; number",
        RACE,
    ),
    "next tile, no barrier": (
        mixtures,
        "__syncthreads();  // the next tile",
        "// the next tile",
        RACE,
    ),
    "table, no barrier": (
        decoded,
        "__syncthreads();\n        Bits* out",
        "Bits* out",
        RACE,
    ),
    "next table, no barrier": (
        decoded,
        "__syncthreads();  // the next table",
        "// the next table",
        RACE,
    ),
    "non-zeros, no warp barrier": (
        decoded,
        "void write() {\n        __syncwarp();",
        "void write() {",
        RACE,
    ),
    "empty window, no warp barrier": (
        decoded,
        "__syncwarp();\n        out += LENGTH;",
        "out += LENGTH;",
        RACE,
    ),
    "counters, no barrier": (
        mixtures,
        "counts[e] = 0;\n    __syncthreads();",
        "counts[e] = 0;",
        RACE,
    ),
    "ranks, no barrier": (
        mixtures,
        "            }\n            __syncthreads();\n            if (turn",
        "            }\n            if (turn",
        RACE,
    ),
    "last pair of an expert, no barrier": (
        mixtures,
        "ranks[pair] + 1;\n            }\n            __syncthreads();",
        "ranks[pair] + 1;\n            }",
        RACE,
    ),
    "sums of neighbors, no barrier": (
        mixtures,
        "= my_tiles;\n    __syncthreads();",
        "= my_tiles;",
        RACE,
    ),
    "overwritten sums, no barrier": (
        mixtures,
        "__syncthreads();\n        pairs_before[thread] += more;",
        "pairs_before[thread] += more;",
        RACE,
    ),
    "positions in order, no barrier": (
        mixtures,
        "__syncthreads();\n    for (int pair = thread",
        "for (int pair = thread",
        f"{RACE}|{OUTSIDE}",
    ),
    # Warps.
    "a lane is missing from a mask": (
        products,
        "sums[0] += __shfl_xor_sync(FULL,",
        "sums[0] += __shfl_xor_sync(FULL >> 1,",
        "lane 31 is not in its own mask",
    ),
    "a shuffle in a branch": (
        products,
        "u32 other = __shfl_up_sync(FULL, value, distance);",
        "u32 other = 0;\n"
        "if (threadIdx.x % 32 >= distance) other = __shfl_up_sync(FULL, value, distance);",
        "lane|deadlock",
    ),
    "the total of 31 lanes": (
        products,
        "__shfl_sync(FULL, upto, 31)",
        "__shfl_sync(FULL, upto, 30)",
        f"{WRONG}|{OUTSIDE}",
    ),
    # The ends of things.
    "the last segment is forgotten": (
        products,
        "(rows - 1) / rows_per_segment + 1",
        "(rows - 1) / rows_per_segment",
        WRONG,
    ),
    "the last segment has all rows": (
        decoded,
        "(segment + 1) * rows_per_segment : rows",
        "(segment + 1) * rows_per_segment : (segment + 1) * rows_per_segment",
        f"{OUTSIDE}|{RACE}",
    ),
    "weights beyond the range": (
        decoded,
        "(inside || byte < visit.span)",
        "true",
        f"{OUTSIDE}|{RACE}",
    ),
    "a step that ends after the range": (
        decoded,
        "!again && place + step <= visit.span",
        "!again",
        f"{OUTSIDE}|{RACE}",
    ),
    "no zero after x": (products, "[stack.columns] = {};", "[0] = {};", RACE),
    "x is too long": (
        products,
        "c < stack.columns; c += blockDim.x) {\n        Column",
        "c <= stack.columns; c += blockDim.x) {\n        Column",
        f"{OUTSIDE}|{RACE}",
    ),
    "the table ends early": (
        products,
        "i < TABLE_SHARED / 16;",
        "i < TABLE_SHARED / 16 - 1;",
        RACE,
    ),
    "more tokens than there are": (
        products,
        "lane / sharing < tile.count",
        "true",
        f"{OUTSIDE}|{RACE}",
    ),
    "signs after the segments": (
        products,
        "min(first + (int)(threadIdx.x % 32), end >> 5)",
        "first + 4000 + (int)(threadIdx.x % 32)",
        OUTSIDE,
    ),
    "unaligned words": (products, "first & ~3ull", "first", "not aligned"),
    "the first vector belongs to two segments": (
        decoded,
        "first >= skip && first + VECTOR <= filled",
        "first + VECTOR <= filled",
        f"{OUTSIDE}|{RACE}|{WRONG}",
    ),
    "the window is never emptied": (decoded, "*vector = uint4{0, 0, 0, 0};", "", WRONG),
    "one sum too many": (
        mixtures,
        "i < size; i += step) {\n        const u64 token",
        "i <= size; i += step) {\n        const u64 token",
        OUTSIDE,
    ),
    "one column too many": (
        products_of_large_x,
        "if (column < columns) value",
        "value",
        OUTSIDE,
    ),
    "all signs from the first window": (products, "window += sign >> 5;", "", WRONG),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("call", CALLS)
def test_without_a_fault(call: Call, order: int) -> None:
    call(Machine(order))


@pytest.fixture(scope="module")
def noticed() -> dict[str, list[Future[None]]]:
    """All faults in parallel: there is much to compile."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {
            fault: [pool.submit(call, Machine(order, (old, new))) for order in ORDERS]
            for fault, (call, old, new, _) in FAULTS.items()
        }


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_noticed(fault: str, noticed: dict[str, list[Future[None]]]) -> None:
    texts = [path.read_text() for path in (files("qmoe_format.gpu") / "kernels").iterdir()]
    assert sum(text.count(FAULTS[fault][1]) for text in texts) == 1
    for future in noticed[fault]:
        assert re.search(FAULTS[fault][3], str(future.exception()))
