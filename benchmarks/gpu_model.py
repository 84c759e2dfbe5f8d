"""Microseconds of products from runs, predicted from the machine code. No GPU needed.

    python -m benchmarks.gpu_model

Compiles each kernel that ``benchmarks.gpu`` measured with one token, counts the instructions of its
parts in the machine code of sm_90, draws random levels for the number of codes, and adds up what a
multiprocessor does. Prints predictions beside what benchmarks/results/gpu.json has, and writes
benchmarks/results/gpu_model.json. Needs nvdisasm, CUDA's or that of the package
``nvidia-cuda-nvdisasm``.

The constants come from data sheets and from small kernels that did one thing; none is fitted to the
figures that are predicted. Left out are caches, clocks that change, and that a warp alone on its
scheduler waits for each code.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np

from benchmarks import report
from benchmarks.gpu_works import FUSED
from benchmarks.readme import table
from qmoe_format.gpu import runs
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.runs import RunLayout
from tests.gpu import nvrtc
from tests.gpu.variants import H200

CLOCK = 1.755e9  # under load, of both cards
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes/s, as measured by reading
ISSUED = 4 * 0.80  # instructions of warps per clock, of four schedulers
WAVEFRONTS = 0.88  # of shared memory per clock
GATHER = 1.58  # wavefronts of one x for each lane of a warp, replayed on random matrices
LAUNCH = 1.3e-6  # from kernel to kernel in a graph
LATENCY = 1.0e-6  # offsets, then words, from memory; the last sums and y


class Parts(NamedTuple):
    """Instructions of a warp.

    Attributes:
        prologue: up to its first group, on the longest way there.
        walk: for 32 codes.
        group: for a group besides its codes.
        tail: for the last 25 to 32 codes of a group.
    """

    prologue: int
    walk: int
    group: int
    tail: int


def disassembled(code: bytes) -> str:
    """nvdisasm's listing."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            files = metadata.files("nvidia-cuda-nvdisasm") or ()
        except metadata.PackageNotFoundError:
            sys.exit("there is no nvdisasm: run pip install nvidia-cuda-nvdisasm")
        found = next(str(file.locate()) for file in files if file.name == "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [found, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def count(listing: str) -> Parts:
    """The parts of a product's kernel: its innermost loop with 32 loads of x is the walk."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1].strip())
    targets = {
        place: labels[branch[1]]
        for place, text in enumerate(instructions)
        if (branch := re.search(r"\bBRA (?:.*, )?`\((\.L_x_\d+)\)", text))
    }

    def longest(begin: int, end: int) -> int:
        """Most instructions from one to the other by branches forward."""
        ways = {end: 0}
        for place in reversed(range(begin, end)):
            after = [targets[place]] if place in targets else []
            if not re.match(r"(BRA(?!\.DIV)|EXIT|RET)\b", instructions[place]) or re.search(
                r"BRA.* U?P\d,", instructions[place]
            ):
                after.append(place + 1)
            lengths = [ways[each] for each in after if each > place and each in ways]
            if lengths:
                ways[place] = 1 + max(lengths)
        return ways[begin]

    loops = sorted(
        (end + 1 - begin, begin, end + 1) for end, begin in targets.items() if begin < end
    )
    loads = [len(re.findall(r"\bLDS ", text)) for text in instructions]
    walk, begin, end = next(loop for loop in loops if sum(loads[loop[1] : loop[2]]) == 32)
    _, first, after = next(loop for loop in loops if loop[1] < begin and loop[2] > end)
    sums = max(at for at in range(end, after) if loads[at])  # the tail ends with the last x
    return Parts(
        longest(0, begin),
        walk,
        longest(first, begin) + longest(sums, after),
        longest(end, sums),
    )


def layout_of(rows: int, columns: int, zeros: float) -> RunLayout:
    """What ``gpu.upload`` chooses for independent levels."""
    landings = round((1 - zeros) * rows * columns)
    shape = {"experts": 1, "rows": rows, "columns": columns}
    stack = SimpleNamespace(**shape, landings=landings, scales=2, column_scales=False)
    found = runs.choose(cast(DictLayout, stack), H200)
    assert found is not None
    return found


def codes_of(layout: RunLayout, zeros: float, groups: int = 200) -> float:
    """Codes of a lane in a group, the mean over random groups."""
    reach, halves = (1 << layout.bits) - 1, 32 // layout.lanes
    slot, region = np.divmod(np.arange(layout.columns), layout.lanes)
    places = np.sort(region * layout.slots + slot + slot // (reach - 1))
    random = np.random.default_rng(0)
    most = []
    for _ in range(groups):
        lengths = []
        for _ in range(halves):
            at = places[random.random(places.size) < (1 - zeros) / 2]
            before = np.concatenate([[-1], at[:-1]])
            empty = (before + reach + 1) // reach * reach - 1  # the first empty place after
            jumps = np.where(at - before > reach, 1 + np.maximum(0, (at - empty - 1) // reach), 0)
            lengths.append(at.size + int(jumps.sum()))
        most.append(max(1, math.ceil(max(lengths) / layout.lanes)))
    return statistics.mean(most)


def predict(layout: RunLayout, parts: Parts, codes: float, pairs: int) -> dict[str, float]:
    """Seconds on each card for one token and ``pairs`` matrices."""
    each = math.ceil(layout.groups / max(H200.multiprocessors // pairs, 1))
    blocks = pairs * math.ceil(layout.groups / each)
    turns = math.ceil(blocks / H200.multiprocessors)
    walks = max(0, math.ceil(codes / 32) - 1)
    tail = parts.tail * math.ceil((codes - 32 * walks) / 8) / 4
    instructions = 32 * parts.prologue + each * (parts.group + walks * parts.walk + tail)
    wavefronts = layout.slots + each * codes * GATHER
    busy = turns * max(instructions / ISSUED, wavefronts / WAVEFRONTS) / CLOCK
    bits = layout.groups * 32 * (16 + codes * layout.bits) + layout.rows * 32
    return {
        card: LAUNCH + LATENCY + max(busy, pairs * bits / 8 / bandwidth)
        for card, bandwidth in BANDWIDTH.items()
    }


def main() -> None:
    measured = report.load("gpu")
    _, compiler = nvrtc.compilers()
    records: list[dict[str, Any]] = []
    for shape in measured["shapes"]:
        rows, columns = shape["rows"], shape["columns"]
        for one in shape["compared"]:
            if one["call"] not in ("one 1", "fused 1"):
                continue
            pairs = FUSED if one["call"] == "fused 1" else 1
            layout = layout_of(rows, columns, one["zeros"])
            kernel = runs.product(layout, "bf16", "bf16", "LIST" if pairs > 1 else "ONE")
            parts = count(disassembled(compiler.build(kernel.source, "sm_90")[0]))
            codes = codes_of(layout, one["zeros"])
            predicted = predict(layout, parts, codes, pairs)
            records.append(
                {
                    "rows": rows,
                    "columns": columns,
                    "zeros": one["zeros"],
                    "pairs": pairs,
                    "instructions": parts._asdict(),
                    "codes": codes,
                    "predicted": {card: 1e6 * seconds for card, seconds in predicted.items()},
                    "measured": one["microseconds"],
                }
            )
    ratios = [record["predicted"]["H100"] / record["measured"] for record in records]
    lines = [
        [
            f"{record['rows']} × {record['columns']}, {record['zeros']:.1%}, {record['pairs']}",
            *(str(number) for number in record["instructions"].values()),
            f"{record['codes']:.1f}",
            *(f"{record['predicted'][card]:.1f}" for card in BANDWIDTH),
            f"{record['measured']:.1f}",
            f"{ratio:.2f}",
        ]
        for record, ratio in zip(records, ratios, strict=True)
    ]
    parts_of = " | ".join(Parts._fields)
    header = f"matrix, zeros, experts | {parts_of} | codes | H100 | H200 | measured | ratio"
    print(table(header, lines))
    print(
        f"predicted / measured: {min(ratios):.2f} to {max(ratios):.2f}, "
        f"median {statistics.median(ratios):.2f}"
    )
    device = measured["device"]["name"]
    report.save("gpu_model", {"device": device, "ratio": report.spread(ratios), "records": records})


if __name__ == "__main__":
    main()
