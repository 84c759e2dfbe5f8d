"""Reading one ``.qmoe`` file.

Opening reads the preamble and the index, nothing else. An extent is checked against its CRC-32 the
first time it is used, and reading one expert of a stack touches that expert's bytes alone.

Arrays of ``raw`` tensors and the arrays inside encoded matrices are read-only views of the file and
stay valid after ``close``; others are fresh.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from qmoe_format import codec
from qmoe_format.container.byte_source import ByteSource
from qmoe_format.container.encodings import TERNARY_DICT, Dictionaries, encoding_of
from qmoe_format.container.encodings.ternary_dict import HEADER_LENGTH, counts
from qmoe_format.container.entries import AttachmentEntry, Item, TensorEntry
from qmoe_format.container.index import Index, parse_index
from qmoe_format.container.preamble import ALIGNMENT, PREAMBLE_LENGTH, ExtentTable, Preamble, align
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError, located

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary, EncodedMatrix

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are."""

_STRIDE = 1 << 24  # bytes between two reports of progress inside one extent


class QMoEFile:
    """An open file; use it as a context manager, or call ``close``.

    ``source``: where the bytes come from, closed with the file. With ``checksums=False`` reading
    does not compare extents with their CRC-32; ``verify`` always does.

    Raises ``QMoEError`` with a code of SPEC.md section 1, or ``io``.
    """

    def __init__(self, source: ByteSource, *, checksums: bool = True) -> None:
        self._source = source
        try:
            with located(source.name):
                self._preamble, self._table, index = _open(source)
        except BaseException:
            source.close()
            raise
        self._index: Index = index
        # Extents whose CRC need not be looked at again. Two threads may both check one: no harm.
        self._checked = np.full(len(self._table), not checksums)
        self._trees: dict[int, Dictionary] = {}

    def __enter__(self) -> QMoEFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<QMoEFile {self.path}: {len(self.tensors)} tensors>"

    def close(self) -> None:
        """Nothing can be read any more; arrays already read stay valid."""
        self._source.close()

    @property
    def path(self) -> str:
        """Where the file is."""
        return self._source.name

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
        """Bytes of the whole file."""
        return self._preamble.file_length

    @property
    def preamble_crc32(self) -> int:
        """The preamble's checksum; it identifies the whole contents."""
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
    def dictionaries(self) -> Sequence[Dictionary]:
        """The dictionaries, each read when first asked for."""
        return _Dictionaries(self)

    def read(self, name: str, threads: int = 1) -> npt.NDArray[Any]:
        """A tensor in storage form (BF16 as uint16); ternary ones dequantized.

        Raises ``QMoEError``: ``not-found``, ``argument`` for a stack, or what is wrong with the
        file.
        """
        entry = self._tensor(name)
        if entry.stack:
            raise QMoEError("argument", f"{name!r} is a stack: read it with read_expert")
        with located(self._where(entry)):
            stored = self._extent(entry.extent)
            return encoding_of(entry.encoding).decode(stored, entry.item, self._plain(), threads)

    def read_expert(self, name: str, expert: int, threads: int = 1) -> npt.NDArray[Any]:
        """One expert of a stack, in storage form, as ``read`` gives a tensor."""
        entry = self._tensor(name)
        extent = self._expert(entry, expert)
        with located(self._where(entry, expert)):
            stored = self._extent(extent)
            return encoding_of(entry.encoding).decode(stored, entry.item, self._plain(), threads)

    def encoded(self, name: str, expert: int | None = None) -> EncodedMatrix:
        """A ``ternary-dict`` matrix as it is stored: views of the file.

        ``expert`` is given for a stack, and only then. Everything is checked but the segments,
        which the codec checks when it decodes them.
        """
        entry = self._tensor(name)
        if entry.encoding != TERNARY_DICT.name:
            raise QMoEError("argument", f"{name!r} is stored as {entry.encoding}: use read")
        if entry.stack == (expert is None):
            raise QMoEError("argument", f"{name!r}: give an expert's number for a stack only")
        extent = entry.extent if expert is None else self._expert(entry, expert)
        with located(self._where(entry, expert)):
            return TERNARY_DICT.matrix(self._extent(extent), entry.item, self._plain())

    def ternary_counts(self, name: str) -> tuple[int, int]:
        """(segment bytes, non-zero trits) of a ternary tensor, all experts of a stack together.

        Looks at the extents' headers only, so no checksum is checked.
        """
        entry = self._tensor(name)
        segment_bytes = nonzeros = 0
        for extent in range(entry.extent, entry.extent + entry.extent_count):
            offset, length = self._bounds(extent)
            if length < HEADER_LENGTH:
                raise QMoEError("malformed", f"{self._where(entry)}: an extent has no header")
            more, more_nonzeros = counts(self._source.view(offset, HEADER_LENGTH).tobytes())
            segment_bytes += more
            nonzeros += more_nonzeros
        if segment_bytes > entry.stored_bytes or nonzeros > entry.elements:
            raise QMoEError(
                "malformed", f"{self._where(entry)}: its headers cannot be right; run verify"
            )
        return segment_bytes, nonzeros

    def attachment(self, name: str) -> bytes:
        """The contents of an attached file."""
        try:
            entry = self.attachments[name]
        except KeyError:
            raise QMoEError(
                "not-found", f"{self.path} has no attachment {name!r}: look at .attachments"
            ) from None
        with located(f"{self.path}, attachment {name!r}"):
            stored = self._extent(entry.extent)
            return encoding_of(entry.encoding).decode(stored, entry.item, self._plain()).tobytes()

    def verify(self, progress: Progress | None = None, threads: int = 1) -> None:
        """Check every byte: checksums, padding, the contents of all extents. [C-3]

        Raises ``QMoEError`` for the first defect found; what this version does not know
        (``unsupported``) comes last, so that damage is found first.
        """
        report = progress or _silent
        dictionaries = self._plain()
        unknown: tuple[str, QMoEError] | None = None
        end = PREAMBLE_LENGTH
        for extent, (where, check) in enumerate(self._owners(dictionaries, threads)):
            offset, length = self._bounds(extent)
            with located(where):
                self._check_crc(extent, report)
                self._checked[extent] = True
                stored = self._source.view(offset, length)
                end = align(offset + length, ALIGNMENT)
                if self._source.view(offset + length, end - offset - length).any():  # [F-2]
                    raise QMoEError("padding", f"bytes after extent {extent} are not zero")
                try:
                    check(stored)
                except QMoEError as error:
                    if error.code != "unsupported":
                        raise
                    unknown = unknown or (where, error)
            del stored
            self._source.release(offset, length)
            report(end, self.file_length)
        if unknown:
            with located(unknown[0]):
                raise unknown[1]
        report(self.file_length, self.file_length)

    def _owners(
        self, dictionaries: Dictionaries, threads: int
    ) -> Iterator[tuple[str, Callable[[Bytes], None]]]:
        """For each extent in order: what it is, and how to check its contents."""
        # (first extent, number of extents, what, entry or number of a dictionary)
        owners: list[tuple[int, int, str, Any]] = []
        for number, each in enumerate(self._index.dictionaries):
            owners.append((each.extent, 1, f"dictionary {number}", number))
        for attachment in self.attachments.values():
            owners.append((attachment.extent, 1, f"attachment {attachment.name!r}", attachment))
        for tensor in self.tensors.values():
            if tensor.extent_count:
                owners.append((tensor.extent, tensor.extent_count, "", tensor))
        for _, count, what, owner in sorted(owners, key=lambda each: each[0]):
            if isinstance(owner, int):
                yield f"{self.path}, {what}", partial(self._check_tree, owner)
                continue

            def check(
                stored: Bytes, encoding: str = owner.encoding, item: Item = owner.item
            ) -> None:
                encoding_of(encoding).verify(stored, item, dictionaries, threads)

            for expert in range(count):
                if isinstance(owner, TensorEntry):
                    yield self._where(owner, expert if owner.stack else None), check
                else:
                    yield f"{self.path}, {what}", check

    def _tensor(self, name: str) -> TensorEntry:
        try:
            return self._index.tensors[name]
        except KeyError:
            raise QMoEError(
                "not-found", f"{self.path} has no tensor {name!r}: look at .tensors"
            ) from None

    def _expert(self, entry: TensorEntry, expert: int) -> int:
        """The number of an expert's extent."""
        if not entry.stack:
            raise QMoEError("argument", f"{entry.name!r} is not a stack: read it with read")
        if not 0 <= expert < entry.extent_count:
            raise QMoEError(
                "not-found",
                f"stack {entry.name!r} has no expert {expert}: it has {entry.extent_count}",
            )
        return entry.extent + expert

    def _where(self, entry: TensorEntry, expert: int | None = None) -> str:
        of_stack = "" if expert is None else f", expert {expert}"
        return f"{self.path}, tensor {entry.name!r}{of_stack}"

    def _bounds(self, extent: int) -> tuple[int, int]:
        return int(self._table.offsets[extent]), int(self._table.lengths[extent])

    def _extent(self, extent: int) -> Bytes:
        """An extent's bytes, checked when they are used the first time. [F-6]"""
        if not self._checked[extent]:
            self._check_crc(extent)
            self._checked[extent] = True
        return self._source.view(*self._bounds(extent))

    def _check_crc(self, extent: int, report: Progress | None = None) -> None:
        offset, length = self._bounds(extent)
        crc32 = 0
        for start in range(0, length, _STRIDE):
            part = min(_STRIDE, length - start)
            crc32 = zlib.crc32(self._source.view(offset + start, part).data, crc32)
            if report:
                report(offset + start + part, self.file_length)
        if crc32 != self._table.crc32[extent]:
            raise QMoEError("checksum", f"extent {extent} does not have its checksum")

    def _tree(self, number: int) -> Dictionary:
        """Dictionary ``number``, parsed once. Raises ``QMoEError`` that does not say which."""
        if (tree := self._trees.get(number)) is None:
            stored = self._extent(self._index.dictionaries[number].extent)
            tree = self._trees[number] = self._parse_tree(number, stored)
        return tree

    def _check_tree(self, number: int, stored: Bytes) -> None:
        self._trees[number] = self._parse_tree(number, stored)

    def _parse_tree(self, number: int, stored: Bytes) -> Dictionary:
        entry = self._index.dictionaries[number]
        bits = encoding_of(entry.encoding).decode(stored, entry.item, self._plain())
        tree = _parse_dictionary(entry.width, entry.signs, bits.tobytes())
        if (tree.max_length, tree.max_nonzeros) != (entry.max_length, entry.max_nonzeros):  # [D-1]
            raise QMoEError(
                "malformed",
                f"the entries have up to {tree.max_length} weights, {tree.max_nonzeros} non-zeros, "
                f"the index says {entry.max_length} and {entry.max_nonzeros}",
            )
        return tree

    def _plain(self) -> Dictionaries:
        return _Dictionaries(self, complete=False)


