"""The ``qmoe`` command. Each command is a module with its options and its ``run``.

Exit codes: 0; 1 for a bad file or input, with one line ``error[CODE]: ...`` on stderr; 2 for wrong
usage; 130 if interrupted, 143 if terminated, and 141 if nothing reads the output any longer.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qmoe_format._version import __version__
from qmoe_format.cli import chat, convert, demo, eval, families, generate, inspect, unpack, verify
from qmoe_format.cli.interruption import interruptible
from qmoe_format.errors import QMoEError, QMoEWarning
from qmoe_format.machine import out_of_memory

COMMANDS = (convert, inspect, verify, unpack, generate, chat, eval, families, demo)
EXAMPLES = """\
examples:
  qmoe demo
      compress a small model that ships with the package, and generate text with it
  qmoe convert switch-base-8/ switch.qmoe
      compress a Hugging Face checkpoint
  qmoe convert allenai/OLMoE-1B-7B-0924 olmoe.qmoe
      compress one that is on the Hugging Face Hub
  qmoe convert switch-base-8/ switch.qmoe --calibration text.jsonl --bits-per-weight 0.8
      the same, with each expert calibrated on text, to a given size
  qmoe convert mixtral/ mixtral.qmoe --profile size --shard-size 5GB
      the smallest files, of about 5 GB each
  qmoe inspect switch.qmoe
      list the contents and how much smaller they are
  qmoe verify switch.qmoe
      check every byte
  qmoe generate mixtral.qmoe "The LORD is my shepherd;"
      generate text, with the experts compressed in memory
  qmoe chat qwen3.qmoe
      talk with a model
  qmoe eval switch.qmoe --text eval.jsonl --against switch-base-8/
      measure how well it predicts a text, compared with the original
  qmoe unpack switch.qmoe switch-unpacked/
      restore a checkpoint that transformers can load
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; by default that of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: on wrong usage, after ``--help`` and ``--version``, and when terminated.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    options = _parser().parse_args(arguments)
    try:
        with interruptible(), _warnings_in_a_line():
            options.run(options)
            sys.stdout.flush()
    except QMoEError as error:
        return _fail(error.code, str(error))
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted; no partial files are left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail("io", f"{where}{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        advice = "close other programs, or use fewer --threads or another --device"
        return _fail("memory", f"out of memory; {advice}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qmoe",
        description="Create, inspect, check and run .qmoe files: compressed mixture-of-experts "
        "models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qmoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show the package's own warnings like its errors, and those of others as Python does."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", QMoEWarning)
        show = warnings.showwarning

        def show_line(
            message: Warning | str, category: type[Warning], *place: Any, **more: Any
        ) -> None:
            if not issubclass(category, QMoEWarning):
                show(message, category, *place, **more)
                return
            erase = "\r\x1b[K" if sys.stderr.isatty() else ""  # the line of progress
            print(f"{erase}warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show_line
        yield


def _fail(code: str, message: str) -> int:
    print(f"error[{code}]: {' '.join(message.split())}", file=sys.stderr)
    return 1
