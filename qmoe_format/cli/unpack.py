"""``qmoe unpack``: restore a Hugging Face checkpoint."""

from __future__ import annotations

import argparse

from qmoe_format.cli import downloads
from qmoe_format.cli.arguments import Commands, add_file_argument, parse_size
from qmoe_format.cli.progress_line import ProgressLine


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "unpack",
        help="restore a Hugging Face checkpoint",
        description="Write safetensors files, configuration and tokenizer to a new folder that "
        "transformers can load. The experts have the values of the compressed file.",
        epilog="example: qmoe unpack switch.qmoe switch-unpacked/",
    )
    add_file_argument(parser)
    parser.add_argument("folder", metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--shard-size", type=parse_size, default="5GB", metavar="SIZE", help="default: 5GB"
    )
    parser.add_argument(
        "--compressed",
        action="store_true",
        help="keep the experts in a .qmoe file, next to a safetensors file with all other tensors; "
        "transformers can load this folder after import qmoe_format.runtime",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from qmoe_format.export.unpacking import unpack

    file = downloads.qmoe_file(options.file)
    with ProgressLine("unpack", "B") as progress:
        folder = unpack(
            file,
            options.folder,
            shard_bytes=options.shard_size,
            compressed=options.compressed,
            progress=progress,
        )
    needed = ", after import qmoe_format.runtime" if options.compressed else ""
    print(f"{folder}: written; transformers loads it with from_pretrained{needed}")
