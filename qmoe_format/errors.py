"""The one exception type of the package.

``QMoEError`` is a ``ValueError`` whose ``code`` is stable and whose message says what is wrong,
where, and what to do. Codes of the file format are those of SPEC.md section 1; the others belong to
the library around it.
"""

from __future__ import annotations

FORMAT_CODES = frozenset(
    {
        "signature",
        "truncated",
        "trailing",
        "checksum",
        "version",
        "feature",
        "limit",
        "malformed",
        "duplicate",
        "padding",
        "unsupported",
        "value",
    }
)
LIBRARY_CODES = frozenset(
    {
        "argument",  # a call's arguments do not fit each other or the file
        "not-found",  # no such tensor, expert, attachment or file
        "checkpoint",  # a checkpoint that is incomplete, unreadable or of an unknown family
        "io",  # the operating system refused: disk full, permission
        "dependency",  # an optional package is needed for this
        "device",  # no GPU, or one that is too old
        "memory",  # a GPU, or the machine, has not enough of it
    }
)


class QMoEError(ValueError):
    """An error with a stable ``code``: one of ``FORMAT_CODES`` or ``LIBRARY_CODES``."""

    def __init__(self, code: str, message: str) -> None:
        if code not in FORMAT_CODES and code not in LIBRARY_CODES:
            raise AssertionError(f"unknown error code {code!r}")
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[QMoEError], tuple[str, str]]:
        return type(self), (self.code, str(self))
