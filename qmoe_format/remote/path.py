"""The path of a file elsewhere: what the package uses of ``pathlib.Path``, and ranges of bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from qmoe_format.errors import QMoEError
from qmoe_format.machine import require

_URL = re.compile(r"[A-Za-z][\w+.-]*(::[\w+.-]+)*://")


class RemotePath:
    """The file or folder of a URL. Methods raise ``QMoEError``: ``not-found``, ``io``.

    Args:
        url: with a scheme.

    Attributes:
        fs: fsspec's file system.
        key: what the file system calls the file.

    Raises:
        QMoEError: ``dependency`` if fsspec, or what it needs for the scheme, is missing;
            ``argument`` if it does not know the scheme, or the rest is no URL.
    """

    def __init__(self, url: str) -> None:
        require("fsspec", extra="remote")
        from fsspec.core import url_to_fs

        self._url = url if url.endswith("://") else url.rstrip("/")
        with remote_errors(f"cannot use {url}"):
            # A remembered listing could be older than what another program has written.
            fs, key = url_to_fs(self._url, use_listings_cache=False)
        self.fs: Any = fs
        self.key = str(key)

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __lt__(self, other: RemotePath) -> bool:
        return self._url < other._url

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(f"{self._url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self._url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """What follows the last dot of the name, with it."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(self._url[: -len(self.name)])

    def with_name(self, name: str) -> RemotePath:
        """A file beside it."""
        return RemotePath(self._url[: -len(self.name)] + name)

    def absolute(self) -> RemotePath:
        """The same."""
        return self

    def size(self) -> int:
        """Bytes of the file."""
        info = self._info()
        if info.get("type") != "file" or info.get("size") is None:
            raise QMoEError("io", f"{self}: not a file", "give the URL of a file")
        return int(info["size"])

    def identity(self) -> str:
        """A hash that is another one when the file has changed; reads nothing of it."""
        with remote_errors(f"cannot read {self}"):
            return str(self.fs.ukey(self.key))

    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there is such a folder; object stores have it if something is in it."""
        return self._kind() == "directory"

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in the folder; nothing if there is none."""
        try:
            with remote_errors(f"cannot list {self}"):
                found = self.fs.ls(self.key, detail=False)
        except QMoEError as error:
            if error.code != "not-found":
                raise
            return
        # Without what a file, or an object with the name of the folder, says of itself.
        inside = {str(each).rstrip("/") for each in found} - {self.key.rstrip("/")}
        for name in sorted(each.rpartition("/")[2] for each in inside):
            yield self / name

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What is in the folder under names that fit."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def read(self, offset: int, length: int) -> bytes:
        """A range of bytes, in one request."""
        return self.read_ranges([(offset, length)])[0]

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Ranges of bytes, offsets and lengths, in a request for each, several at a time.

        Raises:
            QMoEError: ``truncated`` if the file ends before; ``not-found``, ``io``.
        """
        wanted = [(offset, offset + length) for offset, length in ranges if length]
        try:
            with remote_errors(f"cannot read {self}"):
                if len(wanted) == 1:
                    start, end = wanted[0]
                    found = [self.fs.cat_file(self.key, start=start, end=end, **self._exactly())]
                else:
                    keys, starts = [self.key] * len(wanted), [start for start, _ in wanted]
                    ends = [end for _, end in wanted]
                    options = {"on_error": "raise", **self._exactly()}
                    found = self.fs.cat_ranges(keys, starts, ends, **options)
        except QMoEError as error:
            # What lies beyond the end is refused in words that differ from server to server.
            if error.code != "io" or not self._ends_before(max(end for _, end in wanted)):
                raise
            raise self._truncated() from error
        if any(len(part) != end - start for part, (start, end) in zip(found, wanted, strict=True)):
            raise self._truncated()
        parts = iter(found)
        return [bytes(next(parts)) if length else b"" for _, length in ranges]

    def read_bytes(self) -> bytes:
        """All of it."""
        with remote_errors(f"cannot read {self}"):
            return bytes(self.fs.cat_file(self.key))

    def read_text(self, encoding: str) -> str:
        """All of it."""
        return self.read_bytes().decode(encoding)

    def _exactly(self) -> dict[str, str]:
        """Keeps fsspec from reading megabytes ahead, where it opens a file for each range."""
        from fsspec import AbstractFileSystem

        # Asynchronous ones have another method in its place.
        opens = not self.fs.async_impl and type(self.fs).cat_file is AbstractFileSystem.cat_file
        return {"cache_type": "none"} if opens else {}

    def _ends_before(self, end: int) -> bool:
        try:
            return self.size() < end
        except QMoEError:
            return False

    def _truncated(self) -> QMoEError:
        return QMoEError("truncated", f"{self}: the file ends before what it should contain")

    def _kind(self) -> str | None:
        try:
            return str(self._info().get("type"))
        except QMoEError as error:
            if error.code != "not-found":
                raise
            return None

    def _info(self) -> Mapping[str, Any]:
        with remote_errors(f"cannot read {self}"):
            info: Mapping[str, Any] = self.fs.info(self.key)
        return info


Location: TypeAlias = Path | RemotePath
AnyLocation = TypeVar("AnyLocation", Path, RemotePath, Location)


def location(path: str | os.PathLike[str] | RemotePath) -> Location:
    """Where a path or URL leads; ``file://`` leads to a path of this machine.

    Raises:
        QMoEError: as from ``RemotePath``.

    Example:
        >>> location("folder/model.qmoe"), location("file:///folder/a%20b.qmoe")
        (PosixPath('folder/model.qmoe'), PosixPath('/folder/a b.qmoe'))
    """
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if not isinstance(path, str) or not _URL.match(text):
        return Path(text)
    if text.endswith("://"):
        raise QMoEError("argument", f"{text}: names no file", "add the rest of the URL")
    if text.lower().startswith("file://"):
        from urllib.request import url2pathname  # slow to import

        return Path(url2pathname(urlsplit(text).path))
    return RemotePath(text)


class remote_errors:
    """Context manager: what fsspec and the packages under it raise becomes a ``QMoEError``.

    Args:
        action: what was being done, with the URL: ``cannot read s3://bucket/model.qmoe``.
    """

    __slots__ = ("action",)

    def __init__(self, action: str) -> None:
        self.action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, QMoEError | MemoryError):
            code, advice = _explained(error)
            reason = str(error) or type(error).__name__
            if code == "not-found" and " " not in reason:  # but the path, once more
                reason = "there is no such file"
            raise QMoEError(code, f"{self.action}: {reason:.400}", advice) from error


def _explained(error: Exception) -> tuple[str, str]:
    """Code and advice. Packages have exceptions of their own: what is not known is ``io``."""
    name = type(error).__name__
    if isinstance(error, ImportError):
        return "dependency", "install it; for s3 run: pip install 'qmoe-format[remote]'"
    if isinstance(error, FileNotFoundError):
        return "not-found", "check the URL"
    if isinstance(error, PermissionError) or "Credential" in name:
        return "io", "check the permissions, and the keys in the environment"
    if name in ("ValueError", "ParamValidationError"):
        return "argument", "check the URL"
    return "io", "check the network and try again"
