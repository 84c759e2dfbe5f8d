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

from qmoe_format.codec import EncodedMatrix, dequantize, encode_matrix
from qmoe_format.codec import decode as decode_levels
from qmoe_format.dtypes import from_float32
from qmoe_format.gpu.packing import Matrix, PackedStack, pack
from tests.gpu import run_reference, shim
from tests.gpu.problems import (
    DictKind,
    Floats,
    GroupKind,
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
KIND = DictKind(((0.885, 12), None), 2, False, "fp32", 11, True, False)
REFINED = replace(KIND, strings=((0.885, 12), (0.98, 12)))
LEVELS = replace(KIND, strings=((0.6, 12), (0.2, 12)))
BITS = GroupKind(3, ("linear", True), "fp32", 11, True, False)
SHAPE = Shape(28, 301, 0.2, 12, 0, exact=True)
BATCH_SHAPE = Shape(421, 301, 0.6, 12, 0, exact=True)


@cache
def members(kind: Kind = KIND) -> list[Matrix]:
    return [matrix(kind, SHAPE, seed) for seed in range(4)]


@cache
def weights(kind: Kind = KIND) -> Floats:
    """[4, rows, columns]"""
    return np.stack([dequantize(member) for member in members(kind)])


def products(machine: Machine, kind: Kind = KIND) -> None:
    x = vectors(KIND, SHAPE, KIND.tokens)
    y = matmul(kind, pack(members(kind)), x, machine, 3)
    assert np.array_equal(y, x @ weights(kind)[3].T), "wrong result"


def products_of_large_x(machine: Machine) -> None:
    x = vectors(KIND, SHAPE, KIND.tokens)
    y = matmul(replace(KIND, small=True), pack(members()), x, machine, 3)
    assert np.array_equal(y, x @ weights()[3].T), "wrong result"


def mixtures(machine: Machine, kind: Kind = KIND) -> None:
    x = vectors(KIND, SHAPE, KIND.tokens)
    experts = np.random.default_rng(0).choice([0, 0, 2], (KIND.tokens, 2)).astype(np.int32)
    y = expert_matvec(
        kind, pack(members(kind)), x, experts, np.ones(experts.shape, np.float32), machine
    )
    assert np.array_equal(y, np.einsum("tc,tkrc->tr", x, weights(kind)[experts])), "wrong result"


def decoded(machine: Machine, kind: Kind = KIND) -> None:
    bits = decode(pack(members(kind)), "bf16", machine)
    assert bits.tobytes() == from_float32(weights(kind), "BF16").tobytes(), "wrong result"


def refined_products(machine: Machine) -> None:
    products(machine, REFINED)


def refined_mixtures(machine: Machine) -> None:
    mixtures(machine, REFINED)


def refined_decoded(machine: Machine) -> None:
    decoded(machine, REFINED)


def refined_zeros(machine: Machine) -> None:
    """Only zeros, in a stack with a refinement."""
    stack = pack([matrix(REFINED, SHAPE), matrix(REFINED, replace(SHAPE, zeros=1.0), 1)])
    assert not decode(stack, "bf16", machine, part=(1, 1)).any()


@cache
def runs(
    columns: int, bits: int = 3, lanes: int = 4, kind: DictKind = REFINED
) -> tuple[list[Matrix], PackedStack]:
    """Refined or ternary matrices, one of them empty."""
    shape = replace(SHAPE, columns=columns)
    coded = [matrix(kind, replace(shape, zeros=0.2 + 0.4 * seed), seed) for seed in range(3)]
    return coded, run_reference.stack(coded, bits, lanes)


def run_products(machine: Machine, columns: int = 304, *layout: int) -> None:
    """Several x for one matrix, at aligned addresses if ``columns`` is a multiple of four."""
    coded, stack = runs(columns, *layout)
    x = vectors(REFINED, replace(SHAPE, columns=columns), 3)
    y = matmul(REFINED, stack, x, machine, 1)
    assert np.array_equal(y, x @ dequantize(coded[1]).T), "wrong result"


def run_products_unaligned(machine: Machine) -> None:
    run_products(machine, 301)


def run_products_of_short_rows(machine: Machine) -> None:
    """A region has no more slots than a code can pass."""
    run_products(machine, 80, 4, 16)


def run_mixtures(machine: Machine) -> None:
    coded, stack = runs(304)
    x = vectors(REFINED, replace(SHAPE, columns=304), 2)
    experts = np.array([[2, 0, 7], [1, -1, 1]], np.int32)
    y = expert_matvec(REFINED, stack, x, experts, machine=machine)
    there = (experts >= 0) & (experts < 3)
    dense = np.stack([dequantize(member) for member in coded])[experts.clip(0, 2)]
    assert np.array_equal(y[there], np.einsum("tc,tkrc->tkr", x, dense)[there]), "wrong result"
    assert np.isnan(y[~there]).all(), "wrong result"


@cache
def batches(rows: int = BATCH_SHAPE.rows) -> tuple[list[Matrix], PackedStack]:
    """Ternary matrices, by default with more rows than a block takes at once."""
    coded = [matrix(KIND, replace(BATCH_SHAPE, rows=rows), seed) for seed in range(3)]
    return coded, run_reference.stack(coded, 4, 8)


def batch_products(machine: Machine, *rows: int) -> None:
    """More tokens than a tile takes, whose x has 18 bits."""
    coded, stack = batches(*rows)
    x = vectors(KIND, BATCH_SHAPE, 77)
    x[:, :3] += 2**17
    y = matmul(KIND, stack, x, machine, 1)
    assert np.array_equal(y, x @ dequantize(coded[1]).T), "wrong result"


def batch_products_of_few_rows(machine: Machine) -> None:
    batch_products(machine, 13)


def batch_mixtures(machine: Machine) -> None:
    coded, stack = batches()
    x = vectors(KIND, BATCH_SHAPE, 20)
    experts = np.random.default_rng(0).choice([0, 0, 2, 7], (20, 2)).astype(np.int32)
    y = expert_matvec(KIND, stack, x, experts, machine=machine)
    there = experts < 3
    dense = np.stack([dequantize(member) for member in coded])[experts.clip(0, 2)]
    assert np.array_equal(y[there], np.einsum("tc,tkrc->tkr", x, dense)[there]), "wrong result"
    assert np.isnan(y[~there]).all(), "wrong result"


@cache
def levels() -> tuple[list[Matrix], PackedStack]:
    """A matrix with levels up to 37; in a row with hardly any below zero, a path stays long."""
    coded = matrix(LEVELS, replace(BATCH_SHAPE, rows=21))
    assert isinstance(coded, EncodedMatrix)
    values = decode_levels(coded.levels)
    values[4] = abs(values[4])
    values[4, 0] = -1
    coded = encode_matrix(values, coded.row_scale, coded.column_scale)
    return [coded], run_reference.stack([coded], 4, 8)


def level_products(machine: Machine) -> None:
    coded, stack = levels()
    x = vectors(KIND, BATCH_SHAPE, 9)
    y = matmul(KIND, stack, x, machine)
    assert np.array_equal(y, x @ dequantize(coded[0]).T), "wrong result"


def run_decoded(machine: Machine, kind: DictKind = REFINED) -> None:
    """Rows that end within 16 bytes, and rows that do not."""
    for columns in (301, 304):
        coded, stack = runs(columns, kind=kind)
        bits = decode(stack, "bf16", machine)
        expected = np.stack([dequantize(member) for member in coded])
        assert bits.tobytes() == from_float32(expected, "BF16").tobytes(), "wrong result"


def ternary_run_decoded(machine: Machine) -> None:
    run_decoded(machine, KIND)


def group_products(machine: Machine) -> None:
    products(machine, BITS)


def group_mixtures(machine: Machine) -> None:
    mixtures(machine, BITS)


def group_decoded(machine: Machine) -> None:
    decoded(machine, BITS)


Call = Callable[[Machine], None]
CALLS: tuple[Call, ...] = (
    *(products, products_of_large_x, mixtures, decoded),
    *(refined_products, refined_mixtures, refined_decoded, refined_zeros),
    *(run_products, run_products_unaligned, run_products_of_short_rows, run_mixtures),
    *(batch_products, batch_products_of_few_rows, batch_mixtures, level_products),
    *(run_decoded, ternary_run_decoded),
    *(group_products, group_mixtures, group_decoded),
)

RACE = "race: |which was never written"
OUTSIDE = "outside all arrays"
WRONG = "wrong result"

# A call, a text in one of its kernels, its replacement, and the error that is expected.
FAULTS: dict[str, tuple[Call, str, str, str]] = {
    # Barriers.
    "x and table, no barrier": (
        products,
        "__syncthreads();\n    for (; number < part.to",
        "for (; number < part.to",
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
        "__shfl_sync(FULL, upto, 31), more",
        "__shfl_sync(FULL, upto, 30), more",
        f"{WRONG}|{OUTSIDE}|{RACE}",
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
        "segment < units() ? segment * rows_per_segment : rows",
        "segment * rows_per_segment",
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
        "!again && place + step.size <= visit.span",
        "!again",
        f"{OUTSIDE}|{RACE}",
    ),
    "no zero after x": (
        products,
        "c < padded; c += blockDim.x",
        "c < padded - 1; c += blockDim.x",
        RACE,
    ),
    "x is too long": (
        products,
        "c < columns; c += blockDim.x) {\n        Column",
        "c <= columns; c += blockDim.x) {\n        Column",
        f"{OUTSIDE}|{RACE}",
    ),
    "the table ends early": (
        products,
        "i < bytes / 16;",
        "i < bytes / 16 - 1;",
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
        "if (row >= rows) return;\n    for (u64 token",
        "if (row > rows) return;\n    for (u64 token",
        f"{RACE}|{OUTSIDE}",
    ),
    "one column too many": (
        products_of_large_x,
        "if (column < columns) value",
        "value",
        OUTSIDE,
    ),
    "all signs from the first window": (products, "window += sign >> 5;", "", WRONG),
    # Refinements.
    "cleared while it is read": (
        refined_products,
        "__syncwarp();  // what is cleared",
        "// what is cleared",
        RACE,
    ),
    "magnitudes, no barrier after clearing": (
        refined_decoded,
        "clear = (made | 15u) + 1;\n            __syncwarp();",
        "clear = (made | 15u) + 1;",
        RACE,
    ),
    "magnitudes, no barrier": (
        refined_products,
        "        }\n        __syncwarp();\n    }\n};",
        "        }\n    }\n};",
        RACE,
    ),
    "a ring that was never cleared": (
        refined_zeros,
        "    Magnitudes::clear_ring(shared);\n    for",
        "    for",
        RACE,
    ),
    "an addition that is not atomic": (
        refined_products,
        "atomicAdd((u32*)ring + zero % RING / 4, 1u << 8 * (zero % 4));",
        "ring[zero % RING]++;",
        RACE,
    ),
    "more codewords than the ring has room for": (
        refined_products,
        "made + upto + 16 <= from + RING",
        "made + upto <= from + 32 * RING",
        WRONG,
    ),
    "magnitudes that are still needed": (
        refined_products,
        "magnitudes.provide(nonzeros, nonzeros + more)",
        "magnitudes.provide(nonzeros + more, nonzeros + more)",
        WRONG,
    ),
    "magnitudes are added to old ones": (
        refined_decoded,
        "*(uint4*)(ring + v % RING) = uint4{0, 0, 0, 0};",
        "",
        WRONG,
    ),
    "a refinement without an end": (
        refined_mixtures,
        "refinement.bits > 0 &&",
        "",
        f"{OUTSIDE}|{WRONG}",
    ),
    "the mask's table for the refinement": (
        refined_products,
        "STRINGS + string] * 64",
        "STRINGS] * 64",
        WRONG,
    ),
    "the mask for the refinement": (
        refined_decoded,
        "(u64)expert * STRINGS + string;\n        const u32*",
        "(u64)expert * STRINGS;\n        const u32*",
        WRONG,
    ),
    # Runs.
    "x of runs, no barrier": (
        run_products,
        "__syncthreads();\n    for (; number < to;",
        "for (; number < to;",
        RACE,
    ),
    "unaligned x, no barrier": (
        run_products_unaligned,
        "__syncthreads();\n        stage_unaligned",
        "stage_unaligned",
        RACE,
    ),
    "the lines without a column": (run_products, "lines[i * 8] = {};\n#pragma", "\n#pragma", RACE),
    "the path goes on after its end": (
        run_products_of_short_rows,
        "i < left ? bytes_of_code<i>(words) : 0",
        "bytes_of_code<i>(words)",
        f"{OUTSIDE}|{RACE}",
    ),
    "no way back to the first slot": (
        run_products,
        "place = max(place, place - ring)",
        "place = place",
        f"{OUTSIDE}|{WRONG}",
    ),
    "a run too few in a sum": (
        run_mixtures,
        "for (int distance = LANES; distance > 0",
        "for (int distance = LANES / 2; distance > 0",
        WRONG,
    ),
    "the first words of another matrix": (
        run_mixtures,
        "stack.words + stack.bases[expert] * 32",
        "stack.words + stack.bases[0] * 32",
        f"{OUTSIDE}|{WRONG}",
    ),
    # Several tokens by runs.
    "marks, no barrier": (
        batch_products,
        "__syncthreads();\n            const Rows of",
        "const Rows of",
        RACE,
    ),
    "marks of an earlier group": (
        batch_products,
        "clear_group(marks, number);\n        __syncwarp();",
        "__syncwarp();",
        RACE,
    ),
    "cleared marks, no warp barrier": (
        batch_products,
        "clear_group(marks, number);\n        __syncwarp();",
        "clear_group(marks, number);",
        RACE,
    ),
    "groups after the last one": (
        batch_products_of_few_rows,
        "(count + TILE_GROUPS - 1) / TILE_GROUPS * TILE_GROUPS",
        "count",
        RACE,
    ),
    "partial sums, no barrier": (
        batch_products,
        "__syncthreads();\n        const int of",
        "const int of",
        RACE,
    ),
    "next partial sums, no barrier": (
        batch_products,
        "__syncthreads();  // the next sums",
        "// the next sums",
        RACE,
    ),
    "a place too far": (
        batch_products,
        "1u << (slot & 31)",
        "1u << (slot + 1 & 31)",
        WRONG,
    ),
    "marks of the next row": (batch_products, "g % ROWS * ROW_WORDS", "g % ROWS", WRONG),
    "x without its last bits": (batch_products, "rest -= to_float(term)", "rest = 0.0f", WRONG),
    "x of another pair": (
        batch_mixtures,
        "tile.pair(of < tile.count ?",
        "(of < tile.count ?",
        WRONG,
    ),
    "a column too far": (batch_products, "slot_of(two) + at % 2 * APART", "slot_of(two)", WRONG),
    "levels on empty places": (
        level_products,
        "there && !reach_divides((u32)(slot + 1 + SLOTS))",
        "there",
        WRONG,
    ),
    "levels after the end of a run": (
        level_products,
        "level = there && !reach_divides((u32)(slot",
        "level = !reach_divides((u32)(slot",
        WRONG,
    ),
    "levels that are not added atomically": (
        level_products,
        "atomicAdd(word, level ? __funnelshift_l(0, one, slot * PLACE_BITS) : 0);",
        "if (level) *word += __funnelshift_l(0, one, slot * PLACE_BITS);",
        RACE,
    ),
    "levels, no barrier": (
        run_decoded,
        "});\n    __syncwarp();\n    Bits* const out",
        "});\n    Bits* const out",
        RACE,
    ),
    "zeros, no barrier": (run_decoded, "__syncwarp();\n    const int end", "const int end", RACE),
    "levels that are not zeros at first": (
        ternary_run_decoded,
        "v < ROWS * row_bytes / 16; v += 32",
        "v < ROWS * row_bytes / 16; v += 64",
        RACE,
    ),
    "landings on empty places": (
        ternary_run_decoded,
        "there && !reach_divides((u32)(place + lines * LANES) / LANES)",
        "there",
        RACE,
    ),
    "landings that are not atomic": (
        run_decoded,
        "atomicAdd((u32*)(levels + (at & ~3)), level ? one << 8 * (at & 3) : 0);",
        "if (level) levels[at] += one;",
        RACE,
    ),
    "a byte for two lanes": (
        ternary_run_decoded,
        "const int spare = half % 2 * LANES + lane",
        "const int spare = lane",
        RACE,
    ),
    "one group too many": (run_decoded, "if (warp >=", "if (warp >", OUTSIDE),
    "one row of a group too many": (
        ternary_run_decoded,
        "r < ROWS && number * ROWS + r < rows",
        "r <= ROWS && number * ROWS + r < rows",
        f"{OUTSIDE}|{RACE}|{WRONG}",
    ),
    # Groups.
    "x, no barrier": (
        group_products,
        "runs * RUN, nullptr, shared);\n    __syncthreads();",
        "runs * RUN, nullptr, shared);",
        RACE,
    ),
    "no zeros after x": (group_products, "runs * RUN, nullptr", "stack.columns, nullptr", RACE),
    "one run too many": (
        group_mixtures,
        "run < runs; run += 32",
        "run <= runs; run += 32",
        f"{RACE}|{OUTSIDE}",
    ),
    "the last columns of a row": (
        group_decoded,
        "c + PART <= columns &&",
        "",
        f"{OUTSIDE}|{RACE}|{WRONG}",
    ),
    "one row too many": (group_decoded, "r < all; r += warps", "r <= all; r += warps", OUTSIDE),
    "no funnel": (
        group_products,
        "shift + BITS > 32 ?",
        "shift + BITS > 40 ?",
        WRONG,
    ),
    "the groups of another expert": (
        group_decoded,
        "bases[expert] + (u64)number",
        "(u64)number",
        WRONG,
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("call", CALLS)
def test_without_a_fault(call: Call, order: int) -> None:
    call(Machine(order))


def errors(call: Call, old: str, new: str) -> list[str]:
    """One for each order."""
    found = []
    for order in ORDERS:
        try:
            call(Machine(order, (old, new)))
            found.append("")
        except Exception as error:
            found.append(str(error))
    return found


@pytest.fixture(scope="module")
def noticed() -> dict[str, Future[list[str]]]:
    """All faults in parallel: there is much to compile."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {
            fault: pool.submit(errors, call, old, new)
            for fault, (call, old, new, _) in FAULTS.items()
        }


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_noticed(fault: str, noticed: dict[str, Future[list[str]]]) -> None:
    texts = [path.read_text() for path in (files("qmoe_format.gpu") / "kernels").iterdir()]
    assert sum(text.count(FAULTS[fault][1]) for text in texts) == 1
    for error in noticed[fault].result():
        assert re.search(FAULTS[fault][3], error)
