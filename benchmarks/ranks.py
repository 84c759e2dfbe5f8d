"""Conversions by several ranks: two against two threads, and a simulation of 1.6 T parameters.

    python -m benchmarks.ranks [--rounds N] [--only-simulate]

Writes benchmarks/results/ranks.json. Measured, in turns: one rank with two threads, and two ranks
with one thread each, started by torchrun. The seconds are those of ``convert``, without starting
Python.

    demo, rd        the demo model, 4 blocks, 16 experts, to 1.0 bits
    2 layers, qmoe  experts of 3 × 512 × 1024, 16 in each of two layers, top-2, the demo's text

Simulated: a model with the layers of switch-c-2048, on 1 to 64 ranks. What an expert costs is what
``quantize_scale`` has measured on this machine, so that a rank is one like it. Tokens spread over
experts unevenly, and experts over ranks as in a conversion. Everything goes through the shared
folder at the bandwidths below; caches are left out, as are sampling sizes and reading the text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qmoe_format
from benchmarks import report
from benchmarks.quantize_scale import CASES
from benchmarks.synthetic import MIXTRAL_LIKE, write_checkpoint
from qmoe_format.calibration.ranks import Ranks
from qmoe_format.conversion.block_experts import _MEASURED_TOKENS
from qmoe_format.conversion.survey import _PART, _TOKENS

DEMO = Path(qmoe_format.__file__).parent / "demo"
LAYERS = MIXTRAL_LIKE | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_local_experts": 16,
    "num_attention_heads": 8,
}
BLOCKS = 30  # with experts: 15 in the encoder, 15 in the decoder
WIDTH, ATTENTION = 2080, 4 * 2080 * 2048  # of a token, and weights outside the experts, per block
RANKS = (1, 2, 4, 8, 16, 32, 64)
SHARED, OWN = 10e9, 1e9  # bytes/s of the shared folder, for all ranks together and for one
PROBES = 0.25  # as much as this part of the text do the probes of a survey read
SPREAD = 0.5  # standard deviation of the logarithm of an expert's tokens


def convert(case: str, folder: Path, name: str) -> float:
    """Seconds of a conversion by the process's ranks."""
    from qmoe_format.conversion import Calibration

    options: dict[str, Any]
    if case == "demo, rd":
        source, options = DEMO, {"bits_per_weight": 1.0}
        calibration = Calibration(DEMO / "calibration.jsonl", target_column="target")
    else:
        source, options = folder / "checkpoint", {"recipe": "qmoe"}
        calibration = Calibration(DEMO / "calibration.jsonl", "target", sequence_length=256)
    started = time.perf_counter()
    qmoe_format.convert(source, folder / name, calibration=calibration, overwrite=True, **options)
    return time.perf_counter() - started


def run(case: str, folder: Path, ranks: int) -> float:
    """Seconds of a conversion by some ranks, which have two cores together."""
    name = f"{ranks}.qmoe"
    command = [sys.executable, "-m", "benchmarks.ranks", "--measure", case, str(folder), name]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command[1:1] = launcher
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float((folder / f"{name}.seconds").read_text())


