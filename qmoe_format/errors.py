"""The package's one exception and one warning, and context managers that put errors into its form.

Every message reads ``WHERE: PROBLEM; ADVICE``. The modules that know bytes raise
``QMoEError(code, problem)``; whoever knows the file and the tensor wraps the call:
``with located("model.qmoe, tensor 'x'"): ...``.
"""

from __future__ import annotations

import errno
from typing import Any

_DAMAGED = "the file is damaged: get it again from its source"
_WRONG = "the program that wrote the file broke the format: report this to its author"
_TOO_NEW = "use a newer release of qmoe-format"

# The codes of SPEC.md section 1, each with what to do unless the error itself says.
FORMAT_CODES = {
    "signature": "give a .qmoe file, or the index file of a sharded one",
    "truncated": "copy or download it again, completely",
    "trailing": "copy or download it again; another program may have changed it",
    "checksum": _DAMAGED,
    "version": "use the release of qmoe-format that wrote it, or convert the model again",
    "feature": _TOO_NEW,
    "limit": _WRONG,
    "malformed": _WRONG,
    "duplicate": _WRONG,
    "padding": _WRONG,
    "unsupported": _TOO_NEW,
    "value": "quantize the model again from finite weights",
}
LIBRARY_CODES = frozenset(
    {
        "argument",  # a call's arguments do not fit each other or the file
        "not-found",  # no such tensor, expert, attachment or file
        "checkpoint",  # a checkpoint is incomplete, unreadable or of an unknown family
        "io",  # the operating system refused: disk full, no permission
        "dependency",  # an optional package is missing
        "device",  # no GPU, or one that is too old
        "memory",  # the GPU, or the machine, ran out of it
        "peer",  # another process that works on the same thing has ended
    }
)
_OS_ADVICE = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some of the quota or write elsewhere",
    errno.EFBIG: "raise the system's limit on file sizes, or write shards",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "write to another disk",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EMFILE: "close some files",
}


class QMoEError(ValueError):
    """An error with a stable code.

    Attributes:
        code: one of ``FORMAT_CODES`` or ``LIBRARY_CODES``.
        problem: what is wrong, and where.
        advice: what to do about it; by default that of the format code.

    Both are one line, in which control characters are escaped.
    """

    def __init__(self, code: str, problem: str, advice: str = "") -> None:
        assert code in FORMAT_CODES or code in LIBRARY_CODES, f"unknown error code {code!r}"
        self.code = code
        self.problem = problem = _printable(problem)
        self.advice = _printable(advice) or FORMAT_CODES.get(code, "")
        super().__init__(f"{problem}; {self.advice}" if self.advice else problem)

    def __reduce__(self) -> tuple[type[QMoEError], tuple[str, str, str]]:
        return type(self), (self.code, self.problem, self.advice)

    def at(self, where: str) -> QMoEError:
        """The same error, saying where it happened."""
        return QMoEError(self.code, f"{where}: {self.problem}", self.advice)


def _printable(text: str) -> str:
    """Names in a file, and what other libraries say of them, may hold commands to a terminal."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


class QMoEWarning(UserWarning):
    """Something that is no error, but that the caller may not have meant."""


class located:
    """Context manager: say where a file-format error raised inside happened."""

    # Not a generator: reading one expert enters this, and a class is entered three times as fast.
    __slots__ = ("where",)

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, QMoEError) and error.code in FORMAT_CODES:
            raise error.at(self.where).with_traceback(trace) from error.__cause__


class os_errors:
    """Context manager: turn an ``OSError`` raised inside into ``QMoEError("io")``.

    Args:
        action: what was being done, with the path: ``cannot write model.qmoe``.
    """

    __slots__ = ("action",)

    def __init__(self, action: str) -> None:
        self.action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            advice = _OS_ADVICE.get(error.errno or 0, "check the disk and try again")
            reason = error.strerror or str(error)
            raise QMoEError("io", f"{self.action}: {reason}", advice) from error
