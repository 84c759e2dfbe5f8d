"""Writing ``.qmoe`` files: one pass, bounded memory, complete or not at all.

A value goes straight down: ``StackWriter`` checks it, ``Output`` chooses the shard, ``ShardWriter``
begins an extent, and the encoding writes into it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qmoe_format._version import __version__
from qmoe_format.atomic_file import check_target
from qmoe_format.container import canonical_json, limits
from qmoe_format.container.encodings import ENCODINGS, Encoding
from qmoe_format.container.entries import Item, Parameter
from qmoe_format.container.index import check_file_name, parse_tensor
from qmoe_format.container.output import Output
from qmoe_format.container.shard_list import shard_name
from qmoe_format.container.shard_writer import check_limit
from qmoe_format.dtypes import STORAGE
from qmoe_format.errors import QMoEError
from qmoe_format.remote import Location, RemotePath


class Writer:
    """Writes a ``.qmoe`` file, or shards; nothing has its final name before ``finish``.

    As a context manager it finishes the file on leaving; an exception leaves nothing behind. A call
    that is refused (``argument``, ``duplicate``) changes nothing. After one that failed half-way
    (``io``, ``limit``) everything is discarded, and ``finish`` raises, too.

    A shard never contains part of a tensor. The length of a stack is estimated from its first
    expert, so a shard may become somewhat longer than asked for; a single tensor may be longer than
    a shard. If everything fits into one file, ``path`` is an ordinary file; otherwise it is the
    text file that names the shards, which lie beside it as ``NAME-00001-of-00003.qmoe``. Each of
    these files is replaced atomically, the text file last; a crash between two of these renames
    leaves a set that is reported as ``checksum``.

    Args:
        path: of the file to write, or its URL (see ``qmoe_format.remote``). To S3 it goes while it
            is written; for other file systems, it or a shard lies in a temporary file first.
        shard_bytes: begin another shard before a tensor that would make the current one longer;
            None: write one file.
        generator: what the index says about the program that writes.

    Attributes:
        files: the files written, first the one to open; empty before ``finish``.

    Raises:
        QMoEError: ``argument``; ``io``; for a URL also ``dependency`` and ``not-found``.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from qmoe_format import Writer
        >>> from qmoe_format.codec import encode_matrix
        >>> levels = np.array([[0, 1, 0, -1], [0, 0, 1, 0]], np.int8)
        >>> low_high = np.array([[0xBF00, 0x3E80], [0xBF80, 0x4000]], np.uint16)  # bf16
        >>> matrix = encode_matrix(levels, low_high)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Writer(folder + "/model.qmoe") as writer:
        ...         writer.add_tensor("norm.weight", np.ones(4, np.float32), "F32")
        ...         with writer.add_stack("experts", (2, 2, 4), "F32", "int-dict") as stack:
        ...             stack.append(matrix)
        ...             stack.append(matrix)
        ...     [path.name for path in writer.files]
        ['model.qmoe']
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | RemotePath,
        shard_bytes: int | None = None,
        *,
        generator: str = f"qmoe-format {__version__}",
    ) -> None:
        target = check_target(path)
        if shard_bytes is not None:
            if shard_bytes < 1:
                raise QMoEError(
                    "argument", f"a shard cannot have {shard_bytes} bytes", "give 1 or more"
                )
            with _as_argument("shards take their names from the path: give another one"):
                check_file_name(shard_name(target, 1, 1))
        canonical_json.dumps(generator)
        self._target = target
        self._tensors: set[str] = set()
        self._attachments: set[str] = set()
        self._stack: StackWriter | None = None
        self.files: Sequence[Location] = ()
        self._output = Output(target, shard_bytes, generator)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.abort()
        elif self._output.state in ("open", "failed"):  # a failure caught inside is not forgotten
            self.finish()

    def add_tensor(self, name: str, value: Any, dtype: str, encoding: str = "zstd") -> None:
        """Add a tensor that is not a stack.

        Args:
            name: of the tensor.
            value: an array in storage form (BF16 as uint16), or an ``EncodedMatrix`` for
                ``int-dict``.
            dtype: element type, such as ``BF16``.
            encoding: ``raw``, ``zstd`` (``raw`` where that saves nothing) or ``int-dict``.

        Raises:
            QMoEError: ``argument``; ``duplicate``; ``limit``; ``io``.
        """
        coder = _encoding(encoding)
        tensor = self._begin(name, np.shape(value), dtype, coder, coder.parameters_of(value))
        tensor.append(value)
        self._tensors.add(name)

    def add_stack(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        encoding: str = "zstd",
        members: str = "",
        *,
        transposed: bool = False,
        **parameters: Parameter,
    ) -> StackWriter:
        """Begin a stack; all its experts must be appended before anything else is added.

        Args:
            name: of the stack.
            shape: experts, then the shape of one.
            dtype: element type.
            encoding: as for ``add_tensor``; ``zstd`` becomes ``raw`` if it saves nothing on the
                first expert.
            members: what the experts were called in the checkpoint, ``{}`` for the number.
            transposed: whether the checkpoint had the last two dimensions the other way round;
                ``unpack`` turns them back.
            parameters: further keys of the encoding; the others come from the first expert.

        Raises:
            QMoEError: ``argument``; ``duplicate``; ``limit``.
        """
        stack = self._begin(
            name, shape, dtype, _encoding(encoding), parameters, members, True, transposed
        )
        self._tensors.add(name)
        self._stack = stack
        return stack

    def add_attachment(self, name: str, data: bytes) -> None:
        """Attach a small file under its own name.

        Raises:
            QMoEError: ``argument``; ``duplicate``; ``limit``; ``io``.
        """
        self._check_open()
        with _as_argument("rename the file"):
            check_file_name(name)
        self._check_new("attachment", name, self._attachments)
        with self._output.changing():
            self._output.shard.add_attachment(name, data)
        self._attachments.add(name)

    def finish(self) -> None:
        """Complete the file, make it durable and visible. Leaving the ``with`` block does this.

        Raises:
            QMoEError: ``argument`` if a stack lacks experts, or the writer has failed, finished or
                been aborted; ``limit``; ``io``.
        """
        try:
            self._check_open()
            self.files = self._output.finish()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Leave nothing behind; what has the final name stays. Does not raise."""
        self._output.discard("aborted")

    def _begin(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        encoding: Encoding,
        parameters: Mapping[str, Parameter],
        members: str = "",
        stack: bool = False,
        transposed: bool = False,
    ) -> StackWriter:
        """Check a new tensor by the rules of a reader."""
        self._check_open()
        record = {
            **encoding.defaults,
            **parameters,
            "dtype": dtype,
            "encoding": encoding.name,
            "extent": 0,
            "members": members,
            "name": name,
            "shape": [operator.index(side) for side in shape],
            "stack": stack,
            "transposed": transposed,
        }
        if dtype not in STORAGE:
            raise QMoEError(
                "argument", f"element type {dtype!r} is unknown", f"use one of {', '.join(STORAGE)}"
            )
        with _as_argument("give what the format allows"):
            item = parse_tensor(record).item
        canonical_json.dumps(record)
        self._check_new("tensor", name, self._tensors)
        return StackWriter(self._output, record, item, encoding, parameters)

    def _check_new(self, what: str, name: str, names: set[str]) -> None:
        if name in names:
            raise QMoEError(
                "duplicate", f"{self._target}: there already is {what} {name!r}", "rename it"
            )
        check_limit(self._target, f"{what}s", len(names) + 1, limits.ENTRIES)

    def _check_open(self) -> None:
        self._output.check_open()
        if self._stack is not None:
            self._stack.check_complete("append the others first")


class StackWriter:
    """Takes the experts of a stack, in order; made by ``Writer.add_stack``.

    As a context manager it checks, on leaving, that all experts have been appended.

    Attributes:
        name: of the stack.
        experts: how many are to be appended.
        count: how many have been.
    """

    def __init__(
        self,
        output: Output,
        record: dict[str, Any],
        item: Item,
        encoding: Encoding,
        given: Mapping[str, Parameter],
    ) -> None:
        self.name: str = record["name"]
        self.experts: int = record["shape"][0] if record["stack"] else 1
        self.count = 0
        self._output = output
        self._record = record
        self._item = item
        self._encoding = encoding
        self._given = given
        if not self.experts:
            output.shard.add_tensor(record, 0)

    def __enter__(self) -> StackWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._output.discard("failed")

    def append(self, value: Any) -> None:
        """Write the next expert.

        Args:
            value: an array in storage form, or an ``EncodedMatrix`` for ``int-dict``.

        Raises:
            QMoEError: ``argument`` if it does not fit the stack; ``limit``; ``io``.
        """
        if self.count == self.experts:
            raise QMoEError(
                "argument",
                f"stack {self.name!r} has all its {self.experts} experts",
                "declare more experts in the shape",
            )
        self._output.check_open()
        encoding, item = self._encoding, self._item
        if not self.count:
            parameters = {**encoding.defaults, **encoding.parameters_of(value), **self._given}
            item = Item(item.dtype, item.shape, parameters)
        encoding.check_value(value, item)
        output = self._output
        with output.changing():
            if self.count:
                output.shard.put(encoding, value, item, settled=True)
            else:
                record = self._record | dict(item.parameters)
                used = output.put_first(record, encoding, value, item, self.experts)
                self._record = record | {"encoding": used.name}
                self._encoding, self._item = used, item
            self.count += 1
            if self.count == self.experts:
                output.shard.add_tensor(self._record, self.experts)

    def close(self) -> None:
        """Check that no expert is missing.

        Raises:
            QMoEError: ``argument``; then the writer has failed.
        """
        try:
            self.check_complete("append all, or declare fewer in the shape")
        except QMoEError:
            self._output.discard("failed")
            raise

    def check_complete(self, advice: str) -> None:
        """Refuse if experts are missing.

        Raises:
            QMoEError: ``argument``.
        """
        if self.count != self.experts:
            raise QMoEError(
                "argument",
                f"stack {self.name!r} has {self.count} of {self.experts} experts",
                advice,
            )


@contextmanager
def _as_argument(advice: str) -> Iterator[None]:
    """Turn what is ``malformed`` in a file into a wrong ``argument`` of a call."""
    try:
        yield
    except QMoEError as error:
        code = "argument" if error.code == "malformed" else error.code
        raise QMoEError(code, error.problem, advice) from error


def _encoding(name: str) -> Encoding:
    if name not in ENCODINGS:
        raise QMoEError(
            "argument", f"encoding {name!r} is unknown", f"use one of {', '.join(ENCODINGS)}"
        )
    return ENCODINGS[name]
