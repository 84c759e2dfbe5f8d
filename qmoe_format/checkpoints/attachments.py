"""The small files of a checkpoint that travel in a ``.qmoe`` file, as its attachments."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmoe_format.container.attachment_files import TEMPLATE_FOLDER, is_attached
from qmoe_format.container.index import check_file_name
from qmoe_format.errors import QMoEError
from qmoe_format.hub import check_not_pointer

MAX_BYTES = 1 << 28


def find_attachments(folder: Path, *, code: bool = False) -> list[Path]:
    """The files to attach, in the order of their names.

    Args:
        folder: a checkpoint's.
        code: also the Python files that ``auto_map`` entries name.

    Raises:
        QMoEError: ``checkpoint`` for a file that cannot be attached: it is a link to nothing, a
            pipe, a device or a pointer of Git LFS, it is too large, or its name has other
            characters than that of an attachment may have.
    """
    paths = [*folder.iterdir(), *folder.glob(f"{TEMPLATE_FOLDER}/*")]
    found = [path for path in paths if is_attached(path.relative_to(folder))]
    found = [path for path in found if not path.is_dir()]
    found += code_files(folder) if code else []
    for path in sorted(found):
        _check(path)
    return sorted(found)


def code_files(folder: Path) -> list[Path]:
    """The Python files of the folder that ``auto_map`` entries name, and those that they import."""
    configs = sorted(folder.glob("*config.json"))
    modules = [_module(each) for path in configs for each in _classes(_auto_map(path))]
    found: dict[str, Path] = {}
    while modules:
        name = f"{modules.pop()}.py"
        path = folder / name
        if name not in found and path.name == name and path.is_file():
            found[name] = path
            modules += _imported(path)
    return list(found.values())


def tokenizer_code(folder: Path) -> str | None:
    """The Python file that has the tokenizer's class, if that is not one of transformers'.

    It is ``REPOSITORY--NAME.py`` if the file is not in the folder but elsewhere on the Hub.
    """
    entry = _auto_map(folder / "tokenizer_config.json")
    if isinstance(entry, Mapping):
        entry = entry.get("AutoTokenizer")
    classes = _classes(entry)
    return f"{_module(classes[-1])}.py" if classes else None  # the last is the fast tokenizer


def _check(path: Path) -> None:
    def wrong(problem: str, advice: str) -> QMoEError:
        return QMoEError("checkpoint", f"{path}: {problem}", advice)

    try:
        check_file_name(path.name)
    except QMoEError as error:
        raise wrong(
            "the name of an attached file has characters other than A-Z a-z 0-9 . _ -",
            "rename or move it",
        ) from error
    check_not_pointer(path)
    if not path.is_file():  # reading a pipe or a device might not end
        raise wrong("not an ordinary file", "remove it")
    if path.stat().st_size > MAX_BYTES:
        raise wrong(
            f"{path.stat().st_size:,} bytes are too many for a configuration or tokenizer file",
            "move it elsewhere",
        )


def _auto_map(path: Path) -> Any:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # for others to complain about
        return None
    return config.get("auto_map") if isinstance(config, dict) else None


def _classes(entry: Any) -> list[str]:
    """The classes, ``MODULE.CLASS``, in an ``auto_map`` or a part of it."""
    if isinstance(entry, Mapping):
        entry = list(entry.values())
    if isinstance(entry, list):
        return [name for each in entry for name in _classes(each)]
    return [entry] if isinstance(entry, str) else []


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _imported(path: Path) -> list[str]:
    """The modules of the same folder that a Python file imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # for Python to complain about, if it is ever run
        return []
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found += [node.module] if node.module else [alias.name for alias in node.names]
    return found
