"""Batches of tokens: nothing of the text is lost, and spans are T5's."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_format.errors import QMoEError, QMoEWarning

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qmoe_format.calibration.sequences import (
    Batch,
    Tokens,
    default_sequence_length,
    make_batches,
    make_pair_batches,
    read_batches,
)
from qmoe_format.calibration.spans import corrupt, window_length
from qmoe_format.calibration.text import Chat

PAD, END, UNKNOWN, WORDS = 0, 1, 2, 3  # the word "7" is token WORDS + 7
CAUSAL = {"model_type": "mixtral", "vocab_size": 1103, "max_position_embeddings": 512}
START = END  # not the padding, as in T5: the two may not be confused
ENCODER_DECODER = {
    "is_encoder_decoder": True,
    "decoder_start_token_id": START,
    "vocab_size": 1103,
}


def make_tokenizer(sentinels: int = 100, **changes: str | None) -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *map(str, range(1000))]
    names = [f"<extra_id_{i}>" for i in range(sentinels)]
    vocabulary = {word: number for number, word in enumerate([*words, *reversed(names)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # splits </s> into three
    special: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=names, **special | changes
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def text(*numbers: int) -> str:
    return " ".join(map(str, numbers))


def rows(tokens: Tokens) -> list[list[int]]:
    """Without the padding, which has to be at the end."""
    lengths = tokens.attended.sum(1).tolist()
    for row, length in enumerate(lengths):
        assert tokens.attended[row, :length].all()
        assert (tokens.ids[row, length:] == PAD).all()
    assert max(lengths) == tokens.ids.shape[1]
    return [ids[:length] for ids, length in zip(tokens.ids.tolist(), lengths, strict=True)]


def inputs(batches: Sequence[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in rows(batch.inputs)]


def originals(batches: Sequence[Batch], special: Sequence[int]) -> list[list[int]]:
    """The windows, put together from the inputs of the encoder and the decoder."""
    windows = []
    for batch in batches:
        assert batch.targets is not None
        for encoder, decoder in zip(rows(batch.inputs), rows(batch.targets), strict=True):
            assert decoder[0] == START
            assert encoder[-1] == END
            spans: dict[int, list[int]] = {}
            for token in decoder[1:]:
                if token in special:
                    assert token not in spans
                    spans[token] = []
                    last = token
                else:
                    spans[last].append(token)
            sentinels = [token for token in encoder if token in special]
            assert sentinels == list(spans) == list(special[: len(spans)])
            pieces = [spans.get(token, [token]) for token in encoder[:-1]]
            windows.append(list(chain.from_iterable(pieces)))
    return windows


def same(left: Sequence[Batch], right: Sequence[Batch]) -> bool:
    def ids(batches: Sequence[Batch]) -> list[torch.Tensor]:
        return [t.ids for b in batches for t in (b.inputs, b.targets) if t is not None]

    pairs = zip(ids(left), ids(right), strict=True)
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in pairs)


def refusal(code: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(QMoEError) as caught:
        make_batches(*arguments, **options)
    assert caught.value.code == code
    return str(caught.value)


# --- causal -------------------------------------------------------------------------------------


def test_causal_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text(1, 2, 3), "", text(4), text(5, 6, 7, 8)]
    batches = make_batches(
        tokenizer, CAUSAL, texts, sequence_length=4, batch_size=2, mask_special_tokens=True
    )
    joined = [w + WORDS for w in (1, 2, 3)] + [END, WORDS + 4, END]
    joined += [w + WORDS for w in (5, 6, 7, 8)]
    assert inputs(batches) == [joined[:4], joined[4:8], joined[8:]]
    assert [batch.inputs.ids.shape for batch in batches] == [(2, 4), (1, 2)]
    assert all(batch.targets is None for batch in batches)
    first = batches[0].inputs
    assert first.ids.dtype == torch.int64
    assert first.attended.dtype == first.counted.dtype == torch.bool
    assert first.counted.tolist() == [[True, True, True, False], [True, False, True, True]]


def test_special_tokens_count_unless_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    (batch,) = make_batches(tokenizer, ENCODER_DECODER, [text(*range(1, 9))])
    assert batch.targets is not None
    for tokens in (batch.inputs, batch.targets):
        assert torch.equal(tokens.counted, tokens.attended)


def test_padding_is_neither_attended_nor_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    (batch,) = make_batches(tokenizer, CAUSAL, [text(1, 2, 3, 4)], sequence_length=3)
    assert batch.inputs.ids.tolist() == [[4, 5, 6], [7, PAD, PAD]]
    assert batch.inputs.attended.tolist() == [[True] * 3, [True, False, False]]
    assert batch.inputs.counted.tolist() == [[True] * 3, [True, False, False]]


def test_special_tokens_are_not_counted_and_cannot_be_written(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ["5 </s> <extra_id_0> nonsense 6"]
    with pytest.warns(QMoEWarning, match=r"'</s>', are read as text \(2 in all\)"):
        (batch,) = make_batches(tokenizer, CAUSAL, texts, mask_special_tokens=True)
    # Whatever the words are as text, here unknown, they are not the special tokens.
    assert UNKNOWN in batch.inputs.ids
    assert END not in batch.inputs.ids
    counted = batch.inputs.ids[batch.inputs.counted]
    assert {WORDS + 5, WORDS + 6} <= set(counted.tolist())
    assert not set(counted.tolist()) & set(tokenizer.all_special_ids)


def test_long_documents_are_tokenized_in_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    """Which loses nothing, and cuts only words of more than 1000 characters."""
    long = "\n  ".join(map(str, [*range(1000)] * 80))
    assert len(long) > 400_000
    (batch,) = make_batches(
        tokenizer, CAUSAL | {"max_position_embeddings": 10**6}, [long, " 9"], sequence_length=10**5
    )
    expected = [*range(WORDS, WORDS + 1000)] * 80 + [END, WORDS + 9]
    assert batch.inputs.ids.tolist() == [expected]
    (batch,) = make_batches(tokenizer, CAUSAL, ["7" * 500_000 + " 8"])
    assert batch.inputs.ids.tolist() == [[UNKNOWN] * 3 + [WORDS + 8]]


def test_without_a_padding_token() -> None:
    tokenizer = make_tokenizer(pad_token=None)
    (batch,) = make_batches(tokenizer, CAUSAL, [text(1, 2, 3)], sequence_length=2)
    assert batch.inputs.ids.tolist() == [[4, 5], [6, END]]
    assert batch.inputs.attended.tolist() == [[True, True], [True, False]]


def test_default_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    assert default_sequence_length(ENCODER_DECODER | {"max_position_embeddings": 100}) == 256
    assert default_sequence_length(CAUSAL) == 512
    assert default_sequence_length({"max_position_embeddings": 32768}) == 2048
    assert default_sequence_length({}) == 2048
    words = [text(*range(1000))]
    assert make_batches(tokenizer, CAUSAL, words)[0].inputs.ids.shape == (2, 512)
    assert make_batches(tokenizer, ENCODER_DECODER, words)[0].inputs.ids.shape == (4, 256)


# --- special tokens in text, and chats ----------------------------------------------------------


MARKS = ["<|user|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|> ' if m.role == 'user' else '' }}{{ m.content }} "
    "{{ raise_exception('no system') if m.role == 'system' }}<|end|> {% endfor %}"
)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Marks of chats are special tokens; so, though nobody says what for, is <|spare|>."""
    tokenizer = make_tokenizer(sentinels=0, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[:1]})
    tokenizer.add_tokens([AddedToken("<|spare|>", special=True)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(*contents: str, role: str = "user") -> Chat:
    return Chat([{"role": role, "content": each} for each in contents], "a.jsonl, 7")


def test_special_tokens_in_text_are_parsed_if_asked(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    user, end = chat_tokenizer.convert_tokens_to_ids(MARKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = make_batches(
            chat_tokenizer, CAUSAL, ["<|user|>5<|end|>", "6", "7"], parse_special_tokens=True
        )
    # The end of the first document is already there.
    expected = [user, WORDS + 5, end, WORDS + 6, end, WORDS + 7]
    assert batch.inputs.ids.tolist() == [expected]


def test_special_tokens_in_pairs_are_parsed_if_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = make_pair_batches(
            tokenizer, ENCODER_DECODER, [("5 <pad> 6", "7 </s> 8")], parse_special_tokens=True
        )
    assert batch.targets is not None
    assert batch.inputs.ids.tolist() == [[WORDS + 5, PAD, WORDS + 6]]
    assert batch.targets.ids.tolist() == [[START, WORDS + 7, END, WORDS + 8]]


def test_special_tokens_in_text_are_counted(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["1 2 3 4 <|spare|> 5 <|user|>", "6 <|spare|>", "7"]
    with pytest.warns(QMoEWarning) as caught:
        make_batches(chat_tokenizer, CAUSAL, texts)
    (warning,) = caught
    assert "such as '<|spare|>', are read as text (3 in all)" in str(warning.message)
    assert "--parse-special-tokens" in str(warning.message)


@pytest.mark.filterwarnings("error")
def test_chats(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    user, end = chat_tokenizer.convert_tokens_to_ids(MARKS)
    answer = chat("4", role="assistant")
    documents: list[str | Chat] = [chat("1", "2"), "3", answer, chat("5")]
    (batch,) = make_batches(chat_tokenizer, CAUSAL, documents)
    expected = [user, WORDS + 1, end, user, WORDS + 2, end, WORDS + 3, end, WORDS + 4, end]
    assert batch.inputs.ids.tolist() == [[*expected, user, WORDS + 5, end]]


def test_a_chat_template_that_writes_the_date(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    date = "{% if strftime_now is defined %}{{ strftime_now('%Y') }} {% endif %}"
    chat_tokenizer.chat_template = {"default": date + TEMPLATE, "tool_use": "no"}
    (batch,) = make_batches(chat_tokenizer, CAUSAL, [chat("5")])
    assert batch.inputs.ids[0, 0] == WORDS + 1  # 1 January, whenever this test runs


def test_chats_that_cannot_be_written(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    message = refusal("argument", chat_tokenizer, CAUSAL, [chat("1", role="system")])
    assert message.startswith("a.jsonl, 7: ")
    assert "no system" in message
    message = refusal("argument", chat_tokenizer, CAUSAL, [chat("1\ud800")])
    assert message.startswith("a.jsonl, 7: character ")
    chat_tokenizer.chat_template = None
    message = refusal("argument", chat_tokenizer, CAUSAL, [chat("1")])
    assert message.startswith("a.jsonl, 7: is a chat, but the tokenizer has no chat template")


def test_chats_from_a_file(chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = {"conversations": [{"from": "human", "value": "5"}, {"from": "gpt", "value": "6"}]}
    path.write_text(json.dumps(line))
    (batch,) = read_batches(chat_tokenizer, CAUSAL, path)
    text = chat_tokenizer.decode(batch.inputs.ids[0])
    assert text.split() == ["<|user|>", "5", "<|end|>", "6", "<|end|>"]


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CAUSAL, ENCODER_DECODER])
def test_samples_are_some_of_the_windows_in_order(
    tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]
) -> None:
    texts = [text(*range(i, i + 40)) for i in range(0, 900, 40)]

    def make(samples: int | None, seed: int = 0) -> list[Batch]:
        return make_batches(
            tokenizer, config, texts, sequence_length=30, samples=samples, seed=seed, batch_size=4
        )

    everything = inputs(make(None))
    chosen = inputs(make(10))
    places = [everything.index(row) for row in chosen]  # the same spans, whichever are chosen
    assert len(set(places)) == 10
    assert places == sorted(places)
    assert places != list(range(10))
    assert [len(batch.inputs.ids) for batch in make(10)] == [4, 4, 2]
    assert same(make(10), make(10))
    assert not same(make(10), make(10, seed=1))
    assert same(make(len(everything)), make(None))
    assert same(make(10**6), make(None))


# --- span corruption ----------------------------------------------------------------------------


@settings(deadline=None)
@given(length=st.integers(1, 700), seed=st.integers(0, 2**32))
def test_spans_are_disjoint_and_nothing_is_lost(length: int, seed: int) -> None:
    window = np.arange(length, dtype=np.int64) + 1000
    sentinels = [999 - i for i in range(200)]
    encoder, labels = corrupt(window, sentinels, END, np.random.default_rng(seed))
    noise = max(1, round(0.15 * length))
    spans = max(1, round(noise / 3))
    assert len(encoder) == length - noise + spans + 1
    assert len(labels) == noise + spans + 1
    assert encoder.dtype == labels.dtype == np.int64
    assert encoder[-1] == labels[-1] == END
    for sequence in (encoder, labels):
        assert sequence[(sequence < 1000) & (sequence != END)].tolist() == sentinels[:spans]
        kept = sequence[sequence >= 1000]
        assert (np.diff(kept) > 0).all()
    # No span is empty and none touches the next: no two sentinels are side by side.
    for sequence in (encoder, labels):
        at = np.flatnonzero((sequence < 1000) & (sequence != END))
        assert (np.diff(at) > 1).all()
    assert labels[0] == sentinels[0]
    assert labels[-2] >= 1000
    assert length == 1 or encoder[0] >= 1000
    both = np.concatenate([encoder, labels])
    assert sorted(both[both >= 1000].tolist()) == window.tolist()


def test_every_token_can_be_taken_out() -> None:
    """But the first, which T5 always keeps; the last it always takes."""
    window = np.arange(40, dtype=np.int64) + 1000
    taken = np.zeros(40, np.int64)
    for seed in range(500):
        _, labels = corrupt(window, [999, 998], END, np.random.default_rng(seed))
        taken[labels[labels >= 1000] - 1000] += 1
    assert taken.sum() == 500 * 6
    assert taken[0] == 0
    assert taken[-1] == 500
    assert ((taken[1:-1] > 0) & (taken[1:-1] < 500)).all()


@settings(deadline=None)
@given(length=st.integers(2, 1200))
def test_window_length_fills_the_encoder(length: int) -> None:
    sizes = [
        len(corrupt(np.zeros(n, np.int64), range(400), END, np.random.default_rng(0))[0])
        for n in (window_length(length), window_length(length) - 1)
        if n
    ]
    assert sizes[0] == length
    assert sizes[1:] in ([], [length - 1])


def test_window_lengths_of_the_literature() -> None:
    assert window_length(256) == 283
    assert window_length(512) == 568


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any))
def test_the_text_is_recovered(tokenizer: PreTrainedTokenizerFast, counts: list[int]) -> None:
    texts = [text(*range(i, i + n)) for i, n in enumerate(counts)]
    batches = make_batches(
        tokenizer,
        ENCODER_DECODER,
        texts,
        sequence_length=30,
        batch_size=3,
        mask_special_tokens=True,
    )
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    documents = [[WORDS + i + j for j in range(n)] for i, n in enumerate(counts) if n]
    joined = list(chain.from_iterable([*d, END] for d in documents))[:-1]
    size = window_length(30)
    windows = [joined[i : i + size] for i in range(0, len(joined), size)]
    assert originals(batches, sentinels) == windows
    special = set(tokenizer.all_special_ids)
    for tokens in [t for b in batches for t in (b.inputs, b.targets) if t is not None]:
        expected = [[i not in special for i in row] for row in tokens.ids.tolist()]
        assert tokens.counted.tolist() == expected


def test_a_single_token(tokenizer: PreTrainedTokenizerFast) -> None:
    (batch,) = make_batches(tokenizer, ENCODER_DECODER, [text(7)], mask_special_tokens=True)
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert batch.inputs.ids.tolist() == [[first, END]]
    assert batch.targets is not None
    assert batch.targets.ids.tolist() == [[START, first, WORDS + 7]]
    assert batch.targets.counted.tolist() == [[False, False, True]]


def test_the_start_token_is_masked() -> None:
    tokenizer = make_tokenizer()
    config = ENCODER_DECODER | {"decoder_start_token_id": WORDS}  # special to the model only
    (batch,) = make_batches(tokenizer, config, [text(5, 6, 7)], mask_special_tokens=True)
    assert batch.targets is not None
    assert batch.targets.ids[0, 0] == WORDS
    assert not batch.targets.counted[0, 0]
    assert batch.targets.counted.any()


# --- pairs --------------------------------------------------------------------------------------


def test_pairs_as_the_model_reads_them() -> None:
    tokenizer = make_tokenizer(sentinels=0)
    pairs = [(text(1, 2, 3), text(7, 8)), (text(4), text(*range(20, 40))), (text(5), text(6))]
    first, last = make_pair_batches(
        tokenizer, ENCODER_DECODER, pairs, sequence_length=6, batch_size=2
    )
    assert rows(first.inputs) == [[WORDS + n for n in (1, 2, 3)], [WORDS + 4]]
    assert first.targets is not None
    # The decoder begins with its start token, which would also be the end that it does not read.
    assert rows(first.targets) == [
        [START, WORDS + 7, WORDS + 8],
        [START, *range(WORDS + 20, WORDS + 26)],
    ]
    assert rows(last.inputs) == [[WORDS + 5]]


def test_special_tokens_of_pairs_are_added_and_masked() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    arguments = (tokenizer, ENCODER_DECODER, [("1 2 3", "4 5")])
    (batch,) = make_pair_batches(*arguments, sequence_length=3, mask_special_tokens=True)
    assert batch.targets is not None
    assert rows(batch.inputs) == [[WORDS + 1, WORDS + 2, END]]
    assert rows(batch.targets) == [[START, WORDS + 4, WORDS + 5]]
    assert batch.inputs.counted.tolist() == [[True, True, False]]
    assert batch.targets.counted.tolist() == [[False, True, True]]


def test_special_tokens_written_in_pairs_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [("5 </s> 6", "7 <extra_id_0> 8")]
    with pytest.warns(QMoEWarning, match=r"\(2 in all\).*parse_special_tokens=True"):
        (batch,) = make_pair_batches(tokenizer, ENCODER_DECODER, pairs)
    assert batch.targets is not None
    special = set(tokenizer.all_special_ids) - {UNKNOWN}
    for tokens in (rows(batch.inputs)[0][:-1], rows(batch.targets)[0][1:]):
        assert UNKNOWN in tokens
        assert not special & set(tokens)


def test_some_pairs_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [(text(n), text(n + 100, n)) for n in range(50)]
    batches = make_pair_batches(tokenizer, ENCODER_DECODER, pairs, samples=20, seed=1)
    chosen = [row[0] - WORDS for row in inputs(batches)]
    assert len(set(chosen)) == 20
    assert chosen == sorted(chosen)
    targets = [row for batch in batches if batch.targets for row in rows(batch.targets)]
    assert targets == [[START, WORDS + n + 100, WORDS + n] for n in chosen]
    others = make_pair_batches(tokenizer, ENCODER_DECODER, pairs, samples=20, seed=2)
    assert inputs(others) != inputs(batches)


def test_pairs_are_for_encoder_decoders(tokenizer: PreTrainedTokenizerFast) -> None:
    cases: list[tuple[dict[str, Any], list[tuple[str, str]], str]] = [
        (CAUSAL, [("1", "2")], "mixtral has no encoder"),
        (ENCODER_DECODER, [], "no pair"),
        (ENCODER_DECODER, [("", "1"), (" ", "2")], "no pair"),
    ]
    for config, pairs, reason in cases:
        with pytest.raises(QMoEError, match=reason) as caught:
            make_pair_batches(tokenizer, config, pairs)
        assert caught.value.code == "argument"


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CAUSAL, ENCODER_DECODER])
@pytest.mark.parametrize("texts", [[], [""], ["", " "]])
def test_no_text(
    tokenizer: PreTrainedTokenizerFast, config: dict[str, Any], texts: list[str]
) -> None:
    assert "has no tokens" in refusal("argument", tokenizer, config, texts)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sequence_length", 1), ("samples", 0), ("batch_size", 0), ("seed", -1)],
)
def test_numbers_out_of_range(tokenizer: PreTrainedTokenizerFast, option: str, value: int) -> None:
    message = refusal("argument", tokenizer, CAUSAL, ["1"], **{option: value})
    assert message.startswith(f"{option} is {value}, ")


def test_longer_than_the_model_reads(tokenizer: PreTrainedTokenizerFast) -> None:
    message = refusal("argument", tokenizer, CAUSAL, ["1"], sequence_length=513)
    assert "reads up to 512" in message


def test_no_sentinels() -> None:
    message = refusal("checkpoint", make_tokenizer(sentinels=0), ENCODER_DECODER, ["1 2 3"])
    assert "<extra_id_0>" in message
    assert "target_column" in message


def test_too_few_sentinels() -> None:
    tokenizer = make_tokenizer(sentinels=3)
    message = refusal("argument", tokenizer, ENCODER_DECODER, [text(*range(300))])
    assert "need 14 sentinels, but the tokenizer has 3" in message
    assert make_batches(tokenizer, ENCODER_DECODER, [text(*range(60))])  # short: 9 in 3 spans


def test_no_end_of_sequence() -> None:
    tokenizer = make_tokenizer(eos_token=None)
    assert "no end-of-sequence token" in refusal("checkpoint", tokenizer, CAUSAL, ["1"])


def test_no_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    config: dict[str, Any] = {"is_encoder_decoder": True}
    assert "decoder_start_token_id" in refusal("checkpoint", tokenizer, config, ["1"])
    config["decoder_start_token_id"] = -1
    assert "decoder_start_token_id" in refusal("checkpoint", tokenizer, config, ["1"])


def test_a_tokenizer_that_knows_nothing_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for config in (CAUSAL, ENCODER_DECODER):
        message = refusal("checkpoint", tokenizer, config, ["one two three"])
        assert "the tokenizer knows only 0 of the 3 tokens" in message
    assert "1 of the 11" in refusal("checkpoint", tokenizer, CAUSAL, ["w " * 10 + "7"])
    assert make_batches(tokenizer, CAUSAL, ["w " * 9 + "7"])
    with pytest.raises(QMoEError, match="knows only 0 of the 3") as caught:
        make_pair_batches(tokenizer, ENCODER_DECODER, [("a b", "c"), ("", "7")])
    assert caught.value.code == "checkpoint"


def test_a_tokenizer_that_makes_nothing_of_the_text() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="</s>")
    message = refusal("checkpoint", tokenizer, CAUSAL, ["one two"])
    assert "fetch the tokenizer's files again" in message


