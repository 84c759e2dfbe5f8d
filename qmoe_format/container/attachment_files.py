"""Attachments as files of a checkpoint's folder.

An attachment's name is a plain file name [J-6]. One folder may have files of a tokenizer, and is a
part of their names: ``additional_chat_templates/NAME.jinja`` is attached as
``additional_chat_templates--NAME.jinja``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

from qmoe_format.errors import QMoEError, os_errors

if TYPE_CHECKING:
    from qmoe_format.container.reader import QMoEFile

TEMPLATE_FOLDER = "additional_chat_templates"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.*.json",  # for certain releases of transformers
    "tokenizer.model*",
    "tekken.json",
    "*vocab*.json",
    "*vocab*.txt",
    "*.model",
    "*.tiktoken",
)
CONFIGURATIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "*processor_config.json",
)
LICENSES = ("license*", "licence*", "notice*", "use_policy*")


def is_attached(path: PurePath) -> bool:
    """Whether a file of a checkpoint's folder, given by its path there, is an attachment.

    It is if ``from_pretrained`` of a configuration, a tokenizer or a processor may read it, and if
    it is a license. Python code is not.
    """
    *folders, name = path.parts
    if folders:
        return folders == [TEMPLATE_FOLDER] and fnmatchcase(name, "[!.]*.jinja")
    if name.startswith(".") or name.endswith(".quality.json"):  # a report, ``conversion.report``
        return False
    return (
        is_vocabulary(name)
        or any(fnmatchcase(name, pattern) for pattern in CONFIGURATIONS)
        or any(fnmatchcase(name.lower(), pattern) for pattern in LICENSES)
    )


def is_vocabulary(name: str) -> bool:
    """Whether a file of this name has, in some class of tokenizers, the vocabulary."""
    return any(fnmatchcase(name, pattern) for pattern in VOCABULARIES)


def attachment_name(path: PurePath) -> str:
    """What a file is called as an attachment.

    Args:
        path: in the checkpoint's folder.
    """
    return "--".join(path.parts)


def file_path(name: str) -> PurePosixPath:
    """Where in a checkpoint's folder the attachment belongs.

    Args:
        name: of the attachment.
    """
    folder, _, file = name.partition("--")
    if folder == TEMPLATE_FOLDER and file.endswith(".jinja"):
        return PurePosixPath(folder, file)
    return PurePosixPath(name)


def placed(folder: Path, name: str) -> Path:
    """Where in ``folder`` an attachment belongs; the folder that it is in is made.

    Raises:
        QMoEError: ``duplicate`` if another attachment has the name of that folder; ``io``.
    """
    path = folder / file_path(name)
    with os_errors(f"cannot write {folder}"):
        try:
            path.parent.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise QMoEError(
                "duplicate", f"{path.parent.name!r} is an attachment, and the folder of others"
            ) from error
    return path


@contextmanager
def attached_files(file: QMoEFile) -> Iterator[Path]:
    """A temporary folder with the attachments of ``file``, for ``from_pretrained``.

    Raises:
        QMoEError: the codes of reading; ``duplicate`` if two would be one file; ``io``.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in file.attachments:
            path, data = placed(Path(folder), name), file.attachment(name)
            with os_errors(f"cannot write {path}"):
                path.write_bytes(data)
        yield Path(folder)
