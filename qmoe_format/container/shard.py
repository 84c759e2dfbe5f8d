"""One physical ``.qmoe`` file.

Opening reads the preamble and the index, nothing else. An extent is checked against its CRC-32 the
first time it is used, and reading one expert of a stack touches that expert's bytes alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format import codec
from qmoe_format.container.encodings import ENCODINGS, Encoding, Summary, encoding_of
from qmoe_format.container.entries import AttachmentEntry, DictionaryEntry, Entry, TensorEntry
from qmoe_format.container.extent_table import ALIGNMENT, FIRST_EXTENT, ExtentTable, align
from qmoe_format.container.file_source import FileSource
from qmoe_format.container.index import parse_index
from qmoe_format.container.preamble import PREAMBLE_LENGTH, Preamble
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError, located

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary

_STRIDE = 1 << 24  # bytes between two reports of progress within an extent


class Shard:
    """An open file: the only one of a model, or one of several.

    Args:
        source: the file's bytes. Whoever opened it closes it.

    Raises:
        QMoEError: a code of SPEC.md section 1, or ``io``.
    """

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self.path = str(source.path)
        with located(self.path):  # [C-1]
            head = source.view(0, min(PREAMBLE_LENGTH, source.length)).tobytes()
            self._preamble = Preamble.parse(head, source.length)
            offset = self._preamble.index_offset
            tail = source.view(offset, source.length - offset)
            if zlib.crc32(tail.data) != self._preamble.index_crc32:  # [P-9]
                raise QMoEError("checksum", "the index does not match its checksum")
            text, rest = self._preamble.index_length, self._preamble.table_offset - offset
            if tail[text:rest].any():  # [F-2]
                raise QMoEError("padding", "bytes after the JSON text are not zero")
            self._table = ExtentTable.parse(tail[rest:], offset)
            self._index = parse_index(tail[:text], self._table.lengths)
        # Extents that have passed their CRC. Two threads may both check one: no harm.
        self._checked = np.zeros(len(self._table), np.bool_)
        self._dictionaries: dict[int, Dictionary] = {}

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version of the format."""
        return self._preamble.version

    @property
    def generator(self) -> str:
        """The program that wrote the file."""
        return self._index.generator

    @property
    def file_length(self) -> int:
        """Bytes of the file."""
        return self._preamble.file_length

    @property
    def preamble_crc32(self) -> int:
        """The preamble's checksum, which identifies the file's contents."""
        return int.from_bytes(self._preamble.to_bytes()[-4:], "little")

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The tensors' entries by name, in ascending order."""
        return self._index.tensors

    @property
    def attachments(self) -> Mapping[str, AttachmentEntry]:
        """The attachments' entries by name, in ascending order."""
        return self._index.attachments

    @property
    def dictionary_bytes(self) -> int:
        """What all dictionaries take in the file."""
        return sum(int(self._table.lengths[each.extent]) for each in self._index.dictionaries)

    @property
    def dictionary_count(self) -> int:
        """Number of dictionaries."""
        return len(self._index.dictionaries)

    def close(self) -> None:
        """Read nothing more; arrays already read stay valid."""
        self._source.close()

    def decode(self, entry: Entry, expert: int = 0, threads: int = 1) -> npt.NDArray[Any]:
        """A tensor, an expert or an attachment as an array in storage form.

        Raises:
            QMoEError: what is wrong with it.
        """
        with self._located(entry, expert):
            return self._decode(entry, self._extent(entry.extent + expert), threads)

    def encoded(self, entry: Entry, expert: int = 0) -> Any:
        """A tensor or an expert as its encoding stores it.

        Raises:
            QMoEError: what is wrong with it.
        """
        with self._located(entry, expert):
            stored = self._extent(entry.extent + expert)
            return _encoding(entry).encoded(stored, entry.item, self.dictionary)

    def summarize(self, entry: TensorEntry) -> Summary:
        """What the headers of a tensor's extents tell; no checksum is checked.

        Raises:
            QMoEError: ``malformed``, ``io``.
        """
        encoding = ENCODINGS.get(entry.encoding)
        if not encoding or not encoding.header_bytes:
            return Summary(entry.stored_bytes, None)
        with self._located(entry):
            payload = nonzeros = 0
            for extent in range(entry.extent, entry.extent + entry.extent_count):
                offset, length = self._bounds(extent)
                if length < encoding.header_bytes:
                    raise QMoEError("malformed", f"extent {extent} has no header")
                header = self._source.view(offset, encoding.header_bytes).tobytes()
                each = encoding.summarize(header)
                payload += each.payload_bytes
                nonzeros += each.nonzeros or 0
            if payload > entry.stored_bytes or nonzeros > entry.elements:
                raise QMoEError("malformed", "the headers contradict the index")
            return Summary(payload, nonzeros)

    def dictionary(self, number: int) -> Dictionary:
        """Dictionary ``number``, parsed once.

        Raises:
            QMoEError: what is wrong with it; ``malformed`` if there is none. [E-1]
        """
        if number not in self._dictionaries:
            if number >= self.dictionary_count:
                raise QMoEError("malformed", f"there is no dictionary {number}")
            entry = self._index.dictionaries[number]
            with located(entry.label()):
                self._dictionaries[number] = self._parse(entry, self._extent(entry.extent))
        return self._dictionaries[number]

    def verify(self, advance: Callable[[int], None], threads: int = 1) -> None:
        """Check every byte: checksums, padding, the contents of all extents. [C-3]

        Args:
            advance: called with the number of bytes checked since the last call.
            threads: for decoding.

        Raises:
            QMoEError: for the first defect found. What this version does not know
                (``unsupported``) comes last, so that damage is found first.
        """
        unsupported: QMoEError | None = None
        end = FIRST_EXTENT
        advance(end)
        for extent, (entry, expert) in enumerate(self._owners()):
            offset, length = self._bounds(extent)
            with self._located(entry, expert):
                self._check_crc(extent, advance)
                stored = self._source.view(offset, length)
                end = align(offset + length, ALIGNMENT)
                if self._source.view(offset + length, end - offset - length).any():  # [F-2]
                    raise QMoEError("padding", f"bytes after extent {extent} are not zero")
                try:
                    if isinstance(entry, DictionaryEntry):
                        self._dictionaries[entry.number] = self._parse(entry, stored)
                    else:
                        _encoding(entry).verify(stored, entry.item, self.dictionary, threads)
                except QMoEError as error:
                    if error.code != "unsupported":
                        raise
                    unsupported = unsupported or error.at(self._where(entry, expert))
            del stored
            self._source.release(offset, length)
            advance(end - offset - length)
        if unsupported:
            raise unsupported
        advance(self.file_length - end)

    def _owners(self) -> Iterator[tuple[Entry, int]]:
        """What each extent belongs to, and which expert it is."""
        for entry in self._index.owners:
            for expert in range(entry.extent_count):
                yield entry, expert

    def _where(self, entry: Entry, expert: int) -> str:
        return f"{self.path}, {entry.label(expert)}"

    def _located(self, entry: Entry, expert: int = 0) -> AbstractContextManager[None]:
        return located(self._where(entry, expert))

    def _bounds(self, extent: int) -> tuple[int, int]:
        """Offset and length."""
        return int(self._table.offsets[extent]), int(self._table.lengths[extent])

    def _extent(self, extent: int) -> Bytes:
        """An extent's bytes, checked when they are used the first time. [F-6]"""
        if not self._checked[extent]:
            self._check_crc(extent)
        return self._source.view(*self._bounds(extent))

    def _check_crc(self, extent: int, advance: Callable[[int], None] | None = None) -> None:
        offset, length = self._bounds(extent)
        crc32 = 0
        for start in range(0, length, _STRIDE):
            part = min(_STRIDE, length - start)
            crc32 = zlib.crc32(self._source.view(offset + start, part).data, crc32)
            if advance:
                advance(part)
        if crc32 != self._table.crc32[extent]:
            raise QMoEError("checksum", f"extent {extent} does not match its checksum")
        self._checked[extent] = True

    def _decode(self, entry: Entry, stored: Bytes, threads: int = 1) -> npt.NDArray[Any]:
        return _encoding(entry).decode(stored, entry.item, self.dictionary, threads)

    def _parse(self, entry: DictionaryEntry, stored: Bytes) -> Dictionary:
        tree = self._decode(entry, stored).tobytes()
        dictionary = _parse_tree(entry.width, entry.signs, tree)
        longest, most = dictionary.max_length, dictionary.max_nonzeros
        if (longest, most) != (entry.max_length, entry.max_nonzeros):  # [D-1]
            raise QMoEError(
                "malformed",
                f"the entries have up to {longest} weights and {most} non-zeros, the index says "
                f"{entry.max_length} and {entry.max_nonzeros}",
            )
        return dictionary


def _encoding(entry: Entry) -> Encoding:
    """The entry's encoding, if it is known and can store such a thing. [T-4]"""
    encoding = encoding_of(entry.encoding)
    if encoding.defaults and not isinstance(entry, TensorEntry):
        raise QMoEError("unsupported", f"encoding {encoding.name!r} is for tensors only")
    return encoding


@lru_cache(maxsize=64)
def _parse_tree(width: int, signs: str, tree: bytes) -> Dictionary:
    """Cached: few dictionaries serve many files, and parsing one is most of opening a file."""
    return codec.Dictionary.from_tree(width, signs, tree)
