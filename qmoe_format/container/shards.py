"""Models in several files: the text file that names the shards, and reading them (section 8).

``open`` takes either kind of file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format.container import canonical_json, limits
from qmoe_format.container.byte_source import ByteSource, FileSource
from qmoe_format.container.entries import AttachmentEntry, TensorEntry
from qmoe_format.container.index import check_file_name, fields
from qmoe_format.container.preamble import PREAMBLE_LENGTH, VERSION
from qmoe_format.container.reader import Progress, QMoEFile
from qmoe_format.errors import QMoEError, located

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary, EncodedMatrix

FORMAT = "qmoe-shards"
BEGINNING = b'{"format":"qmoe-shards"'
_TOP = {"format": str, "shards": list, "version": list}
_SHARD = {"bytes": int, "file": str, "preamble_crc32": int}


@dataclass(frozen=True, slots=True)
class Shard:
    """One line of the text file: a shard's name in the same folder, its length and checksum."""

    file: str
    bytes: int
    preamble_crc32: int


def dump_shards(shards: Sequence[Shard]) -> bytes:
    """The text file of these shards. [S-1]"""
    return canonical_json.dumps(
        {
            "format": FORMAT,
            "shards": [
                {"bytes": each.bytes, "file": each.file, "preamble_crc32": each.preamble_crc32}
                for each in shards
            ],
            "version": list(VERSION),
        }
    )


def parse_shards(text: npt.NDArray[np.uint8]) -> list[Shard]:
    """Check a text file; ``QMoEError``: ``malformed``, ``version``, ``limit``, ``duplicate``."""
    top = fields(canonical_json.loads(text), "the list of shards", _TOP)
    if top["format"] != FORMAT:  # [S-1]
        raise QMoEError("malformed", f"the format is {top['format'][:80]!r}, not {FORMAT!r}")
    version = top["version"]
    if len(version) != 2 or any(type(number) is not int for number in version):
        raise QMoEError("malformed", "the version is not a major and a minor number")
    if tuple(version) != VERSION:  # [P-4]
        raise QMoEError("version", f"the shards are of version {version[0]}.{version[1]}")
    limits.check("number of shards", len(top["shards"]), 0, limits.ENTRIES)
    shards = [Shard(**fields(record, "a shard", _SHARD)) for record in top["shards"]]
    for each in shards:
        check_file_name(each.file)  # [S-2]
    _check_unique([each.file for each in shards], "shards")
    return shards


def open(
    path: str | os.PathLike[str], *, checksums: bool = True, memory_map: bool = True
) -> QMoEFile | ShardedFile:
    """Open a ``.qmoe`` file, or all shards that a text file names.

    ``checksums=False``: reading does not compare extents with their CRC-32.
    ``memory_map=False``: bytes are read, not mapped; slower, but nothing that another process does
    to the file can end this one (see ``qmoe_format.container.byte_source``).

    Raises ``QMoEError``: a code of SPEC.md section 1, ``not-found`` or ``io``.
    """
    source = FileSource(path, memory_map=memory_map)
    try:
        with located(source.name):
            head = source.view(0, min(len(BEGINNING), source.length)).tobytes()
    except BaseException:
        source.close()
        raise
    if head == BEGINNING:
        return ShardedFile(source, checksums=checksums, memory_map=memory_map)
    return QMoEFile(source, checksums=checksums)


