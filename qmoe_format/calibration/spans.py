"""Span corruption, which T5 is trained on (arXiv 1910.10683, section 3.1.4).

15 % of a window's tokens are taken out, in spans of 3 on average. In the encoder's input a sentinel
stands for each span; the decoder reads sentinel, span, sentinel, span, ...

    window   a b c d e f g h
    encoder  a b <extra_id_0> e f g <extra_id_1> </s>
    decoder  <start> <extra_id_0> c d <extra_id_1> h
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE_DENSITY = 0.15
MEAN_SPAN = 3

Ids = NDArray[np.int64]


def sentinels(tokenizer: PreTrainedTokenizerBase, window: int) -> list[int]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, ..., as many as a window of that length needs.

    In T5 they descend from the last id.

    Raises:
        QMoEError: ``checkpoint`` if the tokenizer has none; ``argument`` if it has too few.
    """
    _, needed = _noise(window)
    found: list[int] = []
    for number in range(needed):
        token = tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>")
        if token is None or token == tokenizer.unk_token_id:
            break
        found.append(token)
    if not found:
        raise QMoEError(
            "checkpoint",
            "the tokenizer has no token <extra_id_0>, so the model was not trained on T5's span "
            "corruption",
            "give text with a target_column, for what the decoder should write",
        )
    if len(found) < needed:
        raise QMoEError(
            "argument",
            f"sequences of this length need {needed} sentinels, but the tokenizer has {len(found)}",
            "choose a shorter sequence_length",
        )
    return found


def window_length(encoder_length: int) -> int:
    """The shortest window from which span corruption makes an encoder input of that length.

    It is 283 for 256. T5 takes the longest, which is one token longer for some lengths: 284 for
    256. Both are 568 for T5's own 512.
    """
    for length in count(1):
        noise, spans = _noise(length)
        if length - noise + spans + 1 >= encoder_length:
            break
    return length


def corrupt(
    window: Ids, sentinels: Sequence[int], end: int, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """Take random spans out of a window: int64 [tokens].

    Returns:
        The encoder's input and the decoder's labels; each ends with ``end``.
    """
    noise, spans = _noise(len(window))
    taken = _segments(noise, spans, generator)
    kept = _segments(len(window) - noise, spans, generator)
    bounds = np.cumsum(np.stack([kept, taken], axis=1).ravel())[:-1]
    pieces = np.split(window, bounds)
    encoder: list[Ids | list[int]] = []
    labels: list[Ids | list[int]] = []
    for sentinel, before, span in zip(sentinels, pieces[::2], pieces[1::2], strict=False):
        encoder += [before, [sentinel]]
        labels += [[sentinel], span]
    return np.concatenate([*encoder, [end]]), np.concatenate([*labels, [end]])


def _noise(length: int) -> tuple[int, int]:
    """How many tokens of a window are taken out, and in how many spans; at least one each."""
    noise = max(1, round(length * NOISE_DENSITY))
    return noise, max(1, round(noise / MEAN_SPAN))


def _segments(total: int, parts: int, generator: np.random.Generator) -> Ids:
    """Random lengths of at least 1 that add up to ``total``, every division equally likely.

    With a ``total`` of 0 in one part the length is 0: a window of one token keeps none.
    """
    cuts = 1 + np.sort(generator.choice(max(0, total - 1), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))
