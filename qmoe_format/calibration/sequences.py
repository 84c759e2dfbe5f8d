"""From text to sequences of tokens like those that a model was trained on.

Documents are tokenized without special tokens (but for those of a chat), joined with the
end-of-sequence token between them, and cut into windows; the last, short one is kept. A causal
model gets them as they are, an encoder-decoder with T5's span corruption, see ``spans``. An
encoder-decoder that was trained for something else is given pairs: what the encoder reads, and
what the decoder should write for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from qmoe_format.calibration.spans import Ids, corrupt, sentinels, window_length
from qmoe_format.calibration.text import Chat, read_documents
from qmoe_format.calibration.tokenizing import SpelledTokens, check_known, tokenize
from qmoe_format.checkpoints.tokenizers import reading_text
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODER_LENGTH = 256
CAUSAL_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of sequences, padded at the end.

    Attributes:
        ids: int64 [sequences, length].
        attended: bool, the same shape; False for padding.
        counted: bool, the same shape; whether the token enters the Hessians.
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


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with the entries of its language model, if that has a part of its own."""
    for part in ("thinker_config", "text_config"):
        config = {**config, **(config.get(part) or {})}
    return config


def default_sequence_length(config: Mapping[str, Any]) -> int:
    """256 for an encoder-decoder; otherwise 2048, or the most the model reads if that is less."""
    config = language_config(config)
    if config.get("is_encoder_decoder"):
        return ENCODER_LENGTH
    return min(CAUSAL_LENGTH, config.get("max_position_embeddings") or CAUSAL_LENGTH)


def read_batches(
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    path: str | Path,
    *,
    column: str = "text",
    target_column: str | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Batch]:
    """``make_batches``, or with a ``target_column`` ``make_pair_batches``, from a file of text.

    Args:
        tokenizer: the model's.
        config: the contents of its ``config.json``.
        path: as for ``read_documents``.
        column: of the text.
        target_column: of what the decoder should write.
        progress: called with the number of documents read so far.
        **options: of ``make_batches``.

    Raises:
        QMoEError: as from these and ``read_documents``.
    """

    def documents() -> Iterator[tuple[str | Chat, ...]]:
        for number, document in enumerate(read, 1):
            if progress:
                progress(number)
            yield document

    config = language_config(config)
    read = read_documents(path, column, target_column)
    if target_column is None:
        return make_batches(tokenizer, config, (text for (text,) in documents()), **options)
    pairs = cast("Iterator[tuple[str, str]]", documents())
    return make_pair_batches(tokenizer, config, pairs, **options)


