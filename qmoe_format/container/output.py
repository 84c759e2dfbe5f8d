"""The file or shards of a model being written: all of them appear, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from qmoe_format.atomic_file import partial_file, sync_folder
from qmoe_format.container.encodings import Encoding
from qmoe_format.container.entries import Item
from qmoe_format.container.shard_list import ListedShard, dump_shard_list, shard_name
from qmoe_format.container.shard_writer import ShardWriter
from qmoe_format.errors import QMoEError
from qmoe_format.remote import Location


class Output:
    """Where ``Writer``, which describes the arguments, writes to.

    Attributes:
        state: whether more can be written, and if not, why.
    """

    def __init__(self, target: Location, shard_bytes: int | None, generator: str) -> None:
        self._target = target
        self.state: Literal["open", "finished", "failed", "aborted"] = "open"
        self._shard_bytes = shard_bytes
        self._generator = generator
        self._shards = [self._new_shard()]

    def check_open(self) -> None:
        """Refuse to go on after the end.

        Raises:
            QMoEError: ``argument``.
        """
        if self.state != "open":
            raise QMoEError(
                "argument",
                f"{self._target}: nothing more can be written (state: {self.state})",
                "make a new one",
            )

    @property
    def shard(self) -> ShardWriter:
        """The file being written."""
        return self._shards[-1]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Write something inside; if that fails half-way, everything is discarded."""
        try:
            yield
        except BaseException:
            self.discard("failed")
            raise

    def put_first(
        self, record: dict[str, Any], encoding: Encoding, value: Any, item: Item, extents: int
    ) -> Encoding:
        """Write a tensor's first extent, into a new shard if the whole makes this one too long."""
        shard = self.shard
        used = shard.put(encoding, value, item)
        if (
            self._shard_bytes is not None
            and shard.tensors
            and shard.expected_length(record, extents) > self._shard_bytes
        ):
            shard.drop_extent()
            # Closed now: a shard that waits for its name needs no open file.
            shard.close(self._generator)
            self._shards.append(self._new_shard())
            used = self.shard.put(encoding, value, item)
        return used

    def finish(self) -> Sequence[Location]:
        """Complete all files, make them durable and name them; the first one is to be opened."""
        self.shard.close(self._generator)
        files = self._publish()
        self.state = "finished"
        sync_folder(self._target.parent)
        return files

    def discard(self, state: Literal["failed", "aborted"]) -> None:
        """Leave nothing behind unless all is finished. Does not raise."""
        if self.state != "finished":
            self.state = state
            for shard in self._shards:
                shard.partial.discard()

    def _new_shard(self) -> ShardWriter:
        return ShardWriter(self._target, renamed=self._shard_bytes is not None)

    def _publish(self) -> Sequence[Location]:
        if len(self._shards) == 1:
            self.shard.partial.publish()
            return [self._target]
        paths = []
        listed = []
        for number, shard in enumerate(self._shards, 1):
            name = shard_name(self._target, number, len(self._shards))
            listed.append(ListedShard(name, shard.partial.length, shard.preamble_crc32))
            paths.append(self._target.with_name(name))
        listing = partial_file(self._target)
        try:
            listing.write(dump_shard_list(listed))
            listing.seal()
            for path, shard in zip(paths, self._shards, strict=True):
                shard.partial.publish(path)  # type: ignore[arg-type] # both here or elsewhere
            # The shards must be durable before the file that names them.
            sync_folder(self._target.parent)
            listing.publish()
        except BaseException:
            listing.discard()
            raise
        return [self._target, *paths]