class _Dictionaries(Sequence["Dictionary"]):
    """A file's dictionaries; ``complete`` errors say which one it was."""

    def __init__(self, file: QMoEFile, complete: bool = True) -> None:
        self._file = file
        self._complete = complete

    def __len__(self) -> int:
        return len(self._file._index.dictionaries)

    @overload
    def __getitem__(self, number: int) -> Dictionary: ...
    @overload
    def __getitem__(self, number: slice) -> list[Dictionary]: ...
    def __getitem__(self, number: int | slice) -> Dictionary | list[Dictionary]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        if not self._complete:
            return self._file._tree(number)
        with located(f"{self._file.path}, dictionary {number}"):
            return self._file._tree(number)


@lru_cache(maxsize=64)
def _parse_dictionary(width: int, signs: str, tree: bytes) -> Dictionary:
    """Few dictionaries serve many files: walking a tree costs more than all else in opening one."""
    return codec.Dictionary.from_tree(width, signs, tree)


def _open(source: ByteSource) -> tuple[Preamble, ExtentTable, Index]:
    """Everything that is checked when a file is opened. [C-1]"""
    head = source.view(0, min(PREAMBLE_LENGTH, source.length)).tobytes()
    preamble = Preamble.parse(head, source.length)
    offset = preamble.index_offset
    tail = source.view(offset, source.length - offset)
    if zlib.crc32(tail.data) != preamble.index_crc32:  # [P-9]
        raise QMoEError("checksum", "the index does not have its checksum")
    text, rest = preamble.index_length, preamble.table_offset - offset
    if tail[text:rest].any():  # [F-2]
        raise QMoEError("padding", "bytes after the JSON text are not zero")
    table = ExtentTable.parse(tail[rest:], offset)
    return preamble, table, parse_index(tail[:text], table.lengths)


def _silent(done: int, total: int) -> None:
    pass
