"""Runs without a GPU: their memory, and microseconds predicted from the machine code.

    python -m benchmarks.gpu_model

Prints, and writes into benchmarks/results/gpu_model.json:

- bits per weight of random matrices;
- products with one token, beside what benchmarks/results/gpu.json has. When that was measured, a
  matrix's rows came in the order of the file and a half row had up to twice as many lanes, so the
  prediction beside it (*then*) is for such runs; the others are for runs as they are now;
- whole layers of eight experts with one token, beside what torch's products alone take with bf16;
- products with 16 tokens for each of eight experts, beside torch's with bf16 from gpu.json, with a
  matrix as most are and as those of the recipe ``rd`` are;
- decoding, beside the time to write as much.

Each kernel as it is now is compiled, and its instructions are counted in the machine code of sm_90
(``gpu_parts``); random levels give the number of codes (``gpu_codes``); a model of a multiprocessor
adds up (``gpu_clocks``).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks import gpu_clocks, gpu_parts, report
from benchmarks.gpu_clocks import BANDWIDTH
from benchmarks.gpu_codes import as_measured, bits_of, codes_of, layout_of
from benchmarks.gpu_listing import Listing, disassembled
from benchmarks.gpu_parts import Walk
from benchmarks.gpu_works import FUSED
from benchmarks.readme import table
from qmoe_format.gpu import run_batches, runs
from qmoe_format.gpu.launch import Kernel
from qmoe_format.gpu.runs import RunLayout
from tests.gpu import nvrtc
from tests.gpu.variants import H200

Record = dict[str, Any]

SHAPES = ((4096, 14336), (2080, 6144), (14336, 4096), (7168, 2048), (4096, 1536), (2048, 768))
SEVERAL = ((4096, 14336), (14336, 4096), (4096, 1536), (2048, 768))
LAYERS = ((2048, 768), (4096, 14336))  # hidden, inner
DECODED = (4096, 14336)
ZEROS = (0.885, 0.6)


@cache
def listing(kernel: Kernel) -> Listing:
    """The machine code of a kernel."""
    _, compiler = nvrtc.compilers()
    return disassembled(compiler.build(kernel.source, "sm_90")[0])


def matrix(rows: int, columns: int, zeros: float) -> Record:
    """What a record is about."""
    return {"rows": rows, "columns": columns, "zeros": zeros}


def memory() -> Iterator[Record]:
    """Bits per weight."""
    for rows, columns in SHAPES:
        for zeros in ZEROS:
            layout = layout_of(rows, columns, zeros)
            then = bits_of(as_measured(layout), zeros, ordered=False).all
            bits = {**bits_of(layout, zeros)._asdict(), "then": then}
            yield {**matrix(rows, columns, zeros), **bits}


def one_token(measured: Record) -> Iterator[Record]:
    """All products with one token, of one matrix or of ``FUSED``, that were measured."""
    for shape in measured["shapes"]:
        rows, columns = shape["rows"], shape["columns"]
        for one in shape["compared"]:
            if one["call"] not in ("one 1", "fused 1"):
                continue
            zeros, pairs = one["zeros"], FUSED if one["call"] == "fused 1" else 1
            layout = layout_of(rows, columns, zeros)
            before = as_measured(layout)
            then, now = codes_of(before, zeros, ordered=False), codes_of(layout, zeros)
            seconds_then = product(before, then, pairs)[1]["H100"]
            walk, predicted = product(layout, now, pairs)
            yield {
                **matrix(rows, columns, zeros),
                "pairs": pairs,
                "instructions": walk._asdict(),
                "codes then": then,
                "codes": now,
                "measured": one["microseconds"],
                "predicted then": 1e6 * seconds_then,
                "predicted": {card: 1e6 * seconds for card, seconds in predicted.items()},
                "ratio": 1e6 * seconds_then / one["microseconds"],
            }


def product(layout: RunLayout, codes: float, pairs: int) -> tuple[Walk, dict[str, float]]:
    """With one token: instructions, and seconds on each card."""
    kernel = runs.product(layout, "bf16", "bf16", "LIST" if pairs > 1 else "ONE")
    walk = gpu_parts.product(listing(kernel))
    return walk, gpu_clocks.product(layout, walk, codes, pairs)


def bf16_of(measured: Record, call: str) -> dict[tuple[int, int, float], float]:
    """Microseconds of torch's bf16, by rows, columns and the zeros of the matrix beside it."""
    return {
        (shape["rows"], shape["columns"], one["zeros"]): one["microseconds"] * one["bf16_graph"]
        for shape in measured["shapes"]
        for one in shape["compared"]
        if one["call"] == call
    }


