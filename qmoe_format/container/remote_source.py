"""A reader's bytes from elsewhere, by ranges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qmoe_format.container.preamble import PREAMBLE_LENGTH
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError
from qmoe_format.remote import RemotePath


class RemoteSource:
    """A file that is read by requests of ranges; the counterpart of ``FileSource``.

    Each view is one request, but the first bytes, which a reader looks at several times, are kept.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self.length = path.size()
        self._head = path.read(0, min(PREAMBLE_LENGTH, self.length))
        self._open = True

    def view(self, offset: int, length: int) -> Bytes:
        """As ``FileSource.view``; what has changed is found if it does not fit the checksums."""
        return self.views([(offset, length)])[0]

    def views(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """Several views; the requests for them run at the same time."""
        if not self._open:
            raise QMoEError("argument", f"{self.path}: the file is closed", "open it again")
        if all(offset + length <= len(self._head) for offset, length in ranges):
            found = [self._head[offset : offset + length] for offset, length in ranges]
        else:
            found = self.path.read_ranges(ranges)
        return [np.frombuffer(each, np.uint8) for each in found]

    def read(self, offset: int, length: int) -> tuple[Bytes, int]:
        """As ``FileSource.read``, in one request."""
        return self.view(offset, length), length

    def release(self, offset: int, length: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Hand out no further view; arrays already handed out stay valid."""
        self._open = False
