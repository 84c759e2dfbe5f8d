"""``qmoe generate``: stream the text that a compressed model generates."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from qmoe_format.cli import downloads, models
from qmoe_format.cli.arguments import (
    Commands,
    add_file_argument,
    add_model_options,
    add_trust_option,
    natural,
    positive,
    positive_real,
)
from qmoe_format.cli.cache_line import cache_line
from qmoe_format.errors import QMoEError

NEW_TOKENS = 100  # unless the model's generation_config or the user says otherwise
LEAST_TEMPERATURE = 1e-3  # logits divided by less may overflow


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text with a compressed model",
        description="Continue a prompt or, with an encoder-decoder model, respond to it. The "
        "experts stay compressed in memory; on a CPU only the ones in use are read from the file.",
        epilog='example: qmoe generate mixtral.qmoe "The LORD is my shepherd;" --max-new-tokens 50',
    )
    add_file_argument(parser)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="default: what the model's configuration says, or 100",
    )
    parser.add_argument(
        "--temperature",
        type=positive_real,
        metavar="X",
        help="sample tokens; a higher temperature favors unlikely ones (default: what the model's "
        "configuration says, usually greedy decoding)",
    )
    parser.add_argument("--seed", type=natural, metavar="N", help="random seed (default: 0)")
    parser.add_argument(
        "--stats", action="store_true", help="say what was read of experts that are not in memory"
    )
    add_model_options(parser)
    add_trust_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    _check(options)
    models.require_transformers()
    options.file = downloads.qmoe_file(options.file)
    tokenizer, model = models.load(options)
    import torch
    from transformers import TextStreamer

    from qmoe_format.checkpoints.model import running
    from qmoe_format.checkpoints.tokenizers import reading_text

    class Streamer(TextStreamer):  # type: ignore[misc] # transformers is not followed
        """Counts tokens, and notes when the first one was generated."""

        tokens = 0
        first_at = 0.0

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.tokens += value.numel()
                self.first_at = self.first_at or time.perf_counter()
            super().put(value)

    with reading_text():
        encoded = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    encoded.pop("token_type_ids", None)
    if not encoded.input_ids.numel():
        raise QMoEError("argument", "the prompt has no tokens", "give some text")
    settings: dict[str, Any] = {"num_beams": 1}  # text is shown as it is generated
    defaults = model.generation_config
    if options.max_new_tokens or not (defaults.max_new_tokens or defaults.max_length):
        settings["max_new_tokens"] = options.max_new_tokens or NEW_TOKENS
    if defaults.eos_token_id is None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    if options.temperature is not None:
        settings |= {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed or 0)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    with running("compressed"):
        model.generate(**encoded, **settings, streamer=streamer)
    if sys.stderr.isatty():
        seconds = time.perf_counter() - streamer.first_at
        rate = (streamer.tokens - 1) / seconds if streamer.tokens > 1 else 0
        print(
            f"\nprompt: {encoded.input_ids.shape[1]} tokens in {streamer.first_at - started:.1f} s;"
            f" generated: {streamer.tokens} tokens, {rate:.1f} tokens/s",
            file=sys.stderr,
        )
    if options.stats:
        print(cache_line(model, encoded.input_ids.shape[1] + streamer.tokens), file=sys.stderr)


def _check(options: argparse.Namespace) -> None:
    if options.temperature is not None and options.temperature < LEAST_TEMPERATURE:
        raise QMoEError(
            "argument",
            f"a temperature of {options.temperature} is too low to compute with",
            f"use {LEAST_TEMPERATURE} or more, or leave it out for greedy decoding",
        )
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise QMoEError("argument", "the prompt is not UTF-8", "encode it in UTF-8") from error