def compare(case: str, folder: Path, rounds: int) -> dict[str, Any]:
    """One rank against two, in turns."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for ranks, found in seconds.items():
            found.append(run(case, folder, ranks))
    ratios = [two / one for one, two in zip(*seconds.values(), strict=True)]
    return {
        "case": case,
        "rounds": rounds,
        "one rank, two threads: seconds": report.spread(seconds[1]),
        "two ranks, one thread: seconds": report.spread(seconds[2]),
        "two ranks / one": report.spread(ratios),
    }


@dataclass(frozen=True, slots=True)
class Costs:
    """Of an expert, on one rank.

    Attributes:
        fixed: seconds to quantize and code it.
        per_token: seconds that a token adds: to its Hessians, and to its outputs.
        tokens: that each expert had when this was measured.
        bits: per weight of the result.
        memory: bytes of the process.
        rated: whether the recipe surveys the model first.
    """

    fixed: float
    per_token: tuple[float, float]
    tokens: int
    bits: float
    memory: int
    rated: bool


def costs(run: dict[str, Any], result: dict[str, Any]) -> Costs:
    """From a result of ``quantize_scale``."""
    shapes, seconds = CASES[0].shapes.values(), result["seconds"] / result["experts"]
    shares, tokens = result["shares"], run["tokens_per_expert"]
    hessians = shares["Hessians"] * seconds / tokens
    # An output takes as long as its multiplications do in a Hessian.
    outputs = hessians * CASES[0].weights / sum(columns**2 for _, columns in shapes)
    fixed = (shares["quantizer"] + shares["coding"]) * seconds
    return Costs(
        fixed=fixed,
        per_token=(hessians, outputs),
        tokens=tokens,
        bits=result["bits_per_weight"],
        memory=result.get("peak_device_bytes", result["peak_resident_bytes"]),
        rated=result["recipe"] == "rd",
    )


def simulate(one: Costs, count: int) -> dict[str, Any]:
    """What the slowest rank of ``count`` needs for the whole model."""
    case = CASES[0]
    chance = np.random.default_rng(0).lognormal(0, SPREAD, case.experts)
    tokens = chance / chance.sum() * case.experts * one.tokens
    hessian, output = one.per_token
    survey = one.rated * max(_PART, min(1.0, _TOKENS / one.tokens))  # of the text
    # Quantizing: outputs of the inputs' matrices for the Hessians, then of all. Survey: of all,
    # for what they return, and of some tokens for their energies.
    quantizing = tokens * (hessian + 1.5 * output) + one.fixed
    seen = survey * tokens
    surveying = (seen + np.minimum(seen, _MEASURED_TOKENS)) * output
    every = [Ranks(rank, count) for rank in range(count)]
    passes = [
        max(sum(each[number] for number in rank.packed(each.tolist())) for rank in every)
        for each in (surveying, quantizing)
    ]
    reading = survey + PROBES * one.rated
    total, reads = tokens.sum(), 1 + reading
    dense = ATTENTION * output / case.weights * total / count * reads
    rows = 4.0 * WIDTH * total  # bytes of all hidden states
    # Read and written: hidden states twice, without the experts' outputs twice, inputs 3 times,
    # outputs 4; pairs twice if ranks exchange them; for the norms of a survey, hidden states and
    # outputs once more.
    times = 11 + 2 * (count > 1)
    activations = rows * (times + reading * (times + 2)) / count
    # Experts once, in a survey twice: for what they return and for their energies.
    experts = 2.0 * case.experts * case.weights * (1 + 2 * one.rated) / count
    staged = case.experts * case.weights * one.bits / 8
    moved = activations + experts + 2 * 2.0 * ATTENTION * (1 + one.rated) + staged / count
    bandwidth = min(OWN, SHARED / count)
    assembling = 2 * staged * BLOCKS / OWN
    compute = (sum(passes) + dense) * BLOCKS
    transfer = moved * BLOCKS / bandwidth
    return {
        "ranks": count,
        "hours": (compute + transfer + assembling) / 3600,
        "compute_hours": compute / 3600,
        "transfer_hours": transfer / 3600,
        "assembling_hours": assembling / 3600,
        "bytes_moved_per_rank": round(moved * BLOCKS),
        # The largest group of experts, a block's other weights, and three numbers for each token.
        "memory_per_rank": round(one.memory + 4 * ATTENTION + 3 * 8 * total),
        # Hidden states before and after, and without outputs; inputs, outputs, pairs; the experts.
        "disk_per_rank": round((rows * (5 + (count > 1)) + staged * BLOCKS) / count),
    }


def simulations() -> list[dict[str, Any]]:
    """For each device and recipe that has been measured."""
    found = []
    for device, measured in report.load("quantize_scale")["runs"].items():
        for result in measured["results"]:
            if result["layer"] != CASES[0].name:
                continue
            one = costs(measured, result)
            each = [simulate(one, count) for count in RANKS]
            found.append({"device": device, "recipe": result["recipe"], "ranks": each})
    return found


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-simulate", action="store_true", help="keep what was measured")
    parser.add_argument(
        "--measure", nargs=3, metavar=("CASE", "FOLDER", "NAME"), help="of a process"
    )
    options = parser.parse_args()
    if options.measure:
        case, folder, name = options.measure
        seconds = convert(case, Path(folder), name)
        if int(os.environ.get("RANK", 0)) == 0:
            (Path(folder) / f"{name}.seconds").write_text(str(seconds))
        return
    compared = report.load("ranks").get("compared", [])
    if not options.only_simulate:
        compared = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(LAYERS, folder / "checkpoint")
            for part in ("tokenizer.json", "tokenizer_config.json"):
                (folder / "checkpoint" / part).write_bytes((DEMO / part).read_bytes())
            for case in ("demo, rd", "2 layers, qmoe"):
                compared.append(compare(case, folder, options.rounds))
                print(json.dumps(compared[-1], indent=1), flush=True)
    figures = {
        "compared": compared,
        "assumed": {
            "blocks": BLOCKS,
            "parameters": BLOCKS * CASES[0].experts * CASES[0].weights,
            "shared_folder_bytes_per_second": SHARED,
            "rank_bytes_per_second": OWN,
        },
        "tokens_per_expert": report.load("quantize_scale")["runs"]["cpu"]["tokens_per_expert"],
        "simulated": simulations(),
    }
    report.save("ranks", figures)


if __name__ == "__main__":
    main()
