"""A conformance vector: a file, and what a reader has to say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.conformance_vectors.file_builder import Content


@dataclass(frozen=True, slots=True)
class Vector:
    """One line of the manifest.

    Attributes:
        id: the vector's name.
        requirements: identifiers in SPEC.md, separated by spaces.
        description: what is special about the file.
        files: contents by name; the first is the one to open.
        outcome: ``accept``, or ``reject:CODE``.
        stage: when the defect of a rejected file is found: ``open`` or ``verify``.
        contents: what an accepted file contains.
    """

    id: str
    requirements: str
    description: str
    files: Mapping[str, bytes]
    outcome: str
    stage: str = ""
    contents: Mapping[str, Any] | None = None


def accept(id: str, needed: str, what: str, content: Content, data: bytes = b"") -> Vector:
    """A valid file: ``data``, by default the packed ``content``."""
    files = {f"{id}.qmoe": data or content.pack()}
    return Vector(id, needed, what, files, "accept", contents=content.expected)


def reject(
    id: str, needed: str, code: str, what: str, data: bytes | Content, stage: str = "open"
) -> Vector:
    """A defective file."""
    files = {f"{id}.qmoe": data if isinstance(data, bytes) else data.pack()}
    return Vector(id, needed, what, files, f"reject:{code}", stage)


reject_extent = partial(reject, stage="verify")  # a bad extent is found when it is read, [C-1]
