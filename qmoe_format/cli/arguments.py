"""Types of arguments, and options that several commands share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# What ``calibration.text.read_documents`` reads.
TEXT_HELP = (
    "a .jsonl, .json, .txt (each also .gz) or .parquet file, or a data set of the Hugging Face "
    "Hub: ORG/NAME:SPLIT or ORG/NAME:CONFIG:SPLIT"
)
_UNITS = {"": 1, **{c: 1000**i for i, c in enumerate("kmgt", 1)}}
_UNITS |= {f"{c}i": 1024**i for i, c in enumerate("kmgt", 1)}


def parse_size(text: str) -> int:
    """The number of bytes in ``5GB``, ``300 MB``, ``1.5GiB`` or ``1000``."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 5GB or 500MB")
    return size


def positive(text: str) -> int:
    """An integer above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def natural(text: str) -> int:
    """An integer, 0 or above."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer, 0 or above")
    return int(text)


def positive_real(text: str) -> float:
    """A finite number above 0."""
    return _real(text, lambda number: 0 < number < math.inf, "a positive number")


def non_negative_real(text: str) -> float:
    """A finite number, 0 or above."""
    return _real(text, lambda number: 0 <= number < math.inf, "a number, 0 or above")


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _real(text, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def _real(text: str, fits: Callable[[float], bool], wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan  # which nothing compares with
    if not fits(number):
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}")
    return number


def add_file_argument(to: argparse._ActionsContainer) -> None:
    """The file that a command reads."""
    to.add_argument(
        "file",
        metavar="FILE",
        help="a .qmoe file, its URL (such as s3://BUCKET/FILE.qmoe), or one on the Hugging Face "
        "Hub: ORG/MODEL[/FILE.qmoe][@REVISION]",
    )


def add_text_options(to: argparse._ActionsContainer) -> None:
    """How a text becomes sequences of tokens."""
    to.add_argument(
        "--text-column",
        metavar="NAME",
        help="key or column that holds the text, or the messages of a chat, for which the "
        "tokenizer's chat template is used (default: text, or where there is none, messages or "
        "conversations)",
    )
    to.add_argument(
        "--target-column",
        metavar="NAME",
        help="key or column that holds the target text of an encoder-decoder model (default: T5 "
        "span corruption of the text)",
    )
    to.add_argument(
        "--sequence-length",
        type=positive,
        metavar="N",
        help="tokens per sequence (default: 256 for an encoder, otherwise up to 2048); longer "
        "texts that have a target are truncated",
    )
    to.add_argument("--samples", type=positive, metavar="N", help="sequences to use (default: all)")
    to.add_argument("--seed", type=natural, metavar="N", help="random seed (default: 0)")
    to.add_argument(
        "--parse-special-tokens",
        action="store_true",
        default=None,
        help="read what a text spells like a special token as that token, as is always done in "
        "chats",
    )


def add_trust_option(to: argparse._ActionsContainer) -> None:
    """Whether code that comes with a model is run."""
    to.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model if its tokenizer needs that; read it first",
    )


def add_model_options(to: argparse._ActionsContainer) -> None:
    """Where and in which data type a model computes."""
    to.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda (default: cpu)")
    to.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type of activations and uncompressed weights (default: float32 on a CPU, "
        "otherwise the type that the model was saved in)",
    )
    to.add_argument(
        "--expert-memory",
        type=parse_size,
        metavar="SIZE",
        help="memory for experts on a CPU, such as 12GB; others are read from the file when they "
        "are needed (default: the file is mapped, or, if its experts do not fit into available "
        "memory, most of that)",
    )
    to.add_argument(
        "--exact",
        action="store_true",
        help="on a CPU, multiply experts with activations as they are, not rounded to 8 bits: "
        "several times as slow",
    )
