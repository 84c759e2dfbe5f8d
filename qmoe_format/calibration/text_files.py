"""The rows of a ``.jsonl``, ``.json``, ``.txt`` or ``.parquet`` file, one at a time."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from qmoe_format.errors import QMoEError

Row: TypeAlias = tuple[str, Mapping[str, object]]  # its place, for errors, and values by column


def read_rows(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    """The rows of a file; a text without columns is that of the first.

    Args:
        path: of a file.
        columns: those that are wanted, as lists of alternatives; a file whose columns are known
            beforehand must have one of each. A row may have others and may lack these.

    Raises:
        QMoEError: ``argument`` for another kind of file, and, while the rows are read, for damage;
            ``dependency`` if pyarrow is needed but missing.
    """
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    read = _READERS.get(suffix)
    if read is None or (read is _read_parquet and name.endswith(".gz")):
        raise QMoEError(
            "argument",
            f"{path}: is not one of {', '.join(_READERS)}",
            "convert or rename it; all but .parquet may be compressed, as .gz",
        )
    if len(columns) > 1 and read is _read_txt:
        raise QMoEError("argument", f"{path}: has no columns", "give a .jsonl or .parquet file")
    if read is _read_parquet:
        _parquet()
    return read(path, columns)


def no_column(where: str, column: str, columns: Sequence[str]) -> QMoEError:
    """The error for a missing column, among those that are there."""
    return QMoEError(
        "argument",
        f"{where}: no column {column!r}: there is {', '.join(map(repr, columns)) or 'none'}",
        "name the right one",
    )


def _read_jsonl(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    for where, line in _lines(path):
        if not line.isspace():
            yield _object(_parsed(line, where, "correct or remove the line"), where, columns)


def _read_json(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    """Many files of this name have an object per line."""
    first = next((line for _, line in _lines(path) if not line.isspace()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(path, columns)
        return
    text = "".join(line for _, line in _lines(path))
    for number, value in enumerate(_parsed(text, str(path), "correct the file"), 1):
        yield _object(value, f"{path}, item {number}", columns)


def _read_txt(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    paragraph: list[str] = []
    for where, line in _lines(path):
        if line.isspace():
            yield where, {columns[0][0]: "".join(paragraph).rstrip("\n")}
            paragraph.clear()
        else:
            paragraph.append(line)
    yield str(path), {columns[0][0]: "".join(paragraph).rstrip("\n")}


def _read_parquet(path: Path, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    parquet = _parquet()
    try:
        with parquet.ParquetFile(path) as file:
            wanted = present_columns(str(path), columns, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(columns=wanted):
                for values in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", values
    except Exception as error:  # pyarrow's own, or Python's for a value that it does not have
        if isinstance(error, QMoEError | MemoryError) or getattr(error, "errno", None):
            raise
        raise QMoEError(
            "argument", f"{path}: not a parquet file of text ({error})", "download it again"
        ) from error


def present_columns(
    where: str, columns: Sequence[Sequence[str]], present: Sequence[str]
) -> list[str]:
    """Those of the wanted columns that are there.

    Raises:
        QMoEError: ``argument`` if there is none of some alternatives.
    """
    for names in columns:
        if not set(names).intersection(present):
            raise no_column(where, names[0], present)
    return [name for names in columns for name in names if name in present]


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise QMoEError(
            "dependency",
            f"a .parquet file needs the package pyarrow, which cannot be imported ({error})",
            "run: pip install 'qmoe-format[parquet]', or convert the file to .jsonl",
        ) from error


_READERS: dict[str, Callable[[Path, Sequence[Sequence[str]]], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line's place, for messages, and the line, ending in a line feed."""
    with _open(path) as file:
        number = 0
        while line := _read_line(file, path):
            number += 1
            where = f"{path}, line {number}"
            try:
                # Some editors on Windows begin a file with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise QMoEError(
                    "argument", f"{where}: not UTF-8 ({error.reason})", "save the file as UTF-8"
                ) from error
            yield where, text.rstrip("\r\n") + "\n"


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast("BinaryIO", gzip.open(path, "rb"))
    return path.open("rb")


def _read_line(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.readline()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise QMoEError(
            "argument", f"{path}: not a gzip file, or damaged ({error})", "download it again"
        ) from error


def _parsed(text: str, where: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QMoEError("argument", f"{where}: not JSON ({error})", advice) from error


def _object(value: object, where: str, columns: Sequence[Sequence[str]]) -> Row:
    if isinstance(value, dict):
        return where, value
    example = ", ".join(f'"{names[0]}": "…"' for names in columns)
    raise QMoEError("argument", f"{where}: not a JSON object", f"make it one, like {{{example}}}")
