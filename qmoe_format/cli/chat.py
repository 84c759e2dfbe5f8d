"""``qmoe chat``: talk with a compressed model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmoe_format.cli import downloads, models
from qmoe_format.cli.arguments import (
    Commands,
    add_file_argument,
    add_model_options,
    add_trust_option,
)
from qmoe_format.cli.generation import (
    accept_any_bytes,
    add_generation_options,
    check_generation_options,
    check_utf8,
    generation_settings,
)
from qmoe_format.cli.interruption import interruptible

if TYPE_CHECKING:
    from qmoe_format.cli.conversation import Conversation

NEW_TOKENS = 1000  # in an answer, unless the model's generation_config or the user says otherwise
PROMPT = "> "


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a compressed model",
        description="Answer messages, one a line, with the tokenizer's chat template. Ctrl-C stops "
        "an answer; at the prompt, it ends the program, as Ctrl-D does. From a pipe, each line is "
        "a message, too.",
        epilog='example: qmoe chat qwen3.qmoe --system "Answer briefly." --temperature 0.7',
    )
    add_file_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told at the beginning")
    add_generation_options(parser, NEW_TOKENS)
    add_model_options(parser)
    add_trust_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check_generation_options(options)
    check_utf8(options.system or "", "the system message")
    models.require_transformers()
    options.file = downloads.qmoe_file(options.file)
    tokenizer, model = models.load(options)
    import torch

    from qmoe_format.cli.conversation import Conversation

    conversation = Conversation(
        tokenizer,
        model,
        generation_settings(options, tokenizer, model),
        options.max_new_tokens or model.generation_config.max_new_tokens or NEW_TOKENS,
        options.system,
    )
    torch.manual_seed(options.seed or 0)
    # Not the command's own block: there, an interruption would be an exit code of 130.
    with contextlib.suppress(KeyboardInterrupt), interruptible():
        _talk(conversation, options.stats)


def _talk(conversation: Conversation, statistics: bool) -> None:
    for message in _messages():
        with contextlib.suppress(KeyboardInterrupt), interruptible():
            conversation.answer(message, statistics=statistics)


def _messages() -> Iterator[str]:
    """The lines of stdin that are not empty, until its end."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 # input() then knows the arrow keys
    accept_any_bytes()
    while True:
        try:
            line = input(PROMPT if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()  # after ^D or ^C
            return
        check_utf8(line, "the message")
        if line.strip():
            yield line
