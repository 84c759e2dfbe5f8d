"""How a model on the Hub is called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FORM = re.compile(
    r"(?P<repo>[a-z0-9][\w.-]*/[a-z0-9][\w.-]*)"
    r"(?:/(?P<file>[^@]+\.qmoe(?:\.json)?))?"
    r"(?:@(?P<revision>.+))?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class HubName:
    """``ORG/MODEL``, ``ORG/MODEL@REVISION`` or ``ORG/MODEL/FILE.qmoe@REVISION``.

    Attributes:
        given: all of it; what ``str`` returns.
        repo: ``ORG/MODEL``.
        file: the path of a file in the repository.
        revision: a branch, tag or commit; None for the default branch.
    """

    given: str
    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.given


def parse_name(source: str | Path) -> HubName | None:
    """The parts of a name, or None of what can only be a path.

    Example:
        >>> parse_name("org/model@v2")
        HubName(given='org/model@v2', repo='org/model', file=None, revision='v2')
        >>> parse_name("./org/model"), parse_name("folder/model.qmoe")
        (None, None)
    """
    given = str(source)
    match = _FORM.fullmatch(given)
    # FOLDER/FILE.qmoe has the form of ORG/MODEL, but is a path with an error more often.
    if match is None or (match["repo"] == given and given.endswith((".qmoe", ".qmoe.json"))):
        return None
    return HubName(given, **match.groupdict())
