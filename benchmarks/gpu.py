"""Products and decoding on a GPU, beside torch's bf16 and QMoE's published scheme and kernel.

    python -m benchmarks.gpu [--quick] [--correctness-only] [--shapes RxC,RxC] [--resume]
                             [--codewords] [--width BITS] [--segment WEIGHTS] [--results FOLDER]

Needs a CUDA device, CuPy (extra ``cuda12`` or ``cuda13``) and torch with CUDA. Writes gpu.json
into benchmarks/results after each shape, so that ``--resume`` can continue an interrupted run, and
gpu.png at the end; ``--quick`` and ``--correctness-only`` write nothing.

Every shape is first checked against products in binary64. Then all ways take turns: ours and the
anchor at three fractions of zeros, and bf16. They are timed with CUDA events, in a CUDA graph and
launched one by one. Matrices come from memory: each way has copies of its matrix at different
addresses, together more than four times the L2 cache, and every call uses the next one. (A matrix
is encoded once; experts differ in their scales only.) Dictionary and x stay in the cache, as they
do in a model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu_figures, gpu_works, report
from benchmarks.gpu_checks import Wrong, check
from benchmarks.gpu_figures import SHAPES, ZEROS, Record, Shape
from benchmarks.gpu_timing import Cuda
from benchmarks.gpu_works import Problem
from qmoe_format import codec
from qmoe_format.errors import QMoEError

QUICK_SHAPES = ((2080, 6144), (4096, 1536))
DENSE_ZEROS = 0.885  # the matrix that bf16 multiplies, too


def measure(device: Cuda, problems: list[Problem], rounds: int, bandwidth: Record) -> Record:
    """Time everything on one shape; ``problems``: one per fraction of zeros."""
    rows, columns = problems[0].shape
    x = device.bf16(max(gpu_works.TOKENS), columns)
    values = next(p.values(torch.bfloat16) for p in problems if p.zeros == DENSE_ZEROS)
    works = [work for problem in problems for work in gpu_works.ours(problem, x)]
    works += [work for problem in problems for work in gpu_works.anchors(problem, x)]
    works += gpu_works.dense(device, values, x)
    measured = []
    for call in dict.fromkeys(work.call for work in works):
        measured += device.times([work for work in works if work.call == call], rounds)
    return {
        "rows": rows,
        "columns": columns,
        "bits_per_weight": {p.zeros: 8 * p.bytes / (rows * columns) for p in problems},
        "compared": gpu_figures.compare(measured, bandwidth),
        "works": measured,
    }


def run(options: argparse.Namespace, device: Cuda) -> tuple[list[Record], list[str]]:
    """Check and measure all shapes: figures, and what turned out wrong and was left out."""
    torch.manual_seed(0)
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    rounds = 6 if options.quick else 15
    profile = codec.Profile(options.width, options.segment)
    settings = {"width": options.width, "segment_weights": options.segment, "rounds": rounds}
    if options.codewords:
        settings["codewords"] = True
    about = device.description()
    measured = gpu_figures.kept(options.results, settings, about) if options.resume else []
    bandwidth = device.bandwidth(rounds)
    wrong: list[str] = []
    for shape in shapes:
        if any((record["rows"], record["columns"]) == shape for record in measured):
            continue
        started = time.perf_counter()
        problems = []
        try:
            for zeros in ZEROS:
                problems.append(Problem(device, shape, zeros, profile, runs=not options.codewords))
                check(problems[-1])
            if not options.correctness_only:
                measured.append(measure(device, problems, rounds, bandwidth))
                print(gpu_figures.lines(measured[-1]))
        except Wrong as found:
            wrong.append(str(found))
            print(f"wrong: {found}", file=sys.stderr)
        del problems
        device.release()
        print(f"{shape[0]} x {shape[1]}: {time.perf_counter() - started:.1f} s\n", flush=True)
        if measured and not options.quick:
            gpu_figures.save(options.results, settings, about, bandwidth, measured)
    return measured, wrong


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds, no files")
    parser.add_argument("--correctness-only", action="store_true", help="check, measure nothing")
    parser.add_argument("--shapes", type=shape_list, help="such as 4096x14336,2080x6144")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--codewords", action="store_true", help="multiply without runs")
    parser.add_argument("--width", type=int, default=codec.PROFILES["fast"].width)
    parser.add_argument("--segment", type=int, default=codec.PROFILES["fast"].segment_weights)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder")
    return parser.parse_args(arguments)


def shape_list(text: str) -> list[Shape]:
    """``4096x14336,2080x6144``."""
    shapes = [tuple(int(number) for number in shape.split("x")) for shape in text.split(",")]
    return [(rows, columns) for rows, columns in shapes]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        device = Cuda()
    except QMoEError as error:
        sys.exit(f"error[{error.code}]: {error}")
    measured, wrong = run(options, device)
    if measured:
        if not options.quick:
            gpu_figures.plot(measured, options.results / "gpu.png")
        for name, value in gpu_figures.summary(measured).items():
            print(f"{name}: {value}")
    if wrong:
        sys.exit("\n".join(["wrong:", *wrong]))


if __name__ == "__main__":
    main()
