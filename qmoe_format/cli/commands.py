"""What each subcommand does with its options."""

from __future__ import annotations

import argparse
import json
import time

import qmoe_format
from qmoe_format.cli.progress import Progress
from qmoe_format.cli.text import duration
from qmoe_format.machine import cores


def convert(options: argparse.Namespace) -> None:
    from qmoe_format.cli.tables import summary
    from qmoe_format.conversion import convert
    from qmoe_format.inspection import describe

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
        )
    print(f"{path}: written in {duration(time.monotonic() - started)}\n")
    with qmoe_format.open(path, memory_map=False) as file:
        print("\n".join(summary(describe(file))))


def inspect(options: argparse.Namespace) -> None:
    from qmoe_format.cli.tables import summary, tensor_table
    from qmoe_format.inspection import describe

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
    from qmoe_format.unpacking import unpack

    with Progress("unpack", "B") as progress:
        folder = unpack(
            options.file, options.folder, shard_bytes=options.shard_size, progress=progress
        )
    print(f"{folder}: written; transformers loads it with from_pretrained")


def demo(options: argparse.Namespace) -> None:
    from qmoe_format.cli.demo import demo

    demo()
