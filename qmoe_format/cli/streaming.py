"""Show text while a model generates it, and then how fast that was (needs transformers)."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TextStreamer

from qmoe_format.checkpoints.model import running
from qmoe_format.cli.experts_line import experts_line


class Streamer(TextStreamer):  # type: ignore[misc] # transformers is not followed
    """Prints one generation, and keeps its tokens and when they came.

    Attributes:
        tokens: the generated ones, even of a generation that was interrupted.
        started: when this was made, in seconds of ``time.perf_counter``.
        first_at: when the first token came.
        last_at: when the last one came.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.started = time.perf_counter()
        self.first_at = self.last_at = 0.0
        self._ended = False

    @property
    def text(self) -> str:
        """What was generated."""
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
            self.last_at = time.perf_counter()
            self.first_at = self.first_at or self.last_at
        super().put(value)

    def end(self) -> None:
        """Print what is left, once, and a line break if there was anything."""
        if self.tokens and not self._ended:
            self._ended = True
            super().end()


def stream(
    model: Any, encoded: Any, settings: dict[str, Any], streamer: Streamer, statistics: bool
) -> Any:
    """Generate, and show the text; of a generation that is interrupted, what there is.

    Args:
        encoded: the prompt, as the tokenizer returns it.
        settings: further arguments of transformers' ``generate``.
        streamer: a new one.
        statistics: whether to show them although stderr is no terminal.

    Returns:
        What ``generate`` does.

    Raises:
        QMoEError: ``checkpoint`` if transformers cannot run the model.
    """
    try:
        with running("compressed"):
            return model.generate(
                **encoded, **settings, streamer=streamer, tokenizer=streamer.tokenizer
            )
    finally:
        streamer.end()
        if streamer.tokens and (statistics or sys.stderr.isatty()):
            prompt_tokens = encoded["input_ids"].shape[1]
            print(_statistics(streamer, prompt_tokens), file=sys.stderr, flush=True)
            if statistics:
                tokens = prompt_tokens + len(streamer.tokens)
                print(experts_line(model, tokens), file=sys.stderr, flush=True)


def _statistics(streamer: Streamer, prompt_tokens: int) -> str:
    """The line that is shown after a generation."""
    tokens = len(streamer.tokens)
    seconds = streamer.last_at - streamer.first_at
    rate = f", {(tokens - 1) / seconds:.1f} tokens/s" if seconds else ""
    return (
        f"prompt: {prompt_tokens} tokens, first token after "
        f"{streamer.first_at - streamer.started:.2f} s; generated: {tokens} tokens{rate}"
    )
