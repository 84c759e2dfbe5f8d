"""The rows of a data set of the Hugging Face Hub, through the package datasets."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qmoe_format.calibration.text_files import Row, present_columns
from qmoe_format.errors import QMoEError

# ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG:SPLIT, where a split may be a part, train[:1000].
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))??(?::(\w+(?:\[[\w:%-]*\])?))?")
_FILES = (".jsonl", ".json", ".txt", ".parquet", ".gz")


def is_name(source: str | Path) -> bool:
    """Whether this names a data set, and not a file or a folder."""
    text = str(source)
    return bool(
        not Path(source).exists() and not text.lower().endswith(_FILES) and _NAME.fullmatch(text)
    )


def read_rows(name: str, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    """The rows of a data set, with those of the wanted columns that it has.

    Args:
        name: as in ``is_name``.
        columns: as in ``text_files.read_rows``.

    Raises:
        QMoEError: ``dependency`` without the package datasets; and, when the first row is read,
            ``not-found`` if there is no such data set, ``argument`` if it has none of some
            alternatives.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise QMoEError(
            "dependency",
            f"{name}: no such file, and a data set of the Hub needs the package datasets, which "
            f"cannot be imported ({error})",
            "give a file of text, or run: pip install 'qmoe-format[datasets]'",
        ) from error
    return _rows(datasets, name, columns)


def _rows(datasets: Any, name: str, columns: Sequence[Sequence[str]]) -> Iterator[Row]:
    match = _NAME.fullmatch(name)
    assert match, name
    path, config, split = match.groups()
    try:
        rows = datasets.load_dataset(path, config, split=split or "train")
    except Exception as error:  # of any of the packages beneath it
        raise QMoEError(
            "not-found",
            f"{name}: no such file, and there is no such data set that can be loaded ({error})",
            "write ORG/NAME:SPLIT or ORG/NAME:CONFIG:SPLIT, or give a file of text",
        ) from error
    rows = rows.select_columns(present_columns(name, columns, rows.column_names))
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row
