"""One physical ``.qmoe`` file.

Opening reads the preamble and the index, nothing else. An extent is checked against its CRC-32 the
first time it is used, and reading one expert of a stack touches that expert's bytes alone.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qmoe_format import codec
from qmoe_format.container.encodings import ENCODINGS, Encoding, Payload, encoding_of
from qmoe_format.container.entries import DictionaryEntry, Entry, TensorEntry
from qmoe_format.container.extent_table import FIRST_EXTENT, ExtentTable
from qmoe_format.container.file_source import FileSource
from qmoe_format.container.index import parse_index
from qmoe_format.container.preamble import PREAMBLE_LENGTH, Preamble
from qmoe_format.container.remote_source import RemoteSource
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError, located

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary

_STRIDE = 1 << 24  # bytes between two reports of progress within an extent
_RUN = 1 << 24  # bytes that verification asks for together

Source: TypeAlias = FileSource | RemoteSource


class Shard:
    """An open file: the only one of a model, or one of several.

    Args:
        source: the file's bytes.

    Attributes:
        path: where the file is.
        version: major and minor of the format.
        generator: the program that wrote it.
        file_length: bytes.
        preamble_crc32: the preamble's checksum, which identifies the file's contents.
        tensors: their entries by name, in ascending order.
        attachments: their entries by name, in ascending order.
        dictionary_count: number of dictionaries.
        dictionary_bytes: what they take in the file.

    Raises:
        QMoEError: a code of SPEC.md section 1, or ``io``.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path = str(source.path)
        with located(self.path):  # [C-1]
            head = source.view(0, min(PREAMBLE_LENGTH, source.length)).tobytes()
            preamble = Preamble.parse(head, source.length)
            offset = preamble.index_offset
            tail = source.view(offset, source.length - offset)
            if zlib.crc32(tail.data) != preamble.index_crc32:  # [P-9]
                raise QMoEError("checksum", "the index does not match its checksum")
            text, rest = preamble.index_length, preamble.table_offset - offset
            if tail[text:rest].any():  # [F-2]
                raise QMoEError("padding", "bytes after the JSON text are not zero")
            self._table = ExtentTable.parse(tail[rest:], offset)
            self._index = parse_index(tail[:text], self._table.lengths)
        self._index_offset = offset
        self.version = preamble.version
        self.generator = self._index.generator
        self.file_length = preamble.file_length
        self.preamble_crc32 = int.from_bytes(head[-4:], "little")
        self.tensors = self._index.tensors
        self.attachments = self._index.attachments
        self.dictionary_count = len(self._index.dictionaries)
        self.dictionary_bytes = sum(
            int(self._table.lengths[each.extent]) for each in self._index.dictionaries
        )
        # Extents that have passed their CRC. Two threads may both check one: no harm.
        self._checked = np.zeros(len(self._table), np.bool_)
        self._dictionaries: dict[int, Dictionary] = {}

    def close(self) -> None:
        """Read nothing more; arrays already read stay valid."""
        self._source.close()

    def decode(self, entry: Entry, expert: int = 0, threads: int = 1) -> npt.NDArray[Any]:
        """A tensor, an expert or an attachment as an array in storage form."""
        with located(self._where(entry, expert)):
            return self._decode(entry, self._extent(entry.extent + expert), threads)

    def encoded(self, entry: Entry, expert: int = 0) -> Any:
        """A tensor or an expert as its encoding stores it."""
        with located(self._where(entry, expert)):
            stored = self._extent(entry.extent + expert)
            return _encoding(entry).encoded(stored, entry.item, self.dictionary)

    def read_encoded(self, entry: Entry, expert: int = 0) -> tuple[Any, int]:
        """See ``QMoEFile.read_encoded``."""
        extent = entry.extent + expert
        with located(self._where(entry, expert)):
            stored, read = self._source.read(*self._bounds(extent))
            if not self._checked[extent]:
                self._check_crc(extent, stored)
            return _encoding(entry).encoded(stored, entry.item, self.dictionary), read

    def stored_bytes(self, entry: Entry, expert: int = 0) -> int:
        """Length of the extent of a tensor or an expert."""
        return self._bounds(entry.extent + expert)[1]

    def payload(self, entry: TensorEntry) -> Payload:
        """See ``QMoEFile.payload``."""
        encoding = ENCODINGS.get(entry.encoding)
        if not encoding or not encoding.header_bytes:
            return Payload(entry.stored_bytes)
        total = Payload(0, 0)
        with located(self._where(entry)):
            extents = range(entry.extent, entry.extent + entry.extent_count)
            most = encoding.header_bytes
            headers = [(offset, min(length, most)) for offset, length in map(self._bounds, extents)]
            for header in self._source.views(headers):
                total += encoding.payload(header, entry.item)
            if total.bytes > entry.stored_bytes or (total.nonzeros or 0) > entry.elements:
                raise QMoEError("malformed", "the headers contradict the index")
        return total

    def dictionary(self, number: int) -> Dictionary:
        """Dictionary ``number``, parsed once; ``malformed`` if there is none. [E-1]"""
        if number not in self._dictionaries:
            if number >= self.dictionary_count:
                raise QMoEError("malformed", f"there is no dictionary {number}")
            entry = self._index.dictionaries[number]
            with located(entry.label()):
                self._dictionaries[number] = self._parse(entry, self._extent(entry.extent))
        return self._dictionaries[number]

    def verify(self, advance: Callable[[int], None], threads: int = 1) -> None:
        """Check every byte; call ``advance`` with the bytes checked since the last call. [C-3]

        The first defect is raised, but ``unsupported`` comes last, so that damage is found first.
        """
        unsupported: QMoEError | None = None
        end = FIRST_EXTENT
        advance(end)
        owners = self._index.owners
        parts = ((entry, expert) for entry in owners for expert in range(entry.extent_count))
        extents = self._padded_extents()
        for extent, (entry, expert) in enumerate(parts):
            offset, length = self._bounds(extent)
            with located(self._where(entry, expert)):
                padded = next(extents)
                stored = padded[:length]
                self._check_crc(extent, stored, advance)
                if padded[length:].any():  # [F-2]
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
            end = offset + len(padded)
            del padded, stored
            self._source.release(offset, length)
            advance(end - offset - length)
        if unsupported:
            raise unsupported
        advance(self.file_length - end)

    def _padded_extents(self) -> Iterator[Bytes]:
        """The extents one by one, each with the bytes up to the next; small ones read together."""
        # Each ends where the next begins, the last at the index. [F-5]
        edges = [*self._table.offsets.tolist(), self._index_offset]
        first = 0
        while first + 1 < len(edges):
            last = max(first + 1, bisect_right(edges, edges[first] + _RUN) - 1)
            run = self._source.view(edges[first], edges[last] - edges[first])
            for begin, end in pairwise(edges[first : last + 1]):
                yield run[begin - edges[first] : end - edges[first]]
            del run  # before the next one comes
            first = last

    def _where(self, entry: Entry, expert: int = 0) -> str:
        return f"{self.path}, {entry.label(expert)}"

    def _bounds(self, extent: int) -> tuple[int, int]:
        """Offset and length."""
        return int(self._table.offsets[extent]), int(self._table.lengths[extent])

    def _extent(self, extent: int) -> Bytes:
        """An extent's bytes, checked when they are used the first time. [F-7]"""
        stored = self._source.view(*self._bounds(extent))
        if not self._checked[extent]:
            self._check_crc(extent, stored)
        return stored

    def _check_crc(
        self, extent: int, stored: Bytes, advance: Callable[[int], None] | None = None
    ) -> None:
        crc32 = 0
        for start in range(0, len(stored), _STRIDE):
            part = stored[start : start + _STRIDE]
            crc32 = zlib.crc32(part.data, crc32)
            if advance:
                advance(len(part))
        if crc32 != self._table.crc32[extent]:
            raise QMoEError("checksum", f"extent {extent} does not match its checksum")
        self._checked[extent] = True

    def _decode(self, entry: Entry, stored: Bytes, threads: int = 1) -> npt.NDArray[Any]:
        return _encoding(entry).decode(stored, entry.item, self.dictionary, threads)

    def _parse(self, entry: DictionaryEntry, stored: Bytes) -> Dictionary:
        tree = self._decode(entry, stored).tobytes()
        dictionary = _parse_tree(entry.width, tree)
        longest, most = dictionary.max_length, dictionary.max_ones
        if (longest, most) != (entry.max_length, entry.max_ones):  # [D-1]
            raise QMoEError(
                "malformed",
                f"the entries have up to {longest} bits and {most} ones, the index says "
                f"{entry.max_length} and {entry.max_ones}",
            )
        return dictionary


def _encoding(entry: Entry) -> Encoding:
    """The entry's encoding, if it is known and can store such a thing. [T-5]"""
    encoding = encoding_of(entry.encoding)
    if encoding.defaults and not isinstance(entry, TensorEntry):
        raise QMoEError("unsupported", f"encoding {encoding.name!r} is for tensors only")
    return encoding


@lru_cache(maxsize=64)
def _parse_tree(width: int, tree: bytes) -> Dictionary:
    """Cached: few dictionaries serve many files, and parsing one is most of opening a file."""
    return codec.Dictionary.from_tree(width, tree)
