"""Where a reader's bytes come from: a file that is mapped into memory, or read.

What is elsewhere has ``remote_source``.

Every byte that the reader looks at passes through ``FileSource.view``.

Mapping has a trap: if another process shortens the file, touching a page beyond the new end kills
this process with SIGBUS, and a check does not help if it happens just before the touch.
``FileSource`` asks for the file's length before each view, so a file that has changed is reported
as ``truncated`` or ``trailing``. Two risks remain: a file shortened after a view was handed out
(the arrays of ``raw`` tensors and of encoded matrices are such views), and an I/O error of the disk
under the mapping. With ``memory_map=False`` every view is a copy made by ``pread``, and neither can
happen.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qmoe_format.container.direct_file import DirectFile
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError, os_errors

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class FileSource:
    """A regular file, mapped into memory or read piece by piece.

    Attributes:
        path: where it is.
        length: bytes it had when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, memory_map: bool = True) -> None:
        self.path = Path(path)
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._bytes: Bytes | None = None
        self._direct: DirectFile | None = None
        self._lock = threading.Lock()
        self._errors = os_errors(f"cannot read {self.path}")
        with self._errors:
            try:
                # Asked by name first: opening a named pipe would wait for its other end.
                regular = stat.S_ISREG(self.path.stat().st_mode)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise QMoEError(
                    "not-found", f"{self.path}: there is no such file", "check the path"
                ) from error
            if not regular:
                raise QMoEError("io", f"{self.path}: not a regular file", "give the path of a file")
            self._fd = os.open(self.path, _FLAGS)
            try:
                self.length = os.fstat(self._fd).st_size
                if memory_map and self.length:  # an empty file cannot be mapped
                    self._map = mmap.mmap(self._fd, self.length, access=mmap.ACCESS_READ)
                    self._bytes = np.frombuffer(self._map, np.uint8)
            except BaseException:
                os.close(self._fd)
                raise

    def view(self, offset: int, length: int) -> Bytes:
        """Bytes ``offset`` to ``offset + length``, which are within the file, read-only.

        Raises:
            QMoEError: ``truncated`` or ``trailing`` if the file's length has changed; ``io``;
                ``argument`` if it is closed.
        """
        self._check_open()
        with self._errors:
            return self._view(offset, length)

    def views(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """Several views."""
        return [self.view(offset, length) for offset, length in ranges]

    def read(self, offset: int, length: int) -> tuple[Bytes, int]:
        """The same bytes as ``view``, past the system's page cache into memory of their own.

        Returns:
            The bytes, and how many were read from the disk for them.

        Raises:
            QMoEError: as ``view``.
        """
        self._check_open()
        with self._errors:
            self._check_length()
            if not hasattr(os, "preadv"):
                return self._view(offset, length).copy(), length
            with self._lock:
                self._direct = self._direct or DirectFile(self._fd)
            return self._direct.read(offset, length)

    def _check_open(self) -> None:
        if self._fd < 0:
            raise QMoEError("argument", f"{self.path}: the file is closed", "open it again")

    def _check_length(self) -> None:
        now = os.fstat(self._fd).st_size
        if now != self.length:
            raise QMoEError(
                "truncated" if now < self.length else "trailing",
                f"the file has {now} bytes, but had {self.length} when it was opened",
            )

    def _view(self, offset: int, length: int) -> Bytes:
        self._check_length()
        if self._bytes is not None:
            return self._bytes[offset : offset + length]
        out = np.empty(length, np.uint8)
        done = 0
        while done < length:
            # A call may read less than asked for, on Linux never more than 2 GiB.
            part = os.pread(self._fd, min(length - done, 1 << 24), offset + done)
            if not part:
                raise QMoEError("truncated", f"the file ends at byte {offset + done}")
            out[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        out.flags.writeable = False
        return out

    def release(self, offset: int, length: int) -> None:
        """Drop these bytes from memory; reading them again is slower."""
        if self._map is None or not hasattr(self._map, "madvise"):
            return
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (offset + length - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, whole)

    def close(self) -> None:
        """Hand out no further view; arrays already handed out stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        self._bytes = None
        if self._map is not None:
            # Fails while arrays use the mapping: then it goes with the last of them.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
