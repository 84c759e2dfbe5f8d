"""Options of ``generate`` and ``chat``, and what transformers' ``generate`` makes of them."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any

from qmoe_format.cli.arguments import (
    fraction,
    natural,
    non_negative_real,
    positive,
    positive_real,
)
from qmoe_format.errors import QMoEError

LEAST_TEMPERATURE = 1e-3  # logits divided by less may overflow
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def add_generation_options(to: argparse._ActionsContainer, new_tokens: int) -> None:
    """Which tokens are generated, and how many.

    Args:
        new_tokens: how many, if neither the user nor the model's configuration says.
    """
    to.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"default: what the model's configuration says, or {new_tokens}",
    )
    to.add_argument(
        "--temperature",
        type=non_negative_real,
        metavar="X",
        help="sample tokens; a higher temperature favors unlikely ones, and 0 is greedy decoding "
        "(default: what the model's configuration says, usually greedy decoding)",
    )
    to.add_argument(
        "--top-k",
        type=natural,
        metavar="N",
        help="sample from the N most likely tokens, with 0 from all (default: what the model's "
        "configuration says, or 50)",
    )
    to.add_argument(
        "--top-p",
        type=fraction,
        metavar="P",
        help="sample from the fewest tokens whose probabilities add up to P",
    )
    to.add_argument(
        "--min-p",
        type=fraction,
        metavar="P",
        help="sample from the tokens that are at least P times as likely as the most likely one",
    )
    to.add_argument(
        "--repetition-penalty",
        type=positive_real,
        metavar="X",
        help="above 1: make tokens that are in the text already less likely",
    )
    to.add_argument(
        "--stop",
        action="append",
        metavar="STRING",
        help="end after this text, which is still shown; may be given several times",
    )
    to.add_argument("--seed", type=natural, metavar="N", help="random seed (default: 0)")
    to.add_argument(
        "--stats",
        action="store_true",
        help="print the time to the first token and tokens/s to stderr, as on a terminal, and "
        "what was read and packed of experts",
    )


def check_generation_options(options: argparse.Namespace) -> None:
    """Refuse, before a large model is loaded, what transformers cannot use.

    Raises:
        QMoEError: ``argument``.
    """
    if options.temperature and options.temperature < LEAST_TEMPERATURE:
        raise QMoEError(
            "argument",
            f"a temperature of {options.temperature} is too low to compute with",
            f"use {LEAST_TEMPERATURE} or more, or 0 for greedy decoding",
        )
    for string in options.stop or ():
        check_utf8(string, "a stop string")
        if not string:
            raise QMoEError("argument", "a stop string is empty", "give some text, or leave it out")


def check_utf8(text: str, what: str) -> None:
    """Refuse text in which Python has put surrogates for bytes that it could not decode.

    Raises:
        QMoEError: ``argument``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QMoEError("argument", f"{what} is not UTF-8", "encode it in UTF-8") from error


def accept_any_bytes() -> None:
    """Let reading stdin not fail on bytes that are not text, so that ``check_utf8`` sees them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def generation_settings(options: argparse.Namespace, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Arguments of transformers' ``generate``, but for the number of tokens."""
    settings: dict[str, Any] = {"num_beams": 1}  # text is shown as it is generated
    if model.generation_config.eos_token_id is None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    if options.stop:
        settings["stop_strings"] = options.stop
    if options.repetition_penalty is not None:
        settings["repetition_penalty"] = options.repetition_penalty
    if options.temperature == 0:
        return settings | {"do_sample": False}
    values = {name: getattr(options, name) for name in SAMPLING}
    given = {name: value for name, value in values.items() if value is not None}
    return settings | given | ({"do_sample": True} if given else {})
