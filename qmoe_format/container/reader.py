"""Reading a model: ``QMoEFile`` over one ``.qmoe`` file, or over all shards of a set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

from qmoe_format.container import limits
from qmoe_format.container.encodings import Payload
from qmoe_format.container.entries import AttachmentEntry, TensorEntry
from qmoe_format.container.file_source import FileSource
from qmoe_format.container.preamble import PREAMBLE_LENGTH, VERSION
from qmoe_format.container.remote_source import RemoteSource
from qmoe_format.container.shard import Shard, Source
from qmoe_format.container.shard_list import (
    BEGINNING,
    ListedShard,
    check_unique,
    parse_shard_list,
)
from qmoe_format.errors import QMoEError, located
from qmoe_format.progress import Counter, Progress
from qmoe_format.remote import Location, RemotePath, location

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary

E = TypeVar("E", TensorEntry, AttachmentEntry)


def open(path: str | os.PathLike[str] | RemotePath, *, memory_map: bool = True) -> QMoEFile:
    """Open a ``.qmoe`` file, or all shards that a text file names.

    Args:
        path: of the file, or of the text file. It may be a URL, such as ``s3://bucket/model.qmoe``:
            what is read of the file is then requested as a range of its bytes, and nothing else
            (see ``qmoe_format.remote``).
        memory_map: map files into memory. Without, bytes are read: slower, but nothing that another
            process does to a file can end this one (see ``qmoe_format.container.file_source``).

    Returns:
        The open file: a context manager.

    Raises:
        QMoEError: a code of SPEC.md section 1; ``not-found``; ``io``; for a URL also ``dependency``
            and ``argument``.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import qmoe_format
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = folder.name + "/model.qmoe"
        >>> with qmoe_format.Writer(path) as writer:
        ...     writer.add_tensor("norm.weight", np.array([1, 2, 3], np.float32), "F32")
        >>> with qmoe_format.open(path) as file:
        ...     print(list(file.tensors), file.read("norm.weight"))
        ['norm.weight'] [1. 2. 3.]
        >>> folder.cleanup()
    """
    return QMoEFile(path, memory_map=memory_map)


class QMoEFile:
    """An open model; use it as a context manager, or call ``close``.

    Arguments and errors are those of ``open``. A set of shards has further errors: ``truncated``
    for a shard that is missing, ``checksum`` for one of another model, ``duplicate``.

    Arrays of ``raw`` tensors and the arrays inside encoded matrices are read-only views of the file
    and stay valid after ``close``; others are new.

    Attributes:
        path: of the file, or of the text file that names the shards.
        shards: the files that make up the model, all open.
        version: major and minor of the format.
        generator: the program that wrote the first file; empty if there is none.
        file_length: bytes of all files.
        tensors: the tensors' entries by name, in ascending order.
        attachments: the attachments' entries by name, in ascending order.
        dictionary_bytes: what all dictionaries take in the files.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from qmoe_format import QMoEFile, Writer
        >>> folder = tempfile.TemporaryDirectory()
        >>> with (
        ...     Writer(folder.name + "/model.qmoe") as writer,
        ...     writer.add_stack("experts", (2, 3), "U8") as stack,
        ... ):
        ...     stack.append(np.array([1, 2, 3], np.uint8))
        ...     stack.append(np.array([4, 5, 6], np.uint8))
        >>> with QMoEFile(folder.name + "/model.qmoe") as file:
        ...     file.verify()
        ...     print(file.tensors["experts"].shape, file.read_expert("experts", 1))
        (2, 3) [4 5 6]
        >>> folder.cleanup()
    """

    def __init__(
        self, path: str | os.PathLike[str] | RemotePath, *, memory_map: bool = True
    ) -> None:
        place = location(path)
        source = _open_source(place, memory_map)
        self.path = str(source.path)
        self.file_length = 0
        shards: list[Shard] = []
        with ExitStack() as opened:
            opened.callback(source.close)
            with located(self.path):
                listed = _read_list(source)
            if listed is None:
                shards.append(Shard(source))
            else:
                self.file_length = source.length
                source.close()
                for each in listed:
                    with located(self.path):
                        source = _open_listed(place, each, memory_map)
                        opened.callback(source.close)
                        _check_listed(source, each)
                    shards.append(Shard(source))
            with located(self.path):
                self.tensors = _merge([each.tensors for each in shards], "tensors")
                self.attachments = _merge([each.attachments for each in shards], "attachments")
            opened.pop_all()
        self.shards: Sequence[Shard] = shards
        self.file_length += sum(shard.file_length for shard in shards)
        self.dictionary_bytes = sum(shard.dictionary_bytes for shard in shards)
        self.version = shards[0].version if shards else VERSION
        self.generator = shards[0].generator if shards else ""
        self._home = {name: shard for shard in shards for name in shard.tensors}

    def __enter__(self) -> QMoEFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<QMoEFile {self.path}: {len(self.tensors)} tensors>"

    def close(self) -> None:
        """Read nothing more; arrays already read stay valid."""
        for shard in self.shards:
            shard.close()

    @property
    def dictionaries(self) -> Sequence[Dictionary]:
        """All dictionaries, shard by shard."""
        found = []
        for shard in self.shards:
            with located(shard.path):
                found += [shard.dictionary(number) for number in range(shard.dictionary_count)]
        return found

    def read(self, name: str, threads: int = 1) -> npt.NDArray[Any]:
        """Read a tensor; quantized ones are dequantized.

        Returns:
            The tensor in storage form: BF16 as uint16, 8-bit floats as uint8.

        Raises:
            QMoEError: ``not-found``; ``argument`` for a stack; what is wrong with the file.
        """
        shard, entry = self._find(name)
        return shard.decode(entry, threads=threads)

    def read_expert(self, name: str, expert: int, threads: int = 1) -> npt.NDArray[Any]:
        """Read one expert of a stack, as ``read`` does a tensor.

        Raises:
            QMoEError: ``not-found``; ``argument`` unless it is a stack; what is wrong with the
                file.
        """
        shard, entry = self._find(name, expert)
        return shard.decode(entry, expert, threads)

    def encoded(self, name: str, expert: int | None = None) -> Any:
        """Read a tensor, or one expert of a stack, in the form in which it is stored.

        Returns:
            What ``StackWriter.append`` stores again as it is: an ``EncodedMatrix`` of views for
            ``int-dict``, of which all but the segments has been checked (the codec checks these
            when it decodes them); the array that ``read`` returns for other encodings.

        Raises:
            QMoEError: ``not-found``; ``argument`` if ``expert`` is missing for a stack or given for
                another tensor; what is wrong with the file.
        """
        shard, entry = self._find(name, expert)
        return shard.encoded(entry, expert or 0)

    def read_encoded(self, name: str, expert: int | None = None) -> tuple[Any, int]:
        """As ``encoded``, but in memory of its own, not in the mapping or the system's page cache.

        Threads may call this at the same time.

        Returns:
            What ``encoded`` returns, and the number of bytes that were read from the disk.

        Raises:
            QMoEError: as ``encoded``.
        """
        shard, entry = self._find(name, expert)
        return shard.read_encoded(entry, expert or 0)

    def stored_bytes(self, name: str, expert: int | None = None) -> int:
        """What a tensor, or one expert of a stack, takes in the file, without alignment.

        Raises:
            QMoEError: ``not-found``; ``argument``.
        """
        shard, entry = self._find(name, expert)
        return shard.stored_bytes(entry, expert or 0)

    def payload(self, name: str) -> Payload:
        """What the headers of a tensor's extents tell; no checksum is checked.

        Raises:
            QMoEError: ``malformed``; ``limit``; ``io``.
        """
        return self._home[name].payload(self.tensors[name])

    def attachment(self, name: str) -> bytes:
        """The contents of an attached file.

        Raises:
            QMoEError: ``not-found``; what is wrong with the file.
        """
        for shard in self.shards:
            if entry := shard.attachments.get(name):
                return shard.decode(entry).tobytes()
        raise self._not_found(f"attachment {name!r}", "look at .attachments")

    def verify(self, progress: Progress | None = None, threads: int = 1) -> None:
        """Check every byte: checksums, padding, the contents of all extents. [C-3]

        Args:
            progress: counts the bytes checked.
            threads: for decoding.

        Raises:
            QMoEError: the first defect of a file. What this version does not know (``unsupported``)
                comes after the file's damage.
        """
        counter = Counter(progress, sum(shard.file_length for shard in self.shards))
        for shard in self.shards:
            shard.verify(counter.add, threads)

    def _find(self, name: str, expert: int | None = None) -> tuple[Shard, TensorEntry]:
        """Where a tensor is; ``expert`` is given for a stack, and only then."""
        if name not in self._home:
            raise self._not_found(f"tensor {name!r}", "look at .tensors")
        entry = self.tensors[name]
        if entry.stack and expert is None:
            raise QMoEError(
                "argument",
                f"{self.path}: tensor {name!r} is a stack of experts",
                "say which expert to read (read_expert)",
            )
        if expert is not None and not entry.stack:
            raise QMoEError(
                "argument",
                f"{self.path}: tensor {name!r} is not a stack of experts",
                "read it without an expert's number (read)",
            )
        if expert is not None and not 0 <= expert < entry.extent_count:
            raise self._not_found(
                f"expert {expert} in {name!r}", f"give a number below {entry.extent_count}"
            )
        return self._home[name], entry

    def _not_found(self, what: str, advice: str) -> QMoEError:
        return QMoEError("not-found", f"{self.path}: there is no {what}", advice)


def _open_source(path: Location, memory_map: bool) -> Source:
    if isinstance(path, RemotePath):
        return RemoteSource(path)
    return FileSource(path, memory_map=memory_map)


def _read_list(source: Source) -> list[ListedShard] | None:
    """The shards that a text file names; None if it is another file. [S-1]"""
    head = source.view(0, min(len(BEGINNING), source.length)).tobytes()
    if head != BEGINNING:
        return None
    limits.check("length of the list of shards", source.length, *limits.INDEX_LENGTH)
    return parse_shard_list(source.view(0, source.length))


def _open_listed(path: Location, shard: ListedShard, memory_map: bool) -> Source:
    """A shard that the text file at ``path`` names."""
    try:
        return _open_source(path.with_name(shard.file), memory_map)
    except QMoEError as error:  # [S-2]
        wrong = f"shard {shard.file!r} cannot be opened ({error.problem})"
        raise QMoEError("truncated", wrong) from error


def _check_listed(source: Source, shard: ListedShard) -> None:
    """Refuse a file that is not the one that the text file describes. [S-2]"""
    crc32 = b""
    if source.length >= PREAMBLE_LENGTH:
        crc32 = source.view(PREAMBLE_LENGTH - 4, 4).tobytes()
    if (source.length, int.from_bytes(crc32, "little")) != (shard.bytes, shard.preamble_crc32):
        raise QMoEError("checksum", f"shard {shard.file!r} is not the one listed")


def _merge(parts: Sequence[Mapping[str, E]], what: str) -> Mapping[str, E]:
    """The entries of all shards, in the order of their names."""
    if len(parts) == 1:
        return parts[0]
    check_unique((name for part in parts for name in part), what)  # [S-3]
    merged = {name: entry for part in parts for name, entry in part.items()}
    return MappingProxyType(dict(sorted(merged.items())))
