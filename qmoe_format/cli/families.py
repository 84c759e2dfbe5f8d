"""``qmoe families``: list the types of models that convert."""

from __future__ import annotations

import argparse
import json

from qmoe_format.cli.arguments import Commands
from qmoe_format.cli.formatting import table


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "families",
        help="list the types of models that convert",
        description="List the types of models, as config.json names them, that convert, and those "
        "that do not, with the reason.",
        epilog="example: qmoe families --json | jq -r '.types[].type'",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from qmoe_format.checkpoints.registry import UNCALIBRATED, UNSUPPORTED, supported_types

    types = [(name, UNCALIBRATED.get(name)) for name in supported_types()]
    if options.json:
        report = {
            "types": [
                {"type": name, "calibration": reason is None, "reason": reason}
                for name, reason in types
            ],
            "unsupported": [{"type": n, "reason": reason} for n, reason in UNSUPPORTED.items()],
        }
        print(json.dumps(report))
        return
    rows = [(n, "yes" if not reason else f"no: {reason}") for n, reason in types]
    print("\n".join(table(("type", "with calibration"), rows, left=2)), end="\n\n")
    print("\n".join(table(("does not convert", "because"), list(UNSUPPORTED.items()), left=2)))
