"""Documents to tokens, with a look at whether the tokenizer understands them."""

from __future__ import annotations

import re
import warnings
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from qmoe_format.calibration.spans import Ids
from qmoe_format.calibration.text import Chat, check_characters
from qmoe_format.checkpoints.tokenizers import reading_text
from qmoe_format.errors import QMoEError, QMoEWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_UNKNOWN = 0.9  # of a text's tokens
# Long documents are tokenized in pieces that end at white space if possible: a tokenizer needs many
# times the memory of its text.
_PIECE = re.compile(r"(?s).{1,200000}\S{0,1000}")
# Some chat templates write today's date, but the same text has to give the same tokens on any day.
_SAME_DAY = "{% macro strftime_now(format) %}1 January 2026{% endmacro %}"


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str | Chat],
    end: int,
    *,
    parse_special_tokens: bool = False,
) -> Ids:
    """The tokens of all documents, with ``end`` between them: int64 [tokens].

    What looks like a special token is one in a chat, where the chat template writes them, and in a
    text only with ``parse_special_tokens``. None is added.

    Raises:
        QMoEError: ``argument`` if there is no text, or for a chat that the chat template cannot
            write; ``checkpoint`` if the tokenizer cannot read the text, or knows next to nothing
            of it.
    """
    spelled = SpelledTokens(tokenizer)
    ids = array("q")
    blank, ended = True, False
    for document in documents:
        chat = isinstance(document, Chat)
        text = _written(tokenizer, document) if isinstance(document, Chat) else document
        parsed = chat or parse_special_tokens
        if not parsed:
            spelled.count(text)
        blank = blank and (not text or text.isspace())
        begun = False
        for piece in _PIECE.findall(text):
            with reading_text():
                tokens = tokenizer(
                    piece, add_special_tokens=False, split_special_tokens=not parsed, verbose=False
                ).input_ids
            if tokens and ids and not begun and not ended:
                ids.append(end)
            begun = begun or bool(tokens)
            ids.extend(tokens)
        if begun:
            ended = parsed and ids[-1] == end
    spelled.warn()
    if not ids and blank:
        raise QMoEError("argument", "the text has no tokens", "give some text")
    found = np.array(ids, dtype=np.int64)
    check_known(tokenizer, found)
    return found


def check_known(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> None:
    """Refuse a tokenizer that knows next to nothing of a text.

    Args:
        tokenizer: the one that made the tokens.
        ids: int64 [tokens], of a text that is not blank.

    Raises:
        QMoEError: ``checkpoint``.
    """
    unknown = tokenizer.unk_token_id
    special = [each for each in tokenizer.all_special_ids if each != unknown]
    total = int(np.isin(ids, special, invert=True).sum())
    known = total - int((ids == unknown).sum()) if unknown is not None else total
    if not len(ids) or known < (1 - MOST_UNKNOWN) * total:
        raise QMoEError(
            "checkpoint",
            f"the tokenizer knows only {known:,} of the {total:,} tokens that it finds in the text",
            "fetch the tokenizer's files again, or give text in a language of the model",
        )


class SpelledTokens:
    """Counts special tokens that are spelled in texts where they are read as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        marks = {*tokenizer.all_special_tokens, *(str(each) for each in added if each.special)}
        longest_first = sorted(filter(None, marks), key=lambda mark: (-len(mark), mark))
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._number = 0
        self._example = ""

    def count(self, text: str) -> None:
        """Add those of a text."""
        for match in self._marks.finditer(text):
            self._number += 1
            self._example = self._example or match[0]

    def warn(self) -> None:
        """Say how many there were, if any."""
        if self._number:
            warnings.warn(
                f"special tokens that are spelled in the text, such as {self._example!r}, are read "
                f"as text ({self._number:,} in all); to read them as tokens, use "
                "--parse-special-tokens (in Python parse_special_tokens=True)",
                QMoEWarning,
                stacklevel=2,
            )


def _written(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """A chat as the tokenizer's chat template writes it."""
    if tokenizer.chat_template is None:
        raise QMoEError(
            "argument",
            f"{chat.where}: is a chat, but the tokenizer has no chat template",
            "give text, or put the model's chat_template.jinja beside its config.json",
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            chat_template=_SAME_DAY + tokenizer.get_chat_template(),
            tokenize=False,
        )
    except Exception as error:  # the template is a program
        raise QMoEError(
            "argument",
            f"{chat.where}: the tokenizer's chat template cannot write this chat ({error})",
            "correct or remove it",
        ) from error
    check_characters(text, chat.where)
    return text
