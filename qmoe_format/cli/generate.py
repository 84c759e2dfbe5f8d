"""``qmoe generate``: a model's text, as it is written."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from qmoe_format.cli import models
from qmoe_format.errors import QMoEError

NEW_TOKENS = 100  # unless the model's file or the user says
COLDEST = 1e-3  # temperature; logits over less may be too large for a float


def run(options: argparse.Namespace) -> None:
    """Write what the model makes of the prompt to stdout, and its speed to a terminal's stderr."""
    _check(options)
    tokenizer, model = models.load(options)
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc] # transformers is not followed
        """Counts tokens, and notes when the prompt has been read."""

        tokens = 0
        read = 0.0

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.tokens += value.numel()
                self.read = self.read or time.perf_counter()
            super().put(value)

    encoded = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    encoded.pop("token_type_ids", None)
    if not encoded.input_ids.numel():
        raise QMoEError("argument", "the prompt has no tokens; give some text")
    settings: dict[str, Any] = {}
    said = model.generation_config
    if options.max_new_tokens or not (said.max_new_tokens or said.max_length):
        settings["max_new_tokens"] = options.max_new_tokens or NEW_TOKENS
    if options.temperature is not None:
        settings |= {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed or 0)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    model.generate(**encoded, **settings, streamer=streamer)
    if sys.stderr.isatty():
        seconds = time.perf_counter() - streamer.read
        rate = (streamer.tokens - 1) / seconds if streamer.tokens > 1 else 0
        print(
            f"\nprompt: {encoded.input_ids.shape[1]} tokens in {streamer.read - started:.1f} s; "
            f"written: {streamer.tokens} tokens, {rate:.1f} a second",
            file=sys.stderr,
        )


def _check(options: argparse.Namespace) -> None:
    """Refuse what no model could do."""
    if options.temperature is not None and options.temperature < COLDEST:
        raise QMoEError(
            "argument",
            f"a temperature of {options.temperature} is too small to compute with; leave it out "
            f"for the likeliest tokens, or take {COLDEST} or more",
        )
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise QMoEError("argument", "the prompt is not UTF-8; give it in UTF-8") from error