def layers(measured: Record) -> Iterator[Record]:
    """Gate, up and down of ``FUSED`` experts with one token, and their sum."""
    dense = bf16_of(measured, "fused 1")
    for hidden, inner in LAYERS:
        for zeros in ZEROS:
            of_inputs, of_output = layout_of(inner, hidden, zeros), layout_of(hidden, inner, zeros)
            kernels = (
                (of_inputs, runs.inputs(of_inputs, "bf16", "int64", 2), 2 * FUSED),
                (of_output, runs.output(of_output, "bf16", "int64", 2), FUSED),
            )
            inputs, output = (
                1e6 * gpu_clocks.product(layout, walk, codes_of(layout, zeros), pairs)["H100"]
                for layout, kernel, pairs in kernels
                for walk in [gpu_parts.product(listing(kernel))]
            )
            sums = 1e6 * (gpu_clocks.LAUNCH + gpu_clocks.LATENCY)
            bf16 = 2 * dense[inner, hidden, zeros] + dense[hidden, inner, zeros]
            yield {
                "hidden": hidden,
                "inner": inner,
                "zeros": zeros,
                "inputs": inputs,
                "output": output,
                "sums": sums,
                "all": inputs + output + sums,
                "bf16": bf16,
                "times as fast": bf16 / (inputs + output + sums),
            }


def sixteen_tokens(measured: Record) -> Iterator[Record]:
    """16 tokens for each of ``FUSED`` experts."""
    dense = bf16_of(measured, "fused 16")
    cases = [(*shape, zeros) for shape in SEVERAL for zeros in ZEROS]
    for case, rd in [(case, rd) for rd in (False, True) for case in cases]:
        layout, codes = layout_of(*case), codes_of(layout_of(*case), case[2])
        if rd:
            layout = replace(layout, scales=1, column_scales=True)
        batch = run_batches.choose(layout, 1, "bf16", H200)
        assert batch is not None
        counted = gpu_parts.marking(listing(batch.product("bf16", "GROUPS")), batch)
        cutting = gpu_parts.cutting(listing(batch.prepare("GROUPS")), batch)
        quarters = 4 * gpu_parts.most_tiles(batch)
        times = gpu_clocks.several(batch, counted, cutting, codes, FUSED)
        yield {
            **matrix(*case),
            "rd": rd,
            "instructions": {
                "a code": counted.walk.walk / 32,
                "of them ALU": counted.walk.alu / 32,
                "a quarter of a step of a tile": counted.step.issued / quarters,
                "the rest of a fill": counted.rest,
                "32 numbers of x, cut": cutting,
            },
            "first": 1e6 * times.first,
            "marking": 1e6 * times.marking,
            "products": 1e6 * times.products,
            "x": 1e6 * times.x,
            "rest": 1e6 * times.rest,
            "all": 1e6 * times.all,
            "bound": times.bound,
            "bf16": dense[case],
            "times as fast": dense[case] / (1e6 * times.all),
        }


def decoding(measured: Record) -> Iterator[Record]:
    """A matrix in bf16: a ternary one, and one like a refined one of ``rd``."""
    rows, columns = DECODED
    for zeros in ZEROS:
        layout = layout_of(rows, columns, zeros)
        codes = codes_of(layout, zeros)
        for refined in (False, True):
            kind = replace(layout, column_scales=refined)
            counted = gpu_parts.decoding(listing(runs.decode(kind, "bf16", refined)), refined)
            yield {
                **matrix(rows, columns, zeros),
                "refined": refined,
                "instructions": {
                    "a landing": counted.walk.walk / 32,
                    "8 weights": counted.write.issued / counted.vectors,
                },
                "predicted": 1e6 * gpu_clocks.decode(kind, counted, codes),
                "writing": 1e6 * 2 * rows * columns / measured["bandwidth"]["write"],
            }


def named(record: Record) -> str:
    """A matrix."""
    return f"{record['rows']} x {record['columns']}, {100 * record['zeros']:g} %"


