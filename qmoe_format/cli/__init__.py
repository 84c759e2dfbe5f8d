"""The ``qmoe`` command: arguments, exit codes and messages; the work is done elsewhere.

Exit codes: 0; 1 for a bad file or input, with one line ``error[CODE]: …`` on stderr; 2 for wrong
usage; 130, 143 and 141 when interrupted, terminated, or when nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qmoe_format._version import __version__
from qmoe_format.checkpoints import ADAPTERS
from qmoe_format.cli import convert as commands
from qmoe_format.cli.interruption import interruptible
from qmoe_format.cli.text import natural, parse_size, positive, positive_real
from qmoe_format.codec import PROFILES
from qmoe_format.errors import QMoEError
from qmoe_format.machine import out_of_memory
from qmoe_format.quantize import RECIPES

EXAMPLES = """\
examples:
  qmoe demo
      convert a small model that ships with the package, and let it write
  qmoe convert switch-base-8/ switch.qmoe
      compress a Hugging Face checkpoint
  qmoe convert switch-base-8/ switch.qmoe --calibration text.jsonl --bits-per-weight 0.8
      the same, but see on some text what each expert may lose
  qmoe convert mixtral/ mixtral.qmoe --profile size --shard-size 5GB
      smallest files, of at most about 5 GB each
  qmoe inspect switch.qmoe
      show what is inside, and how much smaller it is
  qmoe verify switch.qmoe
      check every byte
  qmoe generate mixtral.qmoe "The LORD is my shepherd;"
      let the model write, its experts compressed
  qmoe eval switch.qmoe --text eval.jsonl --against switch-base-8/
      how well it predicts a text, and what it has lost
  qmoe unpack switch.qmoe switch-unpacked/
      make a checkpoint that transformers loads
