"""Writing ``.qmoe`` files: one pass, in bounded memory, whole or not at all.

``Writer`` decides what may be written, in which order and under which names; the bytes of each file
are ``file_writer``'s affair.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qmoe_format import codec
from qmoe_format._version import __version__
from qmoe_format.atomic_file import PartialFile, check_target, sync_folder
from qmoe_format.container import canonical_json, limits
from qmoe_format.container.encodings import ENCODINGS, ZSTD, Encoding
from qmoe_format.container.entries import Item, Parameter
from qmoe_format.container.extent_writer import FileWriter, check_limit
from qmoe_format.container.index import check_file_name, parse_tensor
from qmoe_format.container.shards import Shard, dump_shards
from qmoe_format.dtypes import STORAGE
from qmoe_format.errors import QMoEError

Value: TypeAlias = npt.NDArray[Any] | codec.EncodedMatrix


class Writer:
    """Writes ``path``; nothing stands under that name before ``finish``.

        with Writer("model.qmoe") as writer:
            writer.add_tensor("embed", bits, "BF16")
            with writer.add_stack("wi", (8, 320, 96), "BF16", "ternary-dict") as stack:
                for matrix in matrices:
                    stack.append(matrix)

    Leaving the block finishes the file; leaving it by an exception leaves nothing. A call that is
    refused (``argument``, ``duplicate``) changes nothing; after one that failed half-way (``io``,
    ``limit``) the file is given up and ``finish`` raises, too.

    ``shard_bytes``: begin another file before a tensor that would make the present one longer. No
    tensor is cut. The length of a stack is reckoned from its first expert, so a shard may become
    somewhat longer; one with a single tensor has the length it has. If all fits in one file,
    ``path`` is an ordinary file, otherwise the text file that names the shards, which lie beside it
    as ``NAME-00001-of-00003.qmoe``. Each of these files is replaced at one stroke, the text file
    last; a crash between two of these renames leaves a set that says ``checksum``.

    Raises ``QMoEError``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shard_bytes: int | None = None,
        *,
        generator: str = f"qmoe-format {__version__}",
    ) -> None:
        self._target = check_target(path)
        self._shard_bytes = shard_bytes
        self._stem = file_stem(self._target)
        if shard_bytes is not None:
            if shard_bytes < 1:
                raise QMoEError(
                    "argument", f"shards of {shard_bytes} bytes cannot be written: give 1 or more"
                )
            with _as_argument("shards take their names from the path"):
                check_file_name(f"{self._stem}-00001-of-00001.qmoe")
        canonical_json.dumps(generator)
        self._generator = generator
        self._names: set[str] = set()
        self._attached: set[str] = set()
        self._full: list[FileWriter] = []
        self._stack: StackWriter | None = None
        self._state = "open"
        self._files: list[Path] = []
        self._file = FileWriter(self._target)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abort()
        elif self._state in ("open", "failed"):  # a failure that was caught inside is not forgotten
            self.finish()

    @property
    def files(self) -> Sequence[Path]:
        """After ``finish``: the files written, the one to open first."""
        return tuple(self._files)

    def add_tensor(self, name: str, value: Value, dtype: str, encoding: str = "zstd") -> None:
        """Add a tensor that is no stack.

        ``value``: an array in storage form (BF16 as uint16), or an ``EncodedMatrix`` for
        ``ternary-dict``.
        ``zstd`` becomes ``raw`` where it saves nothing.
        """
        self._check_open()
        coder = _encoding(encoding)
        if isinstance(value, codec.EncodedMatrix):
            shape: tuple[int, ...] = (value.rows, value.columns)
        else:
            shape = np.shape(value)
        record = _record(name, shape, dtype, coder, coder.parameters_of(value))
        item = self._check_tensor(record)
        coder.check_value(value, item)
        with _Step(self):
            coder = self._put_first(coder, value, item, 1, len(canonical_json.dumps(record)))
            self._file.add_record(record | {"encoding": coder.name}, 1)
            self._names.add(name)

    def add_stack(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        encoding: str = "zstd",
        members: str = "",
        **parameters: Parameter,
    ) -> StackWriter:
        """Begin a stack; ``shape[0]`` experts are to be appended before anything else is added.

        ``members``: what the experts were called in the checkpoint, ``{}`` for the number.
        ``parameters``: the encoding's further keys; the others come from the first expert.
        ``zstd`` becomes ``raw`` if it saves nothing on the first expert.
        """
        self._check_open()
        coder = _encoding(encoding)
        record = _record(name, shape, dtype, coder, parameters, stack=True, members=members)
        self._check_tensor(record)
        return StackWriter(self, record, coder, frozenset(parameters))

    def add_attachment(self, name: str, data: bytes) -> None:
        """Attach a small file under its own name."""
        self._check_open()
        with _as_argument("rename the file"):
            check_file_name(name)
        if name in self._attached:
            raise QMoEError(
                "duplicate", f"attachment {name!r} is in {self._target} already: rename it"
            )
        check_limit(self._target, "attachments", len(self._attached) + 1, limits.ENTRIES)
        content = np.frombuffer(data, np.uint8)
        with _Step(self):
            extent, coder = self._file.put_smallest(ZSTD, content, Item("U8", content.shape))
            self._file.attachments.append(
                {"bytes": content.size, "encoding": coder.name, "extent": extent, "name": name}
            )
            self._attached.add(name)

    def finish(self) -> None:
        """Make the file whole, durable and visible. Called by leaving the ``with`` block."""
        try:
            self._check_open()
            for file in (*self._full, self._file):
                file.close(self._generator)
            self._publish()
            self._state = "finished"
            sync_folder(self._target.parent)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Leave nothing behind; what stands under the final name stays. Does not raise."""
        if self._state != "finished":
            self._state = "aborted"
            for file in (*self._full, self._file):
                file.partial.discard()

    def _fail(self) -> None:
        self.abort()
        self._state = "failed"

    def _publish(self) -> None:
        if not self._full:
            self._file.partial.publish()
            self._files = [self._target]
            return
        shards = []
        files = [*self._full, self._file]
        listing = PartialFile(self._target)
        try:
            for number, file in enumerate(files, 1):
                name = f"{self._stem}-{number:05}-of-{len(files):05}.qmoe"
                shards.append(Shard(name, file.partial.length, file.preamble_crc32))
            listing.write(dump_shards(shards))
            listing.seal()
            for shard, file in zip(shards, files, strict=True):
                file.partial.publish(self._target.with_name(shard.file))
            # The shards have to be there for good before the file that names them.
            sync_folder(self._target.parent)
            listing.publish()
        except BaseException:
            listing.discard()
            raise
        self._files = [self._target, *(self._target.with_name(each.file) for each in shards)]

    def _check_open(self) -> None:
        if self._state != "open":
            raise self._closed()
        if self._stack is not None:
            raise QMoEError(
                "argument",
                f"stack {self._stack.name!r} has {self._stack.count} of {self._stack.experts} "
                "experts: append the others first",
            )

    def _closed(self) -> QMoEError:
        return QMoEError(
            "argument", f"the writer of {self._target} is {self._state}: open a new Writer"
        )

    def _check_tensor(self, record: dict[str, Any]) -> Item:
        """By the rules of a reader; returns what one extent is to hold."""
        if record["dtype"] not in STORAGE:
            raise QMoEError(
                "argument",
                f"there is no element type {record['dtype']!r}: take one of {', '.join(STORAGE)}",
            )
        with _as_argument("it cannot be written"):
            entry = parse_tensor(record)
        canonical_json.dumps(record)
        if entry.name in self._names:
            raise QMoEError(
                "duplicate", f"tensor {entry.name!r} is in {self._target} already: rename it"
            )
        check_limit(self._target, "tensors", len(self._names) + 1, limits.ENTRIES)
        return entry.item

    def _put_first(
        self, coder: Encoding, value: Any, item: Item, experts: int, index_bytes: int
    ) -> Encoding:
        """Write a tensor's first extent, in another shard if the whole would be too long here."""
        mark = self._file.mark()
        _, used = self._file.put_smallest(coder, value, item)
        if self._shard_bytes is not None and self._file.records:
            expected = self._file.expected_length(experts, index_bytes)
            if expected > self._shard_bytes:
                self._file.undo(mark)
                # Closed now: a shard that waits for its name needs no open file.
                self._file.close(self._generator)
                self._full.append(self._file)
                self._file = FileWriter(self._target)
                self._file.put_smallest(coder, value, item)
        return used