def test_a_tokenizer_that_fails() -> None:
    broken = Tokenizer(WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=broken, eos_token="</s>")
    message = refusal("checkpoint", tokenizer, CAUSAL, ["one two"])
    assert "the tokenizer cannot read the text (WordLevel error: Missing [UNK] token" in message
    with pytest.raises(QMoEError, match="cannot read the text"):
        make_pair_batches(tokenizer, ENCODER_DECODER, [("one", "two")])


def test_a_tokenizer_of_another_model(tokenizer: PreTrainedTokenizerFast) -> None:
    message = refusal("checkpoint", tokenizer, CAUSAL | {"vocab_size": 600}, ["596", "597"])
    assert "gives token 600, but the model's vocabulary has 600" in message


# --- the models of the project ------------------------------------------------------------------


def test_the_same_windows_as_the_evaluation(shared_data: Path) -> None:
    script = importlib.util.spec_from_file_location("eval_span", shared_data / "eval_span.py")
    assert script is not None
    assert script.loader is not None
    evaluation = importlib.util.module_from_spec(script)
    script.loader.exec_module(evaluation)
    folder = shared_data / "switch-mini"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = shared_data / "text" / "eval.jsonl"
    expected = list(evaluation.windows(tokenizer, path, seed=1234))
    config = json.loads((folder / "config.json").read_text())
    batches = read_batches(tokenizer, config, path, seed=1234)
    assert all(batch.targets for batch in batches)
    targets = [row for b in batches if b.targets is not None for row in rows(b.targets)]
    encoders = inputs(batches)
    assert len(encoders) == len(expected) + 1  # the short window at the end
    assert encoders[:-1] == [encoder.tolist() for encoder, _ in expected]
    assert targets[:-1] == [[0, *labels.tolist()[:-1]] for _, labels in expected]
