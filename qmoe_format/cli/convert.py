"""``qmoe convert``: compress a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_format.calibration.ranks import rank_of
from qmoe_format.cli.arguments import (
    TEXT_HELP,
    Commands,
    add_text_options,
    add_trust_option,
    parse_size,
    positive,
    positive_real,
)
from qmoe_format.cli.formatting import duration
from qmoe_format.cli.progress_line import ProgressLine
from qmoe_format.cli.tables import few_tokens_warning, summary
from qmoe_format.codec import PROFILES
from qmoe_format.errors import QMoEError, QMoEWarning, os_errors
from qmoe_format.quantize import RECIPES

if TYPE_CHECKING:
    from qmoe_format.conversion import Calibration


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="compress a Hugging Face checkpoint",
        description="Compress the experts of a Hugging Face checkpoint (safetensors or .bin), and "
        "keep all other tensors as they are. `qmoe families` lists the types of models. What the "
        "authors of QMoE publish is converted without loss.",
        epilog="example: qmoe convert switch-base-8/ switch.qmoe --profile size",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json, its URL (such as s3://BUCKET/FOLDER), or a model on the "
        "Hugging Face Hub: ORG/MODEL[@REVISION]",
    )
    parser.add_argument("destination", metavar="DST", help="file to write, or its URL")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="; ".join(f"{recipe.name}: {recipe.summary}" for recipe in RECIPES.values())
        + " (default: rd with --calibration, otherwise rtn)",
    )
    parser.add_argument(
        "--bits", type=positive, metavar="N", help="of the recipes with a fixed number of bits"
    )
    parser.add_argument(
        "--grid",
        choices=("linear", "log"),
        help="of the recipe moqe: evenly spaced values (default), or each half of the next larger",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=RECIPE[:BITS]",
        help="another recipe for the stacks of experts whose names match, such as "
        "'model.layers.*.down_proj=gptq:3'; may be repeated, the last one that matches counts",
    )
    parser.add_argument(
        "--rules", type=Path, metavar="FILE", help="the same, one rule a line; # begins a comment"
    )
    parser.add_argument(
        "--profile",
        default="fast",
        choices=PROFILES,
        help="fast: fastest decoding (default); size: one or two percent smaller",
    )
    parser.add_argument(
        "--shard-size",
        type=parse_size,
        metavar="SIZE",
        help="write several files of about this size, such as 5GB (default: one file)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all cores")
    parser.add_argument(
        "--keep-native",
        action="store_true",
        help="leave quantized weights other than experts as the checkpoint stores them (default: "
        "convert them to bfloat16)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace DST if it exists; without --resume, also discard an unfinished conversion",
    )
    add_trust_option(parser)
    group = parser.add_argument_group(
        "calibration", "run the model on text, and fit each expert to the tokens routed to it"
    )
    group.add_argument("--calibration", metavar="TEXT", help=f"the text: {TEXT_HELP}")
    add_text_options(group)
    group.add_argument(
        "--token-cap",
        type=positive_real,
        metavar="X",
        help="use at most X times the mean number of tokens per expert (default: 4)",
    )
    group.add_argument(
        "--mask-special-tokens",
        action="store_true",
        default=None,
        help="exclude special tokens (such as sentinels) from the Hessians, as QMoE does",
    )
    group.add_argument(
        "--all-experts",
        action="store_true",
        default=None,
        help="fit each expert to all tokens, those routed to it first, as far as --token-cap "
        "allows; for experts that are seldom used",
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--bits-per-weight",
        type=positive_real,
        metavar="BITS",
        help="target size of the experts, such as 0.8, including scales and dictionaries",
    )
    size.add_argument(
        "--lambda",
        dest="rate_lambda",
        type=positive_real,
        metavar="X",
        help="instead of a target size: the error that one more bit must remove, relative to the "
        "output of a typical expert (default: 0.05)",
    )
    group.add_argument(
        "--levels",
        type=int,
        choices=(3,),
        help="keep the recipe rd to ternary weights (default: as many levels as pay)",
    )
    group.add_argument("--device", metavar="NAME", help="such as cuda (default: cpu)")
    group.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from qmoe_format import container
    from qmoe_format.container.inspection import describe
    from qmoe_format.conversion import convert
    from qmoe_format.conversion.report import read_report

    calibration = _calibration(options)
    if rank_of():  # what there is to say, rank 0 says
        warnings.simplefilter("ignore", QMoEWarning)
    started = time.monotonic()
    with ProgressLine("download", "B") as download, ProgressLine("convert", "weights") as progress:
        path = convert(
            options.source,
            options.destination,
            recipe=options.recipe,
            profile=options.profile,
            shard_bytes=options.shard_size,
            threads=options.threads,
            overwrite=options.force,
            progress=progress,
            download_progress=download,
            calibration=calibration,
            bits_per_weight=options.bits_per_weight,
            rate_lambda=options.rate_lambda,
            levels=options.levels,
            bits=options.bits,
            grid=options.grid,
            rules=(*_read_rules(options.rules), *options.rule),
            keep_native=options.keep_native,
            resume=options.resume,
            trust_remote_code=options.trust_remote_code,
        )
    if rank_of():
        return
    print(f"{path}: written in {duration(time.monotonic() - started)}\n")
    with container.open(path, memory_map=False) as file:
        warning = few_tokens_warning(read_report(file), file) if calibration else []
        print("\n".join([*summary(describe(file)), *warning]))


def _read_rules(path: Path | None) -> list[str]:
    if path is None:
        return []
    with os_errors(f"cannot read {path}"):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _calibration(options: argparse.Namespace) -> Calibration | None:
    from qmoe_format.conversion import Calibration

    # Its other fields are named like the options that set them.
    names = [field.name for field in dataclasses.fields(Calibration) if field.name != "text"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.calibration is not None:
        return Calibration(options.calibration, **given)
    if given:
        option = next(iter(given)).replace("_", "-")
        raise QMoEError(
            "argument", f"--{option} applies to calibration text only", "also give --calibration"
        )
    return None
