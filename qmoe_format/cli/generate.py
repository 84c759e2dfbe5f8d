"""``qmoe generate``: stream the text that a compressed model generates."""

from __future__ import annotations

import argparse
import sys

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
from qmoe_format.errors import QMoEError

NEW_TOKENS = 100  # unless the model's generation_config or the user says otherwise


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text with a compressed model",
        description="Continue a prompt or, with an encoder-decoder model, respond to it. The "
        "experts stay compressed in memory; on a CPU only the ones in use are read from the file.",
        epilog='example: qmoe generate mixtral.qmoe "The LORD is my shepherd;" --max-new-tokens 50',
    )
    add_file_argument(parser)
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        help="the text, or - to read it from stdin, without its last line break",
    )
    add_generation_options(parser, NEW_TOKENS)
    add_model_options(parser)
    add_trust_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check_generation_options(options)
    if options.prompt == "-":
        accept_any_bytes()
        options.prompt = sys.stdin.read().removesuffix("\n")
    check_utf8(options.prompt, "the prompt")
    models.require_transformers()
    options.file = downloads.qmoe_file(options.file)
    tokenizer, model = models.load(options)
    import torch

    from qmoe_format.checkpoints.tokenizers import reading_text
    from qmoe_format.cli.streaming import Streamer, stream

    with reading_text():
        encoded = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    encoded.pop("token_type_ids", None)
    if not encoded.input_ids.numel():
        raise QMoEError("argument", "the prompt has no tokens", "give some text")
    settings = generation_settings(options, tokenizer, model)
    defaults = model.generation_config
    if options.max_new_tokens or not (defaults.max_new_tokens or defaults.max_length):
        settings["max_new_tokens"] = options.max_new_tokens or NEW_TOKENS
    torch.manual_seed(options.seed or 0)
    stream(model, encoded, settings, Streamer(tokenizer), options.stats)
