"""Text to the sequences of tokens that a model was trained on.

Documents are tokenised without special tokens, joined with the end-of-sequence token between them,
and cut into windows; the last, short one is kept. A causal model gets them as they are. An
encoder-decoder gets T5's span corruption (arXiv 1910.10683, section 3.1.4): of a window's tokens
15 % are taken out in spans of 3 on average; in the encoder's input a sentinel stands for each
span, and the decoder reads sentinel, span, sentinel, span, ...

    window   a b c d e f g h
    encoder  a b <extra_id_0> e f g <extra_id_1> </s>
    decoder  <start> <extra_id_0> c d <extra_id_1> h
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE_DENSITY = 0.15
MEAN_SPAN = 3
ENCODER_LENGTH = 256
CAUSAL_LENGTH = 2048

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of sequences, padded at the end.

    Attributes:
        ids: int64 ``[sequences, length]``.
        attended: bool, the same shape; False: padding.
        counted: bool, the same shape; True: enters the Hessians.
    """

    ids: Tensor
    attended: Tensor
    counted: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model reads at once.

    Attributes:
        inputs: the encoder's input, or the causal model's.
        targets: the decoder's input, beginning with its start token; None for a causal model.
    """

    inputs: Tokens
    targets: Tokens | None


def default_sequence_length(config: Mapping[str, Any]) -> int:
    """256 for an encoder; otherwise 2048, or what the model can read if that is less."""
    if config.get("is_encoder_decoder"):
        return ENCODER_LENGTH
    return min(CAUSAL_LENGTH, config.get("max_position_embeddings") or CAUSAL_LENGTH)


def make_batches(
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    texts: Iterable[str],
    *,
    sequence_length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    mask_special_tokens: bool = False,
) -> list[Batch]:
    """Make calibration batches of all the text, or of a random part of it.

    Args:
        tokenizer: the model's.
        config: the contents of its ``config.json``.
        texts: documents; empty ones are left out.
        sequence_length: the length of the encoder's or the causal model's input, see
            ``default_sequence_length``.
        samples: how many windows to choose if there are more; they stay in the text's order.
        seed: of the choice and, with a window's number, of its spans: a window's spans do not
            depend on which others are chosen.
        batch_size: sequences in a batch; the last may have fewer.
        mask_special_tokens: leave sentinels, the end of a sequence and all other special tokens out
            of the Hessians, as QMoE does (arXiv 2310.16795).

    Raises:
        QMoEError: ``argument`` for numbers out of range or text without a token; ``checkpoint`` if
            the tokenizer lacks a token that is needed or does not fit the model.
    """
    if sequence_length is None:
        sequence_length = default_sequence_length(config)
    for name, value, least in [
        ("sequence_length", sequence_length, 2),
        ("samples", samples, 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ]:
        if value is not None and value < least:
            raise QMoEError("argument", f"{name} is {value}; it has to be {least} or more")
    corrupted = bool(config.get("is_encoder_decoder"))
    longest = None if corrupted else config.get("max_position_embeddings")
    if longest and sequence_length > longest:
        raise QMoEError(
            "argument", f"sequence_length is {sequence_length}; the model reads up to {longest}"
        )
    end = _required(tokenizer.eos_token_id, "the tokenizer has no end-of-sequence token")
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    special = {*tokenizer.all_special_ids, end}

    ids = _tokenize(tokenizer, texts, end)
    size = window_length(sequence_length) if corrupted else sequence_length
    chosen = np.arange(-(-len(ids) // size))
    if samples is not None and samples < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, samples, replace=False))
    inputs = [ids[number * size : (number + 1) * size] for number in chosen.tolist()]
    targets: list[Ids] = []
    if corrupted:
        start = _required(
            config.get("decoder_start_token_id"), "config.json has no decoder_start_token_id"
        )
        sentinels = _sentinels(tokenizer, _noise(min(size, len(ids)))[1])
        special |= {start, *sentinels}
        for place, number in enumerate(chosen.tolist()):
            inputs[place], labels = corrupt(
                inputs[place], sentinels, end, np.random.default_rng((seed, number))
            )
            targets.append(np.concatenate([[start], labels[:-1]]))

    largest = max(int(sequence.max()) for sequence in [*inputs, *targets])
    if largest >= (config.get("vocab_size") or largest + 1):
        raise QMoEError(
            "checkpoint",
            f"the tokenizer gives token {largest}, the model's vocabulary has "
            f"{config['vocab_size']}; give the tokenizer that belongs to the model",
        )
    left_out = special if mask_special_tokens else set()
    batches = []
    for first in range(0, len(inputs), batch_size):
        part = slice(first, first + batch_size)
        batches.append(
            Batch(
                _pad(inputs[part], padding, left_out),
                _pad(targets[part], padding, left_out) if corrupted else None,
            )
        )
    return batches


def window_length(encoder_length: int) -> int:
    """The shortest window that span corruption makes an encoder input of that length: 283 for 256.

    T5 takes the longest, which is one token longer for some lengths, 284 for 256; both are 568 for
    its own 512.
    """
    for length in count(1):
        noise, spans = _noise(length)
        if length - noise + spans + 1 >= encoder_length:
            break
    return length


def corrupt(
    window: Ids, sentinels: Sequence[int], end: int, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """The encoder's input and the decoder's labels; each ends with ``end``."""
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
    """Of a window: how many tokens are taken out, in how many spans; at least one in one."""
    noise = max(1, round(length * NOISE_DENSITY))
    return noise, max(1, round(noise / MEAN_SPAN))


def _segments(total: int, parts: int, generator: np.random.Generator) -> Ids:
    """Lengths, 1 or more, that add up to ``total``; each such division equally likely.

    ``total`` may also be 0 in one part: a window of one token keeps none.
    """
    cuts = 1 + np.sort(generator.choice(max(0, total - 1), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], end: int) -> Ids:
    ids = array("q")
    for text in texts:
        # What looks like a special token in a text is text.
        document = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        if document and ids:
            ids.append(end)
        ids.extend(document)
    if not ids:
        raise QMoEError("argument", "the calibration text has no tokens; give some text")
    return np.array(ids, dtype=np.int64)


def _sentinels(tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, ...; in T5 they descend from the last id."""
    found: list[int] = []
    for number in range(needed):
        token = tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>")
        if token is None or token == tokenizer.unk_token_id:
            break
        found.append(token)
    if not found:
        raise QMoEError(
            "checkpoint",
            "the tokenizer has no token <extra_id_0>, and an encoder-decoder is calibrated with "
            "T5's span corruption only; use a recipe that needs no text",
        )
    if len(found) < needed:
        raise QMoEError(
            "argument",
            f"sequences of this length need {needed} sentinels, the tokenizer has {len(found)}: "
            "choose a shorter sequence_length",
        )
    return found


def _pad(sequences: Sequence[Ids], padding: int, left_out: Iterable[int]) -> Tokens:
    ids = np.full((len(sequences), max(map(len, sequences))), padding, dtype=np.int64)
    attended = np.zeros(ids.shape, dtype=np.bool_)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        attended[row, : len(sequence)] = True
    counted = attended & ~np.isin(ids, list(left_out))
    return Tokens(torch.from_numpy(ids), torch.from_numpy(attended), torch.from_numpy(counted))


def _required(token: int | None, missing: str) -> int:
    if token is None:
        raise QMoEError("checkpoint", f"{missing}; add it, or fetch the checkpoint again")
    return token