"""
OUT_OF_MEMORY = (
    "there is not enough; close other programs, or use fewer --threads or another --device"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, or exit with it (wrong usage, terminated)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    options = _parser().parse_args(arguments)
    try:
        with interruptible():
            options.run(options)
            sys.stdout.flush()
    except QMoEError as error:
        return _fail(error.code, str(error))
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted; nothing half-written is left", file=sys.stderr)
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
        return _fail("memory", OUT_OF_MEMORY)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qmoe",
        description="Compressed mixture-of-experts weights: make, look into and check .qmoe files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qmoe {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = subparsers.add_parser(
        "convert",
        help="compress a Hugging Face checkpoint",
        description="Compress the experts of a Hugging Face checkpoint (safetensors or .bin) of "
        f"one of these types: {', '.join(sorted(ADAPTERS))}. Everything else is kept as it is.",
        epilog="example: qmoe convert switch-base-8/ switch.qmoe --profile size",
    )
    command.add_argument("source", metavar="SRC", type=Path, help="folder with config.json")
    command.add_argument("destination", metavar="DST", type=Path, help="file to write")
    command.add_argument(
        "--recipe",
        choices=RECIPES,
        help="; ".join(f"{recipe.name}: {recipe.summary}" for recipe in RECIPES.values())
        + " (default: rd with --calibration, otherwise rtn)",
    )
    command.add_argument(
        "--profile",
        default="fast",
        choices=PROFILES,
        help="decoding speed (default), or a per cent or two smaller",
    )
    command.add_argument(
        "--shard-size",
        type=parse_size,
        metavar="SIZE",
        help="begin another file after so much, such as 5GB (default: one file)",
    )
    command.add_argument(
        "--threads", type=positive, metavar="N", help="how many to use (default: all cores)"
    )
    command.add_argument(
        "--force",
        action="store_true",
        help="replace DST if it exists; without --resume also discard unfinished work",
    )
    group = command.add_argument_group(
        "calibration", "run the model on text, and fit each expert to the tokens routed to it"
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text: a .jsonl, .txt or .parquet file",
    )
    _add_text_options(group)
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
        help="leave sentinels, ends of sequences and the like out of the Hessians, as QMoE does",
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--bits-per-weight",
        type=positive_real,
        metavar="BITS",
        help="how large the experts should be, such as 0.8, scales and dictionaries included",
    )
    size.add_argument(
        "--lambda",
        dest="rate_lambda",
        type=positive_real,
        metavar="X",
        help="instead of a size: the error that a bit must save, relative to a typical expert's "
        "output (default: 0.05)",
    )
    group.add_argument(
        "--device", metavar="NAME", help="where torch computes, such as cuda (default: cpu)"
    )
    group.add_argument(
        "--resume", action="store_true", help="continue a conversion that was stopped"
    )
    command.set_defaults(run=commands.convert)

    command = subparsers.add_parser(
        "inspect",
        help="show what is in a file",
        description="List the tensors of a .qmoe file with their sizes, and compare with bfloat16. "
        "Reads headers only; see verify.",
        epilog="example: qmoe inspect switch.qmoe --json | jq .totals",
    )
    command.add_argument("file", metavar="FILE", type=Path)
    command.add_argument(
        "--quality", action="store_true", help="show the error of each expert on its tokens"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=commands.inspect)

    command = subparsers.add_parser(
        "verify",
        help="check every byte of a file",
        description="Check all checksums, decode everything, and check all padding.",
        epilog="example: qmoe verify switch.qmoe && echo good",
    )
    command.add_argument("file", metavar="FILE", type=Path)
    command.set_defaults(run=commands.verify)

    command = subparsers.add_parser(
        "unpack",
        help="make a Hugging Face checkpoint of a file",
        description="Write sharded safetensors, configuration and tokenizer into a new folder that "
        "transformers loads. The experts have the values of the compressed file.",
        epilog="example: qmoe unpack switch.qmoe switch-unpacked/",
    )
    command.add_argument("file", metavar="FILE", type=Path)
    command.add_argument("folder", metavar="DIR", type=Path, help="new or empty folder")
    command.add_argument(
        "--shard-size", type=parse_size, default="5GB", metavar="SIZE", help="default: 5GB"
    )
    command.add_argument(
        "--compressed",
        action="store_true",
        help="leave the experts in a .qmoe file beside one of safetensors with all the rest; "
        "transformers loads this folder after import qmoe_format.runtime",
    )
    command.set_defaults(run=commands.unpack)

    command = subparsers.add_parser(
        "generate",
        help="let a compressed model write",
        description="Continue a prompt, or answer it with an encoder-decoder. The experts stay "
        "compressed in memory; on a CPU only those that are used are read from the file.",
        epilog='example: qmoe generate mixtral.qmoe "The LORD is my shepherd;" --max-new-tokens 50',
    )
    command.add_argument("file", metavar="FILE", type=Path)
    command.add_argument("prompt", metavar="PROMPT")
    command.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="default: what the model's file says, or 100",
    )
    command.add_argument(
        "--temperature",
        type=positive_real,
        metavar="X",
        help="sample tokens; a larger X favours unlikely ones more "
        "(default: what the model's file says, usually the likeliest token)",
    )
    command.add_argument("--seed", type=natural, metavar="N", help="for sampling (default: 0)")
    _add_model_options(command)
    command.set_defaults(run=commands.generate)

    command = subparsers.add_parser(
        "eval",
        help="measure how well a compressed model predicts a text",
        description="Cross-entropy and perplexity of a compressed model on a text, a token after "
        "those before it; of an encoder-decoder, on T5's span corruption or on given targets.",
        epilog="example: qmoe eval switch.qmoe --text eval.jsonl --against switch-base-8/",
    )
    command.add_argument("file", metavar="FILE", type=Path)
    command.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        required=True,
        help="a .jsonl, .txt or .parquet file",
    )
    command.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="the checkpoint that it was made from: also show its loss, KL(original ‖ compressed), "
        "and the error of each layer's experts",
    )
    _add_text_options(command)
    _add_model_options(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=commands.evaluate)

    command = subparsers.add_parser(
        "demo",
        help="compress a small model that ships with the package",
        description="Convert, verify and inspect a small Switch Transformer that ships with the "
        "package, and let the original and the compressed model continue a text.",
    )
    command.set_defaults(run=commands.demo)
    return parser


def _add_text_options(to: argparse._ActionsContainer) -> None:
    """How a text becomes sequences of tokens."""
    to.add_argument(
        "--text-column", metavar="NAME", help="key or column of the text (default: text)"
    )
    to.add_argument(
        "--target-column",
        metavar="NAME",
        help="key or column of the text that an encoder-decoder should write (default: T5's span "
        "corruption of the text)",
    )
    to.add_argument(
        "--sequence-length",
        type=positive,
        metavar="N",
        help="tokens that the model reads at once (default: 256 for an encoder, otherwise 2048 at "
        "most); longer texts with a target are truncated",
    )
    to.add_argument(
        "--samples", type=positive, metavar="N", help="sequences to choose (default: all)"
    )
    to.add_argument("--seed", type=natural, metavar="N", help="for random choices (default: 0)")


def _add_model_options(to: argparse._ActionsContainer) -> None:
    """Where and in what numbers a model computes."""
    to.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda (default: cpu)")
    to.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of activations and of what is not compressed (default: float32 on a CPU, otherwise "
        "what the model was saved in)",
    )


def _fail(code: str, message: str) -> int:
    print(f"error[{code}]: {' '.join(message.split())}", file=sys.stderr)
    return 1