def memory_table(records: list[Record]) -> str:
    """A line for two records, of which the first has more zeros."""
    lines = []
    for many, few in zip(records[::2], records[1::2], strict=True):
        bits = [many["all"], few["all"], many["starts"]]
        bits += [each["then"] for each in (many, few)]
        lines.append([f"{many['rows']} x {many['columns']}", *(f"{each:.2f}" for each in bits)])
    more, fewer = (f"{100 * zeros:g} %" for zeros in ZEROS)
    ours = f"{more} zeros | {fewer} | of them starts"
    return table(f"rows x columns | {ours} | then, {more} | then, {fewer}", lines)


def one_token_table(records: list[Record]) -> str:
    """Instructions, codes and microseconds."""
    lines = [
        [
            f"{named(each)}, {each['pairs']}",
            *map(str, each["instructions"].values()),
            *(f"{each[name]:.1f}" for name in ("codes then", "measured", "predicted then")),
            f"{each['ratio']:.2f}",
            f"{each['codes']:.1f}",
            *(f"{each['predicted'][card]:.1f}" for card in BANDWIDTH),
        ]
        for each in records
    ]
    header = ["one token, experts", *Walk._fields, "codes then", "measured", "predicted then"]
    return table(" | ".join([*header, "ratio", "codes", *BANDWIDTH]), lines)


def layers_table(records: list[Record]) -> str:
    """Microseconds."""
    lines = [
        [
            f"{each['hidden']}, {each['inner']}, {100 * each['zeros']:g} %",
            *(f"{each[name]:.1f}" for name in ("inputs", "output", "sums", "all", "bf16")),
            f"{each['times as fast']:.1f}",
        ]
        for each in records
    ]
    header = "gate and up | down | sums | all | bf16, products alone, measured | times as fast"
    return table(f"hidden, inner, zeros | {header}", lines)


def sixteen_tokens_table(records: list[Record]) -> str:
    """Microseconds."""
    parts = ("first", "marking", "products", "x", "rest", "all", "bf16")
    lines = [
        [
            named(each) + ", rd" * each["rd"],
            *(f"{each[name]:.0f}" for name in parts),
            f"{each['times as fast']:.1f}",
            each["bound"],
        ]
        for each in records
    ]
    return table(
        "8 matrices, zeros | first launch | marking | products, instructions | "
        "products, x from L2 | rest | all | bf16, measured | times as fast | most waits for",
        lines,
    )


def sixteen_tokens_instructions(records: list[Record]) -> str:
    """The least and the most that were counted."""
    lines = []
    for rd in (False, True):
        counted = [each["instructions"] for each in records if each["rd"] == rd]
        ends = [(min(each), max(each)) for each in zip(*map(dict.values, counted), strict=True)]
        spreads = (f"{least:.1f} to {most:.1f}" for least, most in ends)
        lines.append(["rd" if rd else "two scales a row", *spreads])
    return table(f"instructions | {' | '.join(records[0]['instructions'])}", lines)


def decoding_table(records: list[Record]) -> str:
    """Instructions and microseconds."""
    lines = [
        [
            f"{named(each)}, {'refined, column scales' if each['refined'] else 'ternary'}",
            *(f"{number:.1f}" for number in each["instructions"].values()),
            *(f"{each[name]:.0f}" for name in ("predicted", "writing")),
        ]
        for each in records
    ]
    return table("decoding | a landing | 8 weights | µs | µs, writing", lines)


def main() -> None:
    measured = report.load("gpu")
    kept, one, whole = [*memory()], [*one_token(measured)], [*layers(measured)]
    sixteen, decoded = [*sixteen_tokens(measured)], [*decoding(measured)]
    ratios = [each["ratio"] for each in one]
    print(memory_table(kept), one_token_table(one), sep="\n\n")
    print(
        f"predicted / measured: {min(ratios):.2f} to {max(ratios):.2f}, "
        f"median {statistics.median(ratios):.2f}\n"
    )
    print(layers_table(whole), "", sep="\n")
    print(sixteen_tokens_table(sixteen), sixteen_tokens_instructions(sixteen), sep="\n\n")
    print("", decoding_table(decoded), sep="\n")
    figures = {
        "memory": kept,
        "one token": one,
        "layers": whole,
        "16 tokens": sixteen,
        "decoding": decoded,
    }
    device = measured["device"]["name"]
    report.save("gpu_model", {"device": device, "ratio": report.spread(ratios), **figures})


if __name__ == "__main__":
    main()
