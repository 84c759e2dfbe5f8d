"""Files that appear under their name only once they are complete (SPEC.md [W-2]).

A ``PartialFile`` is written as ``.NAME.XXXXXXXX.partial`` in the same folder, made durable, then
renamed. A process that is killed leaves that file behind and nothing else; whatever had the final
name is untouched. For files elsewhere see ``remote``.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.remote import Location, RemotePath, location
from qmoe_format.remote.upload import Upload, new_upload

_FLAGS = (
    os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_WRITE_BYTES = 1 << 26  # per system call; Linux accepts less than 2 GiB


def check_target(path: str | os.PathLike[str] | RemotePath) -> Location:
    """Where a file of this name would be written, symbolic links followed.

    Raises:
        QMoEError: ``argument`` if something other than a file has that name; ``io``; for a URL as
            from ``RemotePath``.
    """
    place = location(path)
    if isinstance(place, RemotePath):
        return place
    target = Path(os.path.realpath(place))
    with os_errors(f"cannot write {target}"):
        if target.exists() and not target.is_file():
            raise QMoEError("argument", f"{target} exists and is not a file", "give another name")
    return target


class PartialFile:
    """A new file that does not have its final name yet.

    After an operation that failed, call ``discard``. All methods raise ``QMoEError``: ``io``.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.length = 0
        name = f".{target.name[:200]}.{secrets.token_hex(4)}.partial"
        self._path = target.with_name(name)
        self._errors = os_errors(f"cannot write {target}")
        with self._errors:
            self._fd = os.open(self._path, _FLAGS, 0o666)

    @property
    def path(self) -> Path:
        """Where it lies until it is published."""
        return self._path

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``: bytes, one-dimensional."""
        with self._errors:
            self._write_all(data)
            self.length += len(data)

    def overwrite(self, data: bytes) -> None:
        """Replace the first bytes of the file."""
        with self._errors:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._write_all(data)
            os.lseek(self._fd, self.length, os.SEEK_SET)

    def _write_all(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest[:_WRITE_BYTES]) :]

    def truncate(self, length: int) -> None:
        """Cut the file back to ``length`` bytes."""
        with self._errors:
            os.ftruncate(self._fd, length)
            os.lseek(self._fd, length, os.SEEK_SET)
            self.length = length

    def settle(self) -> None:
        """Promise not to truncate what has been written so far."""

    def seal(self) -> None:
        """Make the file durable and close it; only ``publish`` and ``discard`` may follow."""
        with self._errors:
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)

    def publish(self, target: Path | None = None) -> None:
        """Rename the file to ``target``, in the same folder, replacing what has that name."""
        self.target = target or self.target
        with self._errors:
            self._path.replace(self.target)

    def discard(self) -> None:
        """Close and delete the file. Does not raise."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def partial_files(target: Path) -> list[Path]:
    """What killed processes left behind of a file of this name."""
    target = Path(os.path.realpath(target))
    random = "[0-9a-f]" * 8
    return sorted(target.parent.glob(f".{glob.escape(target.name[:200])}.{random}.partial"))


def partial_file(target: Location, *, renamed: bool = False) -> PartialFile | Upload:
    """Begin a file.

    Args:
        renamed: whether ``publish`` will be called with another path.

    Raises:
        QMoEError: ``io``; ``not-found`` if it is elsewhere, and there is no such bucket.
    """
    if isinstance(target, RemotePath):
        return new_upload(target, renamed=renamed)
    return PartialFile(target)


@contextlib.contextmanager
def atomic_write(path: Location) -> Iterator[PartialFile | Upload]:
    """A new file to write; it appears as ``path``, durable, when the block ends without an error.

    Raises:
        QMoEError: ``io``.
    """
    file = partial_file(path)
    try:
        yield file
        file.seal()
        file.publish()
    except BaseException:
        file.discard()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Location) -> None:
    """Make renames in ``folder`` durable, where the system lets a folder be opened."""
    if os.name == "nt" or isinstance(folder, RemotePath):
        return
    with os_errors(f"cannot write to the folder {folder}"):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
