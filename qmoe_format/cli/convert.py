"""What each subcommand does with its options."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

import qmoe_format
from qmoe_format.cli.progress_line import Progress
from qmoe_format.cli.text import duration
from qmoe_format.errors import QMoEError
from qmoe_format.machine import cores

if TYPE_CHECKING:
    from qmoe_format.conversion import Calibration

# Fields of Calibration, named like the options that set them.
CALIBRATION = (
    "text_column",
    "target_column",
    "sequence_length",
    "samples",
    "seed",
    "token_cap",
    "mask_special_tokens",
    "device",
)


def convert(options: argparse.Namespace) -> None:
    from qmoe_format.cli.tables import summary
    from qmoe_format.container.inspection import describe
    from qmoe_format.conversion import convert

    calibration = _calibration(options)
    started = time.monotonic()
    with Progress("convert", "weights") as progress:
        path = convert(
            options.source,
            options.destination,
            recipe=options.recipe,
            profile=options.profile,
            shard_bytes=options.shard_size,
            threads=options.threads,
            overwrite=options.force,
            progress=progress,
            calibration=calibration,
            bits_per_weight=options.bits_per_weight,
            rate_lambda=options.rate_lambda,
            resume=options.resume,
        )
    print(f"{path}: written in {duration(time.monotonic() - started)}\n")
    with qmoe_format.open(path, memory_map=False) as file:
        print("\n".join(summary(describe(file))))


def _calibration(options: argparse.Namespace) -> Calibration | None:
    from qmoe_format.conversion import Calibration

    asked = {name: getattr(options, name) for name in CALIBRATION}
    given = {name: value for name, value in asked.items() if value is not None}
    if options.calibration is not None:
        return Calibration(options.calibration, **given)
    if given:
        option = next(iter(given)).replace("_", "-")
        raise QMoEError("argument", f"--{option} is about calibration text: give --calibration")
    return None


def inspect(options: argparse.Namespace) -> None:
    from qmoe_format.cli.tables import quality_tables, summary, tensor_table
    from qmoe_format.container.inspection import describe
    from qmoe_format.conversion.report import read_report

    if options.quality:
        with qmoe_format.open(options.file, memory_map=False) as file:
            quality = read_report(file)
        print(json.dumps(quality) if options.json else "\n".join(quality_tables(quality)))
        return
    with qmoe_format.open(options.file, memory_map=False) as file:
        description = describe(file)
    if options.json:
        print(json.dumps(description))
    else:
        print("\n".join([*tensor_table(description), "", *summary(description)]))


def verify(options: argparse.Namespace) -> None:
    # Without a memory map nothing that happens to the file meanwhile can end this process.
    with (
        qmoe_format.open(options.file, memory_map=False) as file,
        Progress("verify", "B") as progress,
    ):
        file.verify(progress, threads=cores())
        tensors = len(file.tensors)
    print(f"{options.file}: good, all of {tensors} tensors checked")


def unpack(options: argparse.Namespace) -> None:
    from qmoe_format.export.unpacking import unpack

    with Progress("unpack", "B") as progress:
        folder = unpack(
            options.file,
            options.folder,
            shard_bytes=options.shard_size,
            compressed=options.compressed,
            progress=progress,
        )
    needed = ", after import qmoe_format.runtime" if options.compressed else ""
    print(f"{folder}: written; transformers loads it with from_pretrained{needed}")


def generate(options: argparse.Namespace) -> None:
    from qmoe_format.cli.generate import run

    run(options)


def evaluate(options: argparse.Namespace) -> None:
    from qmoe_format.cli.models import quiet

    quiet()  # before what needs torch is imported
    from qmoe_format.cli.eval import run

    run(options)


def demo(options: argparse.Namespace) -> None:
    from qmoe_format.cli.demo import demo

    demo()
