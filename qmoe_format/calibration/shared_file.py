"""A file of which each rank writes a part; it appears when all parts are durable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from qmoe_format.atomic_file import PartialFile, sync_folder
from qmoe_format.calibration.ranks import Ranks, wait_for
from qmoe_format.errors import QMoEError, os_errors

Write: TypeAlias = Callable[[int, memoryview], None]
"""Write bytes at an offset."""


@contextmanager
def shared_write(path: Path, length: int, ranks: Ranks) -> Iterator[Write]:
    """A new file of ``length`` bytes; all ranks enter and leave this together.

    Parts must not overlap. The file appears as ``path``, to every rank, when the block has ended on
    all of them without an error.

    Raises:
        QMoEError: ``io``, also if it is another rank's; ``peer``.
    """
    files: list[PartialFile] = []  # rank 0's
    errors = os_errors(f"cannot write {path}")
    fd = -1

    def begin() -> Path:
        files.append(PartialFile(path))
        files[0].truncate(length)
        files[0].seal()
        return files[0].path

    def join() -> None:
        nonlocal fd
        if not wait_for(partial, partial.exists):
            raise _invisible(partial)
        # Only for writing, and when the file has its length: otherwise NFS may complete a page that
        # two ranks share with bytes that it has not read, or has read too early.
        with errors:
            fd = os.open(partial, os.O_WRONLY | getattr(os, "O_BINARY", 0))

    def write(offset: int, data: memoryview) -> None:
        with errors:
            while data:
                done = os.pwrite(fd, data[: 1 << 26], offset)
                data, offset = data[done:], offset + done

    def seal() -> None:
        nonlocal fd
        with errors:
            os.fsync(fd)
            os.close(fd)
            fd = -1

    def publish() -> None:
        files[0].publish()
        sync_folder(path.parent)

    def appeared() -> None:
        if not wait_for(path, lambda: path.exists() and path.stat().st_size == length):
            raise _invisible(path)

    try:
        partial = ranks.share(begin)
        ranks.settle(join)
        yield write
        ranks.settle(seal)
        ranks.share(publish)
        ranks.settle(appeared)
    except BaseException:
        for file in files:
            file.discard()
        raise
    finally:
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def _invisible(path: Path) -> QMoEError:
    return QMoEError(
        "io",
        f"{path}: another rank has written this file, but it is not to be seen here",
        "give all machines the same folder, such as one of a network file system",
    )