def make_batches(
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    texts: Iterable[str | Chat],
    *,
    sequence_length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    mask_special_tokens: bool = False,
    parse_special_tokens: bool = False,
) -> list[Batch]:
    """Make calibration batches of all the text, or of a random part of it.

    Args:
        tokenizer: the model's.
        config: the contents of its ``config.json``.
        texts: documents, or chats for the tokenizer's chat template; empty ones are left out.
        sequence_length: tokens that the encoder or the causal model reads; by default
            ``default_sequence_length``.
        samples: how many windows to choose if there are more; they stay in the text's order.
        seed: of the choice and, with a window's number, of its spans: a window's spans do not
            depend on which others are chosen.
        batch_size: sequences in a batch; the last may have fewer.
        mask_special_tokens: leave sentinels, the end-of-sequence token and all other special tokens
            out of the Hessians, as QMoE does (arXiv 2310.16795).
        parse_special_tokens: read what is spelled like a special token as that token, in texts as
            in chats; otherwise it is text, and a warning says how often there was any.

    Raises:
        QMoEError: ``argument`` for numbers out of range, text without a token, or a chat that the
            chat template cannot write; ``checkpoint`` if the tokenizer lacks a token that is
            needed, does not fit the model, or knows next to nothing of the text.
    """
    length = _length(config, sequence_length, samples, seed, batch_size)
    corrupted = bool(config.get("is_encoder_decoder"))
    end = _end(tokenizer)
    ids = tokenize(tokenizer, texts, end, parse_special_tokens=parse_special_tokens)
    size = window_length(length) if corrupted else length
    chosen = _choose(-(-len(ids) // size), samples, seed)
    inputs = [ids[number * size : (number + 1) * size] for number in chosen]
    if not corrupted:
        return _batches(tokenizer, config, inputs, None, [], batch_size, mask_special_tokens)
    start = _start(config)
    marks = sentinels(tokenizer, min(size, len(ids)))
    targets: list[Ids] = []
    for place, number in enumerate(chosen):
        generator = np.random.default_rng((seed, number))
        inputs[place], labels = corrupt(inputs[place], marks, end, generator)
        targets.append(np.concatenate([[start], labels[:-1]]))
    return _batches(
        tokenizer, config, inputs, targets, [start, *marks], batch_size, mask_special_tokens
    )


def make_pair_batches(
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    pairs: Iterable[Sequence[str]],
    *,
    sequence_length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    mask_special_tokens: bool = False,
    parse_special_tokens: bool = False,
) -> list[Batch]:
    """Make calibration batches of pairs, for an encoder-decoder.

    Each text gets the special tokens that the tokenizer gives it. Texts and targets that are longer
    than ``sequence_length`` are cut. Otherwise like ``make_batches``.

    Args:
        pairs: what the encoder reads, and what the decoder should write.

    Raises:
        QMoEError: as from ``make_batches``; also ``argument`` for a model without an encoder.
    """
    if not config.get("is_encoder_decoder"):
        raise QMoEError(
            "argument",
            f"a target_column is for encoder-decoders, and {config.get('model_type')} has no "
            "encoder",
            "leave it out",
        )
    length = _length(config, sequence_length, samples, seed, batch_size)
    start, end = _start(config), _end(tokenizer)
    options = {
        "truncation": True,
        "max_length": length,
        "split_special_tokens": not parse_special_tokens,
    }
    spelled = SpelledTokens(tokenizer)
    inputs: list[Ids] = []
    targets: list[Ids] = []
    for text, target in pairs:
        if not parse_special_tokens:
            spelled.count(f"{text}\n{target}")
        with reading_text():
            read = tokenizer(text, **options).input_ids
            labels = tokenizer(text_target=target, **options).input_ids
        if read:
            inputs.append(np.array(read, np.int64))
            # The decoder writes the end, but does not read it.
            wanted = labels[:-1] if labels[-1:] == [end] else labels
            targets.append(np.array([start, *wanted], np.int64))
    spelled.warn()
    if not inputs:
        raise QMoEError("argument", "no pair of text and target has a token", "give some text")
    check_known(tokenizer, np.concatenate([*inputs, *targets]))
    chosen = _choose(len(inputs), samples, seed)
    return _batches(
        tokenizer,
        config,
        [inputs[number] for number in chosen],
        [targets[number] for number in chosen],
        [start],
        batch_size,
        mask_special_tokens,
    )


def _length(
    config: Mapping[str, Any],
    sequence_length: int | None,
    samples: int | None,
    seed: int,
    batch_size: int,
) -> int:
    """The length of a sequence, after a check of all numbers."""
    if sequence_length is None:
        sequence_length = default_sequence_length(config)
    for name, value, least in [
        ("sequence_length", sequence_length, 2),
        ("samples", samples, 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ]:
        if value is not None and value < least:
            raise QMoEError("argument", f"{name} is {value}, but has to be {least} or more")
    longest = None if config.get("is_encoder_decoder") else config.get("max_position_embeddings")
    if longest and sequence_length > longest:
        raise QMoEError(
            "argument",
            f"sequence_length is {sequence_length}, but the model reads up to {longest}",
        )
    return sequence_length


def _choose(number: int, samples: int | None, seed: int) -> list[int]:
    """Numbers of the sequences to take, in order."""
    if samples is None or samples >= number:
        return list(range(number))
    chosen = np.random.default_rng(seed).choice(np.arange(number), samples, replace=False)
    return sorted(chosen.tolist())


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    inputs: Sequence[Ids],
    targets: Sequence[Ids] | None,
    special: Iterable[int],
    batch_size: int,
    masked: bool,
) -> list[Batch]:
    """``special``: tokens beside the tokenizer's special ones to leave out if ``masked``."""
    largest = max(int(sequence.max()) for sequence in [*inputs, *(targets or [])])
    if largest >= (config.get("vocab_size") or largest + 1):
        raise QMoEError(
            "checkpoint",
            f"the tokenizer gives token {largest}, but the model's vocabulary has "
            f"{config['vocab_size']}",
            "use the tokenizer that belongs to the model",
        )
    end = _end(tokenizer)
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    left_out = {*tokenizer.all_special_ids, end, *special} if masked else set()
    parts = [slice(first, first + batch_size) for first in range(0, len(inputs), batch_size)]
    return [
        Batch(
            _pad(inputs[part], padding, left_out),
            _pad(targets[part], padding, left_out) if targets else None,
        )
        for part in parts
    ]


def _pad(sequences: Sequence[Ids], padding: int, left_out: Iterable[int]) -> Tokens:
    ids = np.full((len(sequences), max(map(len, sequences))), padding, dtype=np.int64)
    attended = np.zeros(ids.shape, dtype=np.bool_)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        attended[row, : len(sequence)] = True
    counted = attended & ~np.isin(ids, list(left_out))
    return Tokens(torch.from_numpy(ids), torch.from_numpy(attended), torch.from_numpy(counted))


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    return _required(tokenizer.eos_token_id, "the tokenizer has no end-of-sequence token")


def _start(config: Mapping[str, Any]) -> int:
    return _required(
        config.get("decoder_start_token_id"), "config.json has no decoder_start_token_id"
    )


def _required(token: object, missing: str) -> int:
    if not isinstance(token, int) or token < 0:
        raise QMoEError("checkpoint", missing, "add it, or download the checkpoint again")
    return token
