"""Where a reader's bytes come from: a mapped file, a file that is read, or bytes in memory.

Every byte that the reader looks at passes through ``ByteSource.view``.

A mapped file that another process shortens is a trap: touching a page beyond the new end kills the
process with SIGBUS, and no check can come between a check and the touch. ``FileSource`` asks for
the file's length before each view, so a file that has changed is reported as ``truncated`` or
``trailing``. What remains: a file shortened after a view was handed out (the arrays of ``raw``
tensors and of encoded matrices are such views), and an I/O error of the disk under the mapping.
With ``memory_map=False`` every view is a copy made by ``pread``, and neither can happen.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path
from typing import Protocol

import numpy as np

from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError, os_errors


class ByteSource(Protocol):
    """A fixed number of bytes with random access."""

    @property
    def name(self) -> str:
        """What to call it in an error message."""

    @property
    def length(self) -> int:
        """Bytes there were when it was opened."""

    def view(self, offset: int, length: int) -> Bytes:
        """Bytes ``offset`` to ``offset + length``, read-only; the caller keeps within ``length``.

        Raises ``QMoEError``: ``truncated`` or ``trailing`` if the length has changed, ``io``.
        """

    def release(self, offset: int, length: int) -> None:
        """These bytes will not be needed again soon: their memory may go."""

    def close(self) -> None:
        """No further view; arrays that were handed out stay valid."""


class FileSource:
    """A regular file, mapped into memory or read piece by piece."""

    def __init__(self, path: str | os.PathLike[str], *, memory_map: bool = True) -> None:
        self.path = Path(path)
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._bytes: Bytes | None = None
        with os_errors(f"cannot read {self.path}"):
            try:
                # Asked by name first: opening a named pipe would wait for its other end.
                regular = stat.S_ISREG(self.path.stat().st_mode)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise QMoEError(
                    "not-found", f"there is no file {self.path}: check the path"
                ) from error
            if not regular:
                raise QMoEError("io", f"{self.path} is not a regular file: give the path of one")
            self._fd = os.open(self.path, os.O_RDONLY | _FLAGS)
            try:
                self._length = os.fstat(self._fd).st_size
                if memory_map and self._length:  # nothing cannot be mapped
                    self._map = mmap.mmap(self._fd, self._length, access=mmap.ACCESS_READ)
                    self._bytes = np.frombuffer(self._map, np.uint8)
            except BaseException:
                os.close(self._fd)
                raise

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def length(self) -> int:
        return self._length

    def view(self, offset: int, length: int) -> Bytes:
        if self._fd < 0:
            raise QMoEError("argument", f"{self.path} is closed: open it again")
        with os_errors(f"cannot read {self.path}"):
            now = os.fstat(self._fd).st_size
            if now != self._length:
                raise QMoEError(
                    "truncated" if now < self._length else "trailing",
                    f"the file has {now} bytes, it had {self._length} when it was opened",
                )
            if self._bytes is not None:
                return self._bytes[offset : offset + length]
            return self._read(offset, length)

    def _read(self, offset: int, length: int) -> Bytes:
        out = np.empty(length, np.uint8)
        done = 0
        while done < length:
            # A system may read less than asked, Linux at most 2 GiB in one call.
            part = os.pread(self._fd, min(length - done, 1 << 24), offset + done)
            if not part:
                raise QMoEError("truncated", f"the file ends at byte {offset + done}")
            out[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        out.flags.writeable = False
        return out

    def release(self, offset: int, length: int) -> None:
        if self._map is None or not hasattr(self._map, "madvise"):
            return
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (offset + length - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, whole)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._bytes = None
        if self._map is not None:
            # Where arrays still look at it, the last of them takes it along.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None


class BytesSource:
    """Bytes in memory, for tests and for files inside other files."""

    def __init__(self, data: bytes, name: str = "bytes in memory") -> None:
        self._name = name
        self._bytes: Bytes = np.frombuffer(data, np.uint8)

    @property
    def name(self) -> str:
        return self._name

    @property
    def length(self) -> int:
        return self._bytes.size

    def view(self, offset: int, length: int) -> Bytes:
        return self._bytes[offset : offset + length]

    def release(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass


_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
