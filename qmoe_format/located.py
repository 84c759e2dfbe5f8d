"""Say in an error where it happened and what to do about it.

The modules that know bytes raise ``QMoEError(code, what)``; whoever knows the file and the tensor
wraps the call: ``with located("model.qmoe, tensor 'x'"): ...``.
"""

from __future__ import annotations

import errno
from types import TracebackType

from qmoe_format.errors import FORMAT_CODES, QMoEError

_DAMAGED = "the file is damaged: get it again from where it came"
_WRONG = "whatever wrote the file broke the format: report it to its author"
ADVICE = {
    "signature": "give a .qmoe file, or the text file of a sharded one",
    "truncated": "copy or download it again, completely",
    "trailing": "copy or download it again; another program may have changed it",
    "checksum": _DAMAGED,
    "version": "use the release of qmoe-format that wrote it, or convert the model again",
    "feature": "a newer release of qmoe-format is needed",
    "limit": _WRONG,
    "malformed": _WRONG,
    "duplicate": _WRONG,
    "padding": _WRONG,
    "unsupported": "a newer release of qmoe-format is needed",
    "value": "quantize the model again from weights that are finite",
}
_OS_ADVICE = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some of the quota or write elsewhere",
    errno.EFBIG: "the system limits the size of a file: raise the limit or write shards",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "write to another disk",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EMFILE: "close some files",
}


class located:
    """Context manager: complete the message of a file-format error raised inside."""

    __slots__ = ("where",)

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, QMoEError) and error.code in FORMAT_CODES:
            raise QMoEError(
                error.code, f"{error}, {self.where}: {ADVICE[error.code]}"
            ).with_traceback(trace) from error.__cause__


class os_errors:
    """Context manager: an ``OSError`` raised inside becomes ``QMoEError("io")``.

    ``what`` says what was being done, with the path: ``cannot write model.qmoe``.
    """

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            advice = _OS_ADVICE.get(error.errno or 0, "check the disk and try again")
            reason = error.strerror or str(error)
            raise QMoEError("io", f"{self.what}, {reason}: {advice}") from error
