"""Products and decoding on a GPU, beside torch's bf16 and QMoE's published scheme and kernel.

    python -m benchmarks.gpu [--quick] [--correctness-only] [--shapes RxC,RxC] [--resume]
                             [--width BITS] [--segment WEIGHTS] [--results FOLDER]

Needs a CUDA device, CuPy (extra ``cuda12`` or ``cuda13``) and torch with CUDA. Writes gpu.json
into benchmarks/results after each shape, so that a stopped run goes on with ``--resume``, and
gpu.png in the end; ``--quick`` and ``--correctness-only`` write nothing.

What is measured on a shape is compared with products in binary64 first. Then all ways take turns:
ours and the anchor at three shares of zeros, and bf16. Times are by CUDA events, in a CUDA graph
and launched one by one. Matrices come from memory: each way has copies of its matrix at other
addresses, more than four times the L2 cache together, and every call takes the next one. (A matrix
is coded once; experts differ in their scales alone.) Dictionary and x stay in the cache, as they do
in a model.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_figures, report
from benchmarks.gpu_figures import SHAPES, ZEROS, Record, Shape
from qmoe_format import codec, gpu
from qmoe_format.errors import QMoEError

QUICK_SHAPES = ((2080, 6144), (4096, 1536))
DENSE_ZEROS = 0.885  # the matrix that bf16 multiplies, too


def require_device() -> None:
    """Raises ``QMoEError`` where nothing can be measured."""
    gpu.require()
    import torch

    if not torch.cuda.is_available():
        raise QMoEError(
            "dependency",
            f"torch {torch.__version__} finds no CUDA device: install one built for CUDA",
        )


def problems(shape: Shape, profile: codec.Profile) -> list[Any]:
    """One a share of zeros, each found to be right."""
    from benchmarks.gpu_checks import check
    from benchmarks.gpu_ways import Problem

    made = [Problem(*shape, zeros, profile) for zeros in ZEROS]
    for problem in made:
        check(problem)
    return made


def measure(shape: Shape, profile: codec.Profile, rounds: int, bandwidth: Record) -> Record:
    """Check, then time, everything on one shape."""
    import torch

    from benchmarks import gpu_ways
    from benchmarks.gpu_timing import times

    made = problems(shape, profile)
    x = gpu_ways.bf16(max(gpu_ways.TOKENS), shape[1])
    values = next(p.values(torch.bfloat16) for p in made if p.zeros == DENSE_ZEROS)
    works = [
        *itertools.chain.from_iterable(gpu_ways.ours(problem, x) for problem in made),
        *itertools.chain.from_iterable(gpu_ways.anchors(problem, x) for problem in made),
        *gpu_ways.dense(values, x),
    ]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    measured = []
    for call in dict.fromkeys(work.call for work in works):
        measured += times([work for work in works if work.call == call], rounds, stream)
    return {
        "rows": shape[0],
        "columns": shape[1],
        "bits_per_weight": {p.zeros: 8 * p.bytes / (shape[0] * shape[1]) for p in made},
        "compared": gpu_figures.compare(measured, bandwidth),
        "works": measured,
    }


def release() -> None:
    """Give the device's memory back."""
    import cupy
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


def run(options: argparse.Namespace) -> None:
    """All shapes; those that turn out wrong are named and left out. Exit status 1 then."""
    import torch

    from benchmarks import gpu_timing
    from benchmarks.gpu_checks import Wrong

    torch.manual_seed(0)
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    rounds = 6 if options.quick else 15
    profile = codec.Profile(options.width, options.segment)
    settings = {
        "width": profile.width,
        "segment_weights": profile.segment_weights,
        "rounds": rounds,
    }
    device = gpu_timing.device()
    measured = gpu_figures.kept(options.results, settings, device) if options.resume else []
    bandwidth = gpu_timing.bandwidth(rounds)
    wrong = []
    for shape in shapes:
        if any((record["rows"], record["columns"]) == shape for record in measured):
            continue
        started = time.perf_counter()
        try:
            if options.correctness_only:
                problems(shape, profile)
            else:
                measured.append(measure(shape, profile, rounds, bandwidth))
                print(gpu_figures.lines(measured[-1]))
        except Wrong as found:
            wrong.append(str(found))
            print(f"wrong: {found}", file=sys.stderr)
        release()
        print(f"{shape[0]} x {shape[1]}: {time.perf_counter() - started:.1f} s\n", flush=True)
        if measured and not options.quick:
            gpu_figures.save(options.results, settings, device, bandwidth, measured)
    if measured:
        if not options.quick:
            gpu_figures.plot(measured, options.results / "gpu.png")
        for name, value in gpu_figures.summary(measured).items():
            print(f"{name}: {value}")
    if wrong:
        sys.exit("\n".join(["wrong:", *wrong]))


def shape_list(text: str) -> list[Shape]:
    """``4096x14336,2080x6144``."""
    shapes = [tuple(int(number) for number in shape.split("x")) for shape in text.split(",")]
    return [(rows, columns) for rows, columns in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds, no files")
    parser.add_argument("--correctness-only", action="store_true", help="check, measure nothing")
    parser.add_argument("--shapes", type=shape_list, help="such as 4096x14336,2080x6144")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--width", type=int, default=codec.PROFILES["fast"].width)
    parser.add_argument("--segment", type=int, default=codec.PROFILES["fast"].segment_weights)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder")
    options = parser.parse_args()
    try:
        require_device()
    except QMoEError as error:
        sys.exit(f"error[{error.code}]: {error}")
    run(options)


if __name__ == "__main__":
    main()
