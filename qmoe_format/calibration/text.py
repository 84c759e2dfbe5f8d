"""Calibration text from a ``.jsonl``, ``.txt`` or ``.parquet`` file, one document at a time."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qmoe_format.errors import QMoEError, os_errors

_GIVE_TEXT = "give a file of text"


def read_documents(
    path: str | Path, column: str = "text", target: str | None = None
) -> Iterator[tuple[str, ...]]:
    """The documents of a file, in order; those with a blank text are left out.

    Args:
        path: a ``.jsonl`` file with a JSON object per line, a ``.parquet`` file with a document per
            row, or a ``.txt`` file in UTF-8 with blank lines between documents.
        column: the key or column of the text.
        target: that of what a decoder should write for the text; a ``.txt`` file has none.

    Returns:
        (text,), or (text, target) if there is a ``target``.

    Raises:
        QMoEError: ``not-found`` if there is no such file; ``argument`` for another kind of file,
            and, while the documents are read, for a line or row that is damaged or has no such
            column, or if there is no text at all; ``dependency`` if pyarrow is needed but missing;
            ``io``.
    """
    path = text_file(path)
    columns = [column] if target is None else [column, target]
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise QMoEError(
            "argument", f"{path}: is not one of {', '.join(_READERS)}", "convert or rename it"
        )
    if column == target:
        raise QMoEError(
            "argument", f"text and target are both the column {column!r}", "name two columns"
        )
    if target is not None and read is _read_txt:
        raise QMoEError("argument", f"{path}: has no columns", "give a .jsonl or .parquet file")
    if read is _read_parquet:
        _parquet()
    return _not_blank(read(path, columns), path)


def text_sha256(path: str | Path) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal.

    Raises:
        QMoEError: as from ``text_file``; ``io``.
    """
    path = text_file(path)
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_file(path: str | Path) -> Path:
    """The path, if it is that of a file.

    Raises:
        QMoEError: ``not-found``; ``argument``.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise QMoEError("not-found", f"{path}: no such file", _GIVE_TEXT)
    kind = "a folder" if path.is_dir() else "not an ordinary file"
    raise QMoEError("argument", f"{path}: is {kind}", _GIVE_TEXT)


def _not_blank(documents: Iterator[Sequence[str]], path: Path) -> Iterator[tuple[str, ...]]:
    empty = True
    with os_errors(f"cannot read {path}"):
        for document in documents:
            if all(text and not text.isspace() for text in document):
                empty = False
                yield tuple(document)
    if empty:
        raise QMoEError("argument", f"{path}: has no text", _GIVE_TEXT)


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[Sequence[str]]:
    example = ", ".join(f'"{column}": "…"' for column in columns)
    for where, line in _lines(path):
        if line.isspace():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QMoEError(
                "argument", f"{where}: not JSON ({error})", "correct or remove the line"
            ) from error
        if not isinstance(document, dict):
            raise QMoEError(
                "argument",
                f"{where}: not a JSON object",
                f"make every line one, like {{{example}}}",
            )
        for column in columns:
            if column not in document:
                raise _no_column(where, column, list(document))
        yield [_checked(document[column], column, where) for column in columns]


def _read_txt(path: Path, columns: Sequence[str]) -> Iterator[Sequence[str]]:
    paragraph: list[str] = []
    for _, line in _lines(path):
        if line.isspace():
            yield ["".join(paragraph).rstrip("\n")]
            paragraph.clear()
        else:
            paragraph.append(line)
    yield ["".join(paragraph).rstrip("\n")]


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Sequence[str]]:
    parquet = _parquet()
    try:
        with parquet.ParquetFile(path) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise _no_column(str(path), column, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(columns=list(columns)):
                lists = (batch.column(column).to_pylist() for column in columns)
                for values in zip(*lists, strict=True):
                    row += 1
                    where = f"{path}, row {row}"
                    yield [
                        _checked(value, column, where)
                        for value, column in zip(values, columns, strict=True)
                    ]
    except QMoEError:
        raise
    except ValueError as error:  # such as pyarrow's ArrowInvalid
        raise QMoEError(
            "argument", f"{path}: not a parquet file of text ({error})", "download it again"
        ) from error


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise QMoEError(
            "dependency",
            f"a .parquet file needs the package pyarrow, which cannot be imported ({error})",
            "run: pip install 'qmoe-format[parquet]', or convert the file to .jsonl",
        ) from error


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Sequence[str]]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line's place, for messages, and the line, ending in a line feed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                # Some editors on Windows begin a file with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise QMoEError(
                    "argument", f"{where}: not UTF-8 ({error.reason})", "save the file as UTF-8"
                ) from error
            yield where, text.rstrip("\r\n") + "\n"


def _checked(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise QMoEError("argument", f"{where}: {column!r} is not text", "correct or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise QMoEError(
            "argument",
            f"{where}: character {error.start} is half of a surrogate pair",
            "correct or remove it",
        ) from error
    return value


def _no_column(where: str, column: str, columns: list[str]) -> QMoEError:
    return QMoEError(
        "argument",
        f"{where}: no column {column!r}: there is {', '.join(map(repr, columns)) or 'none'}",
        "name the right one",
    )