class StackWriter:
    """Takes the experts of a stack, in order; made by ``Writer.add_stack``.

    As a context manager it makes sure, on leaving, that all experts have come.
    """

    def __init__(
        self, writer: Writer, record: dict[str, Any], coder: Encoding, given: frozenset[str]
    ) -> None:
        self._writer = writer
        self._record = record
        self._coder = coder
        self._given = given
        self.name: str = record["name"]
        self.experts: int = record["shape"][0]
        self.count = 0
        writer._names.add(self.name)
        if self.experts:
            writer._stack = self
        else:
            writer._file.add_record(record, 0)

    def __enter__(self) -> StackWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._writer._fail()

    def append(self, value: Value) -> None:
        """Write the next expert: an array in storage form, or an ``EncodedMatrix``."""
        writer = self._writer
        if self.count == self.experts:
            raise QMoEError(
                "argument",
                f"stack {self.name!r} has all its {self.experts} experts: declare more experts in "
                "the shape",
            )
        if writer._state != "open":
            raise writer._closed()
        record = self._record
        if self.count == 0:
            for key, asked in self._coder.parameters_of(value).items():
                if key not in self._given:
                    record = record | {key: asked}
        parameters = {key: record[key] for key in self._coder.defaults}
        item = Item(record["dtype"], tuple(record["shape"][1:]), parameters)
        self._coder.check_value(value, item)
        with _Step(writer):
            if self.count == 0:
                size = len(canonical_json.dumps(record))
                self._coder = writer._put_first(self._coder, value, item, self.experts, size)
                record["encoding"] = self._coder.name
                self._record = record
            else:
                writer._file.put(self._coder, value, item)
            self.count += 1
            if self.count == self.experts:
                writer._file.add_record(record, self.experts)
                writer._stack = None

    def close(self) -> None:
        """Raise ``QMoEError("argument")`` if experts are missing."""
        if self.count != self.experts:
            self._writer._fail()
            raise QMoEError(
                "argument",
                f"stack {self.name!r} got {self.count} of {self.experts} experts: append all, or "
                "declare fewer in the shape",
            )


def file_stem(path: Path) -> str:
    """What the names of the files beside it begin with: its own name without suffix."""
    return path.name.removesuffix(".json").removesuffix(".qmoe")


class _Step:
    """A change of the file: if it fails half-way, the writer is of no more use."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._writer._fail()


class _as_argument:
    """What would be ``malformed`` in a file is a wrong ``argument`` of a call."""

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, QMoEError):
            code = "argument" if error.code == "malformed" else error.code
            raise QMoEError(code, f"{error}: {self._advice}") from error


def _encoding(name: str) -> Encoding:
    if name not in ENCODINGS:
        known = ", ".join(ENCODINGS)
        raise QMoEError("argument", f"there is no encoding {name!r}: take one of {known}")
    return ENCODINGS[name]


def _record(
    name: str,
    shape: Sequence[int],
    dtype: str,
    coder: Encoding,
    parameters: dict[str, Parameter],
    stack: bool = False,
    members: str = "",
) -> dict[str, Any]:
    return {
        **coder.defaults,
        **parameters,
        "dtype": dtype,
        "encoding": coder.name,
        "extent": 0,
        "members": members,
        "name": name,
        "shape": [operator.index(side) for side in shape],
        "stack": stack,
    }
