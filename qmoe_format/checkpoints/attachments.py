"""The small files of a checkpoint that travel in a ``.qmoe`` file, as its attachments."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qmoe_format.container.attachment_files import TEMPLATE_FOLDER, is_attached
from qmoe_format.container.index import check_file_name
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.hub import check_not_pointer
from qmoe_format.remote import Location, RemotePath

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


def copy_attachments(source: RemotePath, folder: Path, *, code: bool = False) -> None:
    """Copy the files to attach, and what may be among them, from elsewhere.

    Args:
        source: a checkpoint's folder.
        folder: an empty one.
        code: also all Python files.

    Raises:
        QMoEError: ``checkpoint`` for a file that is too large; ``not-found``, ``io``.
    """
    found = {PurePosixPath(path.name): path for path in source.iterdir()}
    if PurePosixPath(TEMPLATE_FOLDER) in found:
        templates = (source / TEMPLATE_FOLDER).iterdir()
        found |= {PurePosixPath(TEMPLATE_FOLDER, path.name): path for path in templates}
    for name, path in found.items():
        if not (is_attached(name) or (code and name.suffix == ".py")) or path.is_dir():
            continue
        _check_name(path)
        _check_size(path, path.size())
        with os_errors(f"cannot write {folder}"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(path.read_bytes())


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


def _check_name(path: Location) -> None:
    try:
        check_file_name(path.name)
    except QMoEError as error:
        raise _wrong(
            path,
            "the name of an attached file has characters other than A-Z a-z 0-9 . _ -",
            "rename or move it",
        ) from error


def _check(path: Path) -> None:
    _check_name(path)
    check_not_pointer(path)
    if not path.is_file():  # reading a pipe or a device might not end
        raise _wrong(path, "not an ordinary file", "remove it")
    _check_size(path, path.stat().st_size)


def _check_size(path: Location, size: int) -> None:
    if size > MAX_BYTES:
        problem = f"{size:,} bytes are too many for a configuration or tokenizer file"
        raise _wrong(path, problem, "move it elsewhere")


def _wrong(path: Location, problem: str, advice: str) -> QMoEError:
    return QMoEError("checkpoint", f"{path}: {problem}", advice)


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
