"""Calibration text: the documents of a file or of a data set of the Hub, one at a time."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmoe_format.calibration import hub_data_sets, text_files
from qmoe_format.calibration.text_files import Row, no_column
from qmoe_format.errors import QMoEError, QMoEWarning, os_errors
from qmoe_format.remote import RemotePath, location

DEFAULT_COLUMN = "text"
CHAT_COLUMNS = ("messages", "conversations")
_GIVE_TEXT = "give a file of text"
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Chat:
    """A document that a tokenizer's chat template makes a text of.

    Attributes:
        messages: each with ``role`` and ``content``.
        where: its place, for errors.
    """

    messages: Sequence[Mapping[str, Any]]
    where: str


def read_documents(
    source: str | Path, column: str = DEFAULT_COLUMN, target: str | None = None
) -> Iterator[tuple[str | Chat, ...]]:
    """The documents of a file or data set, in order.

    Blank ones are left out, and with a warning those that are missing or null.

    Args:
        source: a file: ``.jsonl``, with a JSON object per line; ``.json``, with an array of
            objects, or lines of them; ``.txt`` in UTF-8, with blank lines between documents; one of
            these compressed, as ``.gz``; or ``.parquet``, with a document per row. Or a data set:
            ``ORG/NAME``, ``ORG/NAME:SPLIT`` or ``ORG/NAME:CONFIG:SPLIT``, by default the split
            ``train``.
        column: the key or column of the text, or of a chat: a list of objects with ``role`` and
            ``content``, or with ``from`` and ``value``. Where there is no ``text``, the chat in
            ``messages`` or ``conversations`` is taken instead.
        target: that of what a decoder should write for the text; a ``.txt`` file has none.

    Returns:
        (text or chat,), or (text, target) if there is a ``target``.

    Raises:
        QMoEError: ``not-found`` if there is no such file or data set; ``argument`` for another kind
            of file, and, while the documents are read, for a line or row that is damaged or no
            text, or if there is no text at all; ``dependency`` if pyarrow or datasets is needed but
            missing; ``io``.
    """
    if column == target:
        raise QMoEError(
            "argument", f"text and target are both the column {column!r}", "name two columns"
        )
    columns = _columns(column, target)
    return _documents(_rows(source, columns), source, columns)


def text_sha256(source: str | Path, column: str = DEFAULT_COLUMN, target: str | None = None) -> str:
    """The SHA-256 of a file's bytes, or of those columns of a data set, in hexadecimal.

    Raises:
        QMoEError: as from ``text_file``, or as from ``read_documents``; ``io``.
    """
    if hub_data_sets.is_name(source):
        hashed = hashlib.sha256()
        for _, row in _rows(source, _columns(column, target)):
            hashed.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return hashed.hexdigest()
    path = text_file(source)
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_file(path: str | Path) -> Path:
    """The path, if it is that of a file.

    Raises:
        QMoEError: ``not-found``; ``argument``.
    """
    place = location(path)
    if isinstance(place, RemotePath):
        raise QMoEError("argument", f"{place}: text is read here only", "copy it to this machine")
    path = place
    if path.is_file():
        return path
    if not path.exists():
        raise QMoEError("not-found", f"{path}: no such file", _GIVE_TEXT)
    kind = "a folder" if path.is_dir() else "not an ordinary file"
    raise QMoEError("argument", f"{path}: is {kind}", _GIVE_TEXT)


def check_characters(text: str, where: str) -> None:
    """Refuse what a tokenizer cannot read.

    Raises:
        QMoEError: ``argument``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QMoEError(
            "argument",
            f"{where}: character {error.start} is half of a surrogate pair",
            "correct or remove it",
        ) from error


def _columns(column: str, target: str | None) -> list[list[str]]:
    """The columns of the text and of the target, each with those to take where it is not there."""
    if target is not None:
        return [[column], [target]]
    return [[column, *CHAT_COLUMNS] if column == DEFAULT_COLUMN else [column]]


def _rows(source: str | Path, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    if hub_data_sets.is_name(source):
        return hub_data_sets.read_rows(str(source), columns)
    return text_files.read_rows(text_file(source), columns)


def _documents(
    rows: Iterator[Row], source: str | Path, columns: Sequence[Sequence[str]]
) -> Iterator[tuple[str | Chat, ...]]:
    good = total = missing = 0
    first_missing: tuple[str, list[str]] | None = None
    with os_errors(f"cannot read {source}"):
        for where, row in rows:
            total += 1
            values = [_value(row, names, len(columns) == 1, where) for names in columns]
            document = tuple(value for value in values if value is not None)
            if len(document) < len(columns):
                missing += 1
                first_missing = first_missing or (where, list(row))
            elif not any(map(_blank, document)):
                good += 1
                yield document
    if not good and first_missing:
        where, present = first_missing
        for names in columns:
            if not set(names).intersection(present):
                raise no_column(where, names[0], present)
    if not good:
        raise QMoEError("argument", f"{source}: has no text", _GIVE_TEXT)
    if missing:
        named = " or ".join(repr(names[0]) for names in columns)
        warnings.warn(
            f"{source}: {missing:,} of {total:,} documents have no {named} and are left out",
            QMoEWarning,
            stacklevel=2,
        )


def _blank(document: str | Chat) -> bool:
    if isinstance(document, Chat):
        return not document.messages
    return not document or document.isspace()


def _value(
    row: Mapping[str, object], names: Sequence[str], chats: bool, where: str
) -> str | Chat | None:
    """The first text, or chat, that there is in the columns."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str):
            check_characters(value, where)
            return value
        if isinstance(value, list) and chats:
            messages = [_message(each) for each in value]
            if None not in messages:
                return Chat([each for each in messages if each], where)
        if value is not None:
            raise QMoEError("argument", f"{where}: {name!r} is not text", "correct or remove it")
    return None


def _message(value: object) -> Mapping[str, Any] | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("from"), str) and "role" not in value:
        role = _ROLES.get(value["from"], value["from"])
        value = {"role": role, "content": value.get("value")}
    return value if isinstance(value.get("role"), str) else None