class ShardedFile:
    """Several files that read as one; the interface of ``QMoEFile``.

    ``shards``: the open files. Raises ``QMoEError`` as ``QMoEFile`` does, further ``truncated`` for
    a missing shard, ``checksum`` for one of another model, ``duplicate``.
    """

    def __init__(
        self, source: ByteSource, *, checksums: bool = True, memory_map: bool = True
    ) -> None:
        self.path = source.name
        self.shards: list[QMoEFile] = []
        try:
            with located(self.path):
                limits.check("length of the list of shards", source.length, *limits.INDEX_LENGTH)
                listed = parse_shards(source.view(0, source.length))
            for shard in listed:
                with located(self.path):
                    part = _open_shard(Path(self.path).parent / shard.file, shard, memory_map)
                self.shards.append(QMoEFile(part, checksums=checksums))
            with located(self.path):
                self._tensors = _merge([each.tensors for each in self.shards], "tensors")
                self._attachments = _merge([e.attachments for e in self.shards], "attachments")
        except BaseException:
            self.close()
            raise
        finally:
            source.close()
        self._length = source.length + sum(each.file_length for each in self.shards)
        self._home = {name: shard for shard in self.shards for name in shard.tensors}

    def __enter__(self) -> ShardedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ShardedFile {self.path}: {len(self.shards)} shards, {len(self.tensors)} tensors>"

    def close(self) -> None:
        """Close all shards."""
        for shard in self.shards:
            shard.close()

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version of the format."""
        return VERSION

    @property
    def generator(self) -> str:
        """The program that wrote the first shard; empty if there is none."""
        return self.shards[0].generator if self.shards else ""

    @property
    def file_length(self) -> int:
        """Bytes of all files."""
        return self._length

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The entries of all shards by name, in ascending order."""
        return self._tensors

    @property
    def attachments(self) -> Mapping[str, AttachmentEntry]:
        """The attachments of all shards by name, in ascending order."""
        return self._attachments

    @property
    def dictionary_bytes(self) -> int:
        """What the dictionaries of all shards take."""
        return sum(shard.dictionary_bytes for shard in self.shards)

    @property
    def dictionaries(self) -> Sequence[Dictionary]:
        """The dictionaries of all shards, one after the other."""
        return [each for shard in self.shards for each in shard.dictionaries]

    def read(self, name: str, threads: int = 1) -> npt.NDArray[Any]:
        """As ``QMoEFile.read``."""
        return self._shard(name).read(name, threads)

    def read_expert(self, name: str, expert: int, threads: int = 1) -> npt.NDArray[Any]:
        """As ``QMoEFile.read_expert``."""
        return self._shard(name).read_expert(name, expert, threads)

    def encoded(self, name: str, expert: int | None = None) -> EncodedMatrix:
        """As ``QMoEFile.encoded``."""
        return self._shard(name).encoded(name, expert)

    def ternary_counts(self, name: str) -> tuple[int, int]:
        """As ``QMoEFile.ternary_counts``."""
        return self._shard(name).ternary_counts(name)

    def attachment(self, name: str) -> bytes:
        """As ``QMoEFile.attachment``."""
        for shard in self.shards:
            if name in shard.attachments:
                return shard.attachment(name)
        raise QMoEError(
            "not-found", f"{self.path} has no attachment {name!r}: look at .attachments"
        )

    def verify(self, progress: Progress | None = None, threads: int = 1) -> None:
        """As ``QMoEFile.verify``, of one shard after the other."""
        before = 0
        total = sum(each.file_length for each in self.shards)
        for shard in self.shards:

            def report(done: int, _: int, before: int = before) -> None:
                if progress:
                    progress(before + done, total)

            shard.verify(report, threads)
            before += shard.file_length

    def _shard(self, name: str) -> QMoEFile:
        try:
            return self._home[name]
        except KeyError:
            raise QMoEError(
                "not-found", f"{self.path} has no tensor {name!r}: look at .tensors"
            ) from None


def _open_shard(path: Path, shard: Shard, memory_map: bool) -> FileSource:
    """The shard's bytes, if they are those that the text file means. [S-2]"""
    try:
        source = FileSource(path, memory_map=memory_map)
    except QMoEError as error:
        if error.code != "not-found":
            raise
        raise QMoEError("truncated", f"shard {shard.file!r} is missing") from error
    try:
        crc32 = b""
        if source.length >= PREAMBLE_LENGTH:
            crc32 = source.view(PREAMBLE_LENGTH - 4, 4).tobytes()
        if (source.length, int.from_bytes(crc32, "little")) != (shard.bytes, shard.preamble_crc32):
            raise QMoEError("checksum", f"shard {shard.file!r} is not the file that is meant")
    except BaseException:
        source.close()
        raise
    return source


def _merge(parts: list[Mapping[str, Any]], what: str) -> Mapping[str, Any]:
    names = [name for part in parts for name in part]
    _check_unique(names, what)  # [S-3]
    merged = {name: entry for part in parts for name, entry in part.items()}
    return MappingProxyType(dict(sorted(merged.items())))


def _check_unique(names: list[str], what: str) -> None:
    for before, after in pairwise(sorted(names)):
        if before == after:
            raise QMoEError("duplicate", f"two {what} are called {after!r}")
