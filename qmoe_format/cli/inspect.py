"""``qmoe inspect``: show what a file contains."""

from __future__ import annotations

import argparse
import json

from qmoe_format.cli import downloads
from qmoe_format.cli.arguments import Commands, add_file_argument
from qmoe_format.cli.tables import quality_tables, summary, tensor_table


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what a file contains",
        description="List the tensors of a .qmoe file and compare their sizes with bfloat16. Only "
        "headers are read; to check the data, use verify.",
        epilog="example: qmoe inspect switch.qmoe --json | jq .totals",
    )
    add_file_argument(parser)
    parser.add_argument(
        "--quality", action="store_true", help="show the error of each expert on calibration text"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from qmoe_format import container
    from qmoe_format.container.inspection import describe
    from qmoe_format.conversion.report import read_report

    with container.open(downloads.qmoe_file(options.file), memory_map=False) as file:
        if options.quality:
            quality = read_report(file)
            lines = [json.dumps(quality)] if options.json else quality_tables(quality, file)
            print("\n".join(lines))
            return
        description = describe(file)
    if options.json:
        print(json.dumps(description))
    else:
        print("\n".join([*tensor_table(description), "", *summary(description)]))
