"""One file in the making: extents as they come, then the index and the extent table.

Tensors go to the disk as they come. What stays in memory is 12 bytes an extent, the entries of the
index, and the dictionaries of the stack being written. What may be written is ``writer``'s affair.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qmoe_format.atomic_file import PartialFile
from qmoe_format.container import canonical_json, limits
from qmoe_format.container.encodings import RAW, ZSTD, Encoding
from qmoe_format.container.entries import Item
from qmoe_format.container.index import dump_index
from qmoe_format.container.preamble import (
    ALIGNMENT,
    PREAMBLE_LENGTH,
    RECORD_LENGTH,
    ExtentTable,
    Preamble,
    align,
)
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary


class FileWriter:
    """One file in the making: its extents and what the index will say.

    ``attachments`` and ``records`` are the index's objects so far; whoever puts an attachment adds
    its own. ``preamble_crc32`` is known after ``close``. After an operation that failed, discard
    ``partial``. All methods raise ``QMoEError``: ``io``, ``limit``.
    """

    def __init__(self, target: Path) -> None:
        self.partial = PartialFile(target)
        self.lengths = array("Q")
        self.crc32 = array("I")
        self.records: list[dict[str, Any]] = []
        self.attachments: list[dict[str, Any]] = []
        self.preamble_crc32 = 0
        self._end = PREAMBLE_LENGTH  # of the last extent
        self._dictionaries: list[dict[str, Any]] = []
        self._numbers: dict[bytes, int] = {}
        # A dictionary that turns up inside a stack waits until the stack's extents are together.
        self._waiting: list[Dictionary] = []
        self._index_bytes = 0
        self._closed = False
        try:
            self.partial.write(bytes(PREAMBLE_LENGTH))
        except BaseException:
            self.partial.discard()
            raise

    def put(self, coder: Encoding, value: Any, item: Item) -> int:
        """Write one extent; returns its number."""
        return self._put(coder, value, item, smallest=False)[0]

    def put_smallest(self, coder: Encoding, value: Any, item: Item) -> tuple[int, Encoding]:
        """``put``, but ``raw`` where ``zstd`` saves nothing; returns what was taken, too."""
        return self._put(coder, value, item, smallest=True)

    def _put(self, coder: Encoding, value: Any, item: Item, smallest: bool) -> tuple[int, Encoding]:
        number = len(self.lengths)
        check_limit(self.partial.target, "extents", number + 1, limits.EXTENTS)
        extent = ExtentWriter(self, align(self._end, ALIGNMENT))
        coder.encode(value, item, extent)
        if smallest and coder is ZSTD and extent.length >= item.size:
            extent.restart()
            coder = RAW
            coder.encode(value, item, extent)
        self._end = extent.start + extent.length
        check_limit(self.partial.target, "bytes", self._end, limits.INTEGER)
        self.lengths.append(extent.length)
        self.crc32.append(extent.crc32)
        return number, coder

    def add_record(self, record: dict[str, Any], extents: int) -> None:
        """Note a tensor whose extents are the last ones, and write the dictionaries that waited."""
        first = len(self.lengths) - extents if extents else 0
        self.records.append(record | {"extent": first})
        self._index_bytes += len(canonical_json.dumps(record)) + 8
        for dictionary in self._waiting:
            tree = np.frombuffer(dictionary.tree, np.uint8)
            extent, coder = self.put_smallest(ZSTD, tree, Item("U8", tree.shape))
            entry = {
                "bytes": tree.size,
                "encoding": coder.name,
                "extent": extent,
                "max_length": dictionary.max_length,
                "max_nonzeros": dictionary.max_nonzeros,
                "signs": dictionary.signs,
                "width": dictionary.width,
            }
            self._dictionaries.append(entry)
            self._index_bytes += len(canonical_json.dumps(entry)) + 1
        self._waiting.clear()

    def dictionary_number(self, dictionary: Dictionary) -> int:
        """The number of this dictionary in the file; a new one is written with the next record."""
        key = hashlib.sha256(dictionary.tree).digest()
        key += f"{dictionary.width} {dictionary.signs}".encode()
        if key not in self._numbers:
            count = len(self._numbers) + 1
            check_limit(self.partial.target, "dictionaries", count, limits.ENTRIES)
            self._numbers[key] = count - 1
            self._waiting.append(dictionary)
        return self._numbers[key]

    def expected_length(self, experts: int, index_bytes: int) -> int:
        """Of the file, if it ended after a stack of which the first expert was just written."""
        extents = len(self.lengths) - 1 + experts
        last = self.lengths[-1]
        stack = experts * align(last, ALIGNMENT)
        trees = sum(align(len(each.tree), ALIGNMENT) for each in self._waiting)
        index = self._index_bytes + index_bytes + RECORD_LENGTH * extents + 256
        return align(self._end - last, ALIGNMENT) + stack + trees + index

    def mark(self) -> tuple[int, int, int]:
        """Where ``undo`` may come back to; only between tensors."""
        return len(self.lengths), self._end, len(self._numbers)

    def undo(self, mark: tuple[int, int, int]) -> None:
        """Forget the extents since ``mark``."""
        extents, self._end, dictionaries = mark
        del self.lengths[extents:], self.crc32[extents:]
        self._numbers = {key: n for key, n in self._numbers.items() if n < dictionaries}
        self._waiting.clear()
        self.partial.truncate(self._end)

    def close(self, generator: str) -> None:
        """Write the index, then the preamble, and make all of it durable."""
        if self._closed:
            return
        text = dump_index(generator, self.records, self.attachments, self._dictionaries)
        check_limit(self.partial.target, "bytes of index", len(text), limits.INDEX_LENGTH[1])
        table = ExtentTable.to_bytes(
            np.frombuffer(self.lengths, np.uint64), np.frombuffer(self.crc32, np.uint32)
        )
        offset = align(self._end, ALIGNMENT)
        tail = text + bytes(align(len(text), 8) - len(text)) + table
        self.partial.write(bytes(offset - self._end))
        self.partial.write(tail)
        preamble = Preamble(
            extent_count=len(self.lengths),
            file_length=self.partial.length,
            index_offset=offset,
            index_length=len(text),
            index_crc32=zlib.crc32(tail),
        ).to_bytes()
        self.preamble_crc32 = int.from_bytes(preamble[-4:], "little")
        self.partial.overwrite(preamble)
        self.partial.seal()
        self._closed = True


class ExtentWriter:
    """The ``Sink`` of one extent, at the end of a file; ``start`` is its offset in bytes."""

    def __init__(self, file: FileWriter, start: int) -> None:
        self._file = file
        self.start = start
        self.length = 0
        self.crc32 = 0
        file.partial.write(bytes(start - file.partial.length))

    def write(self, data: bytes | memoryview) -> None:
        self._file.partial.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.length = self._file.partial.length - self.start

    def restart(self) -> None:
        self._file.partial.truncate(self.start)
        self.length = self.crc32 = 0

    def dictionary_number(self, dictionary: Dictionary) -> int:
        return self._file.dictionary_number(dictionary)


def check_limit(target: Path, what: str, number: int, most: int) -> None:
    """Raise ``QMoEError("limit")`` if ``number`` is above ``most``."""
    if number > most:  # [L-1]
        raise QMoEError(
            "limit",
            f"{number} {what} are more than the {most} a file may have, {target}: write shards, "
            "or fewer and larger tensors",
        )
