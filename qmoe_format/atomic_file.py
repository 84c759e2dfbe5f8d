"""Files that appear under their name only when they are whole (SPEC.md [W-2]).

A ``PartialFile`` is written as ``.NAME.XXXXXXXX.partial`` in the same folder, made durable, then
renamed. A process that is killed leaves that file behind and nothing else; what stood under the
final name is as it was.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from qmoe_format.errors import QMoEError
from qmoe_format.located import os_errors

_FLAGS = (
    os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_PIECE = 1 << 26  # the most that is given to one system call; Linux takes less than 2 GiB


def check_target(path: str | os.PathLike[str]) -> Path:
    """Where a file of this name would be written, links followed.

    Raises ``QMoEError``: ``argument`` if something that is no file stands there, ``io``.
    """
    target = Path(os.path.realpath(path))
    with os_errors(f"cannot write {target}"):
        if target.exists() and not target.is_file():
            raise QMoEError("argument", f"{target} is there and is not a file: give another name")
    return target


class PartialFile:
    """A new file without its final name. After an operation that failed, ``discard`` it.

    All methods raise ``QMoEError("io")``.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.length = 0
        name = f".{target.name[:200]}.{secrets.token_hex(4)}.partial"
        self._path = target.with_name(name)
        self._failure = os_errors(f"cannot write {target}")
        with self._failure:
            self._fd = os.open(self._path, _FLAGS, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``: bytes, in one dimension."""
        with self._failure:
            self._write_all(data)
            self.length += len(data)

    def overwrite(self, data: bytes) -> None:
        """Put ``data`` over the file's beginning; it is short."""
        with self._failure:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._write_all(data)
            os.lseek(self._fd, self.length, os.SEEK_SET)

    def _write_all(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest[:_PIECE]) :]

    def truncate(self, length: int) -> None:
        """Go back to ``length`` bytes."""
        with self._failure:
            os.ftruncate(self._fd, length)
            os.lseek(self._fd, length, os.SEEK_SET)
            self.length = length

    def seal(self) -> None:
        """Make it durable and close it; only ``publish`` and ``discard`` may follow."""
        with self._failure:
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)

    def publish(self, target: Path | None = None) -> None:
        """Rename it to ``target`` (same folder), replacing what is there."""
        self.target = target or self.target
        with self._failure:
            self._path.replace(self.target)

    def discard(self) -> None:
        """Close and delete it; does not raise."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def partial_files(target: Path) -> list[Path]:
    """What processes that were killed left of a file of this name."""
    target = Path(os.path.realpath(target))
    random = "[0-9a-f]" * 8
    return sorted(target.parent.glob(f".{glob.escape(target.name[:200])}.{random}.partial"))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[PartialFile]:
    """A new file to write; it is durable, under its name, when the block has ended well."""
    file = PartialFile(path)
    try:
        yield file
        file.seal()
        file.publish()
    except BaseException:
        file.discard()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable; where a folder cannot be opened, nothing is done."""
    if os.name == "nt":
        return
    with os_errors(f"cannot write to the folder {folder}"):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
