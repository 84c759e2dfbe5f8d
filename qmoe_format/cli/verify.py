"""``qmoe verify``: check every byte of a file."""

from __future__ import annotations

import argparse

from qmoe_format.cli import downloads
from qmoe_format.cli.arguments import Commands, add_file_argument
from qmoe_format.cli.models import require_transformers
from qmoe_format.cli.progress_line import ProgressLine
from qmoe_format.machine import cores


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="check every byte of a file",
        description="Verify all checksums, decode everything, and check all padding.",
        epilog="example: qmoe verify switch.qmoe && echo good",
    )
    add_file_argument(parser)
    parser.add_argument(
        "--model",
        action="store_true",
        help="also check that the file has every weight that transformers' model needs",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from qmoe_format import container

    path = downloads.qmoe_file(options.file)
    # With a memory map, a file that is truncated meanwhile would kill the process.
    with (
        container.open(path, memory_map=False) as file,
        ProgressLine("verify", "B") as progress,
    ):
        file.verify(progress, threads=cores())
        tensors = len(file.tensors)
        if options.model:
            require_transformers()
            from qmoe_format.runtime.model_of_file import checked_config

            with checked_config(file):
                pass  # to enter it is to check
    complete = ", and all that the model needs is there" if options.model else ""
    print(f"{options.file}: good, all {tensors} tensors checked{complete}")
