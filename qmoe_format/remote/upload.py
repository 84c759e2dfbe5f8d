"""New files elsewhere, which appear under their names only once they are complete.

S3 takes a file in parts, in any order, and shows it when it is told that all are there: so parts
are sent while the file is being written, and no copy of it lies here. Other file systems get it
from a temporary file, under another name, and then rename it.

A process that is killed may leave parts, which S3 can be told to remove after some days, or a file
``.NAME.XXXXXXXX.partial``.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from qmoe_format.errors import os_errors
from qmoe_format.remote.path import RemotePath, remote_errors

_PART = 1 << 25  # bytes; S3 takes no less than 5 MiB, and 10 000 parts


def new_upload(target: RemotePath, *, renamed: bool = False) -> Upload:
    """Begin a file.

    Args:
        renamed: whether ``publish`` will be called with another path.

    Raises:
        QMoEError: ``not-found`` if there is no such bucket; ``io``.
    """
    protocol = target.fs.protocol
    s3 = "s3" in ((protocol,) if isinstance(protocol, str) else protocol)
    return S3Upload(target, renamed) if s3 else StagedUpload(target)


class Upload(ABC):
    """The counterpart of ``atomic_file.PartialFile``, which says what the methods do."""

    def __init__(self, target: RemotePath, renamed: bool) -> None:
        self.target = target
        self.length = 0
        self._fs = target.fs
        self._renamed = renamed
        name = f".{target.name[:200]}.{secrets.token_hex(4)}.partial"
        self._place = target.with_name(name) if renamed else target
        self._there = False  # all of it, at ``_place``
        self._errors = remote_errors(f"cannot write {target}")

    @abstractmethod
    def write(self, data: bytes | memoryview) -> None: ...

    @abstractmethod
    def overwrite(self, data: bytes) -> None: ...

    @abstractmethod
    def truncate(self, length: int) -> None: ...

    @abstractmethod
    def settle(self) -> None: ...

    @abstractmethod
    def seal(self) -> None: ...

    def publish(self, target: RemotePath | None = None) -> None:
        """Give it the name ``target``, in the same folder, replacing what has that name."""
        self.target = target or self.target
        with self._errors:
            self._fs.mv(self._place.key, self.target.key)
        self._there = False

    def discard(self) -> None:
        """Remove what there is of it. Does not raise."""
        if self._there and self._renamed:
            with contextlib.suppress(Exception):
                self._fs.rm_file(self._place.key)
            self._there = False


class S3Upload(Upload):
    """Sent in parts. The first one comes last, because a file's first bytes are written last.

    What lies between it and the last call of ``settle`` has been sent but for the rest of a part.
    """

    def __init__(self, target: RemotePath, renamed: bool) -> None:
        super().__init__(target, renamed)
        self._first, self._rest = bytearray(), bytearray()
        self._parts: dict[int, str] = {}
        with self._errors:
            bucket, key, _ = self._fs.split_path(self._place.key)
            self._object = {"Bucket": bucket, "Key": key}
            answer = self._fs.call_s3("create_multipart_upload", **self._object)
        self._object["UploadId"] = answer["UploadId"]

    def write(self, data: bytes | memoryview) -> None:
        room = _PART - len(self._first)
        self._first += data[:room]
        self._rest += data[room:]
        self.length += len(data)

    def overwrite(self, data: bytes) -> None:
        self._first[: len(data)] = data

    def truncate(self, length: int) -> None:
        cut = self.length - length
        assert cut <= len(self._rest) or not self._parts, "these bytes are settled"
        of_rest = min(cut, len(self._rest))
        del self._rest[len(self._rest) - of_rest :]
        del self._first[len(self._first) - (cut - of_rest) :]
        self.length = length

    def settle(self) -> None:
        size = max(_PART, self.length >> 10)  # so that the parts suffice for 5 TiB
        while len(self._rest) >= size:
            self._send(len(self._parts) + 2, self._rest[:size])
            del self._rest[:size]

    def seal(self) -> None:
        self.settle()
        if self._rest:
            self._send(len(self._parts) + 2, self._rest)
        self._send(1, self._first)
        self._first, self._rest = bytearray(), bytearray()
        if self._renamed:
            self._complete()

    def publish(self, target: RemotePath | None = None) -> None:
        if self._renamed:
            super().publish(target)
        else:
            self._complete()

    def discard(self) -> None:
        if not self._there:
            with contextlib.suppress(Exception):
                self._fs.call_s3("abort_multipart_upload", **self._object)
        super().discard()

    def _send(self, number: int, data: bytearray) -> None:
        with self._errors:
            answer = self._call("upload_part", PartNumber=number, Body=bytes(data))
        self._parts[number] = answer["ETag"]

    def _complete(self) -> None:
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in sorted(self._parts.items())]
        with self._errors:
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        self._there = True

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._fs.call_s3(method, **self._object, **arguments)


class StagedUpload(Upload):
    """Lies in a temporary file until it is sealed."""

    def __init__(self, target: RemotePath) -> None:
        super().__init__(target, renamed=True)
        self._os_errors = os_errors(f"cannot write a temporary file for {target}")
        with self._os_errors:
            self._folder = tempfile.TemporaryDirectory(prefix="qmoe-")
            self._path = Path(self._folder.name, "file")
            self._file = self._path.open("w+b", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        with self._os_errors:
            while rest:
                rest = rest[self._file.write(rest) :]
        self.length += len(data)

    def overwrite(self, data: bytes) -> None:
        with self._os_errors:
            self._file.seek(0)
            self._file.write(data)
            self._file.seek(self.length)

    def truncate(self, length: int) -> None:
        with self._os_errors:
            self._file.seek(self._file.truncate(length))
        self.length = length

    def settle(self) -> None:
        pass

    def seal(self) -> None:
        self._file.close()
        self._there = True  # perhaps in part
        with self._errors:
            self._fs.put_file(str(self._path), self._place.key)
        self._folder.cleanup()

    def discard(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._folder.cleanup()
        super().discard()
