"""Writing one physical file: extents as they come, then the index and the extent table.

Tensors go to the disk as they come. What stays in memory is 12 bytes per extent, the entries of the
index, and the dictionaries. ``writer`` decides what may be written.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qmoe_format.atomic_file import PartialFile, partial_file
from qmoe_format.container import canonical_json, limits
from qmoe_format.container.encodings import RAW, ZSTD, Encoding
from qmoe_format.container.entries import Item
from qmoe_format.container.extent_table import (
    ALIGNMENT,
    FIRST_EXTENT,
    RECORD_LENGTH,
    ExtentTable,
    align,
)
from qmoe_format.container.index import dump_index
from qmoe_format.container.preamble import Preamble
from qmoe_format.errors import QMoEError
from qmoe_format.remote import Location
from qmoe_format.remote.upload import Upload

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary


class ShardWriter:
    """One file being written.

    After an operation that failed, discard ``partial``. All methods raise ``QMoEError``: ``io``,
    ``limit``.

    Attributes:
        partial: the file on the disk.
        tensors: the index's objects so far.
        preamble_crc32: known after ``close``.
    """

    def __init__(self, target: Location, *, renamed: bool = False) -> None:
        """``renamed``: whether the file will be published under another name."""
        self._target = target
        self.partial = partial_file(target, renamed=renamed)
        self.tensors: list[dict[str, Any]] = []
        self.preamble_crc32 = 0
        self._attachments: list[dict[str, Any]] = []
        self._dictionaries: list[dict[str, Any]] = []
        self._lengths = array("Q")
        self._crc32 = array("I")
        self._numbers: dict[Dictionary, int] = {}
        self._index_bytes = 0
        try:
            self.partial.write(bytes(FIRST_EXTENT))
        except BaseException:
            self.partial.discard()
            raise

    def put(self, encoding: Encoding, value: Any, item: Item, *, settled: bool = False) -> Encoding:
        """Write one extent; return the encoding used, which may be ``raw`` unless ``settled``."""
        check_limit(self._target, "extents", len(self._lengths) + 1, limits.EXTENTS)
        self.partial.settle()
        extent = _Extent(self.partial, self._dictionary_number)
        encoding.encode(value, item, extent)
        if encoding.raw_if_larger and not settled and extent.length >= item.size:
            extent.restart()
            encoding = RAW
            encoding.encode(value, item, extent)
        check_limit(self._target, "bytes", self.partial.length, limits.INTEGER)
        self._lengths.append(extent.length)
        self._crc32.append(extent.crc32)
        return encoding

    def add_tensor(self, record: dict[str, Any], extents: int) -> None:
        """Add a tensor to the index, whose extents are the last ones."""
        first = len(self._lengths) - extents if extents else 0
        self.tensors.append(record | {"extent": first})
        self._index_bytes += len(canonical_json.dumps(record)) + 8
        for dictionary in self._unwritten():
            entry = {
                **self._put_bytes(dictionary.tree),
                "max_length": dictionary.max_length,
                "max_ones": dictionary.max_ones,
                "width": dictionary.width,
            }
            self._dictionaries.append(entry)
            self._index_bytes += len(canonical_json.dumps(entry)) + 1

    def add_attachment(self, name: str, data: bytes) -> None:
        """Write a file's contents and add it to the index."""
        self._attachments.append({**self._put_bytes(data), "name": name})

    def expected_length(self, record: dict[str, Any], extents: int) -> int:
        """Bytes of the file if it ended after the tensor whose first extent was just written."""
        last = self._lengths[-1]
        stack = align(self.partial.length - last, ALIGNMENT) + extents * align(last, ALIGNMENT)
        trees = sum(align(len(each.tree), ALIGNMENT) for each in self._unwritten())
        table = RECORD_LENGTH * (len(self._lengths) - 1 + extents)
        index = self._index_bytes + len(canonical_json.dumps(record)) + 256
        return stack + trees + table + index

    def drop_extent(self) -> None:
        """Remove the last extent, which belongs to no tensor yet; only ``close`` may follow."""
        self._crc32.pop()
        self.partial.truncate(self.partial.length - self._lengths.pop())

    def close(self, generator: str) -> None:
        """Write the index, then the preamble, and make everything durable."""
        text = dump_index(generator, self.tensors, self._attachments, self._dictionaries)
        check_limit(self._target, "bytes of index", len(text), limits.INDEX_LENGTH[1])
        table = ExtentTable.to_bytes(
            np.frombuffer(self._lengths, np.uint64), np.frombuffer(self._crc32, np.uint32)
        )
        end = self.partial.length
        offset = align(end, ALIGNMENT)
        tail = text + bytes(align(len(text), 8) - len(text)) + table
        self.partial.write(bytes(offset - end))
        self.partial.write(tail)
        preamble = Preamble(
            extent_count=len(self._lengths),
            file_length=self.partial.length,
            index_offset=offset,
            index_length=len(text),
            index_crc32=zlib.crc32(tail),
        ).to_bytes()
        self.preamble_crc32 = int.from_bytes(preamble[-4:], "little")
        self.partial.overwrite(preamble)
        self.partial.seal()

    def _put_bytes(self, data: bytes) -> dict[str, Any]:
        """Write an extent of plain bytes; returns what the index says of it."""
        content = np.frombuffer(data, np.uint8)
        encoding = self.put(ZSTD, content, Item("U8", content.shape))
        extent = len(self._lengths) - 1
        return {"bytes": content.size, "encoding": encoding.name, "extent": extent}

    def _dictionary_number(self, dictionary: Dictionary) -> int:
        if dictionary not in self._numbers:
            check_limit(self._target, "dictionaries", len(self._numbers) + 1, limits.ENTRIES)
            self._numbers[dictionary] = len(self._numbers)
        return self._numbers[dictionary]

    def _unwritten(self) -> list[Dictionary]:
        """Dictionaries first used inside the stack being written, whose extents are consecutive."""
        return list(self._numbers)[len(self._dictionaries) :]


class _Extent:
    """The ``Sink`` of one extent, at the end of a file."""

    def __init__(self, file: PartialFile | Upload, number_of: Callable[[Dictionary], int]) -> None:
        self._file = file
        self.dictionary_number = number_of
        file.write(bytes(align(file.length, ALIGNMENT) - file.length))
        self._start = file.length
        self.crc32 = 0

    @property
    def length(self) -> int:
        return self._file.length - self._start

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def restart(self) -> None:
        self._file.truncate(self._start)
        self.crc32 = 0


def check_limit(target: Location, what: str, number: int, most: int) -> None:
    """Refuse a file that no reader would accept. [L-1]

    Raises:
        QMoEError: ``limit``.
    """
    if number > most:
        raise QMoEError(
            "limit",
            f"{target}: {number} {what} are more than the {most} that a file may have",
            "write shards, or fewer and larger tensors",
        )
