"""Sharded safetensors, written one tensor at a time.

The safetensors library needs a whole shard in memory. The file is a JSON header followed by the
tensors' bytes, so that streaming takes a few lines.

All functions raise ``QMoEError("duplicate")`` if two tensors have one name or a file exists
already, and ``OSError`` if the operating system refuses.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qmoe_format.dtypes import STORAGE
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to write; ``parts`` makes its elements, in arrays of the storage dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


def write_sharded(
    folder: Path, tensors: Iterable[OutputTensor], shard_bytes: int, counter: Counter
) -> None:
    """Write ``model-00001-of-0000N.safetensors`` … and their index into ``folder``.

    Args:
        folder: existing.
        tensors: in the order of the shards.
        shard_bytes: most bytes of tensors in one file, unless a single tensor has more.
        counter: counts the bytes of tensors.
    """
    shards: list[list[OutputTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    shards = shards or [[]]
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        for tensor in shard:
            _add(weight_map, tensor.name, file)
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, counter)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_new(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode() + b"\n")


def write_safetensors(path: Path, tensors: Sequence[OutputTensor], counter: Counter) -> None:
    """Write one safetensors file, largest elements first, so that all are aligned."""
    tensors = sorted(tensors, key=lambda tensor: -STORAGE[tensor.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset := offset + tensor.nbytes]
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        _add(header, tensor.name, entry)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            start = file.tell()
            for part in tensor.parts():
                file.write(part.reshape(-1).view(np.uint8).data)
            written = file.tell() - start
            assert written == tensor.nbytes, f"{tensor.name}: wrote {written} bytes"
            counter.add(tensor.nbytes)


def write_new(path: Path, data: bytes) -> None:
    """Write a whole file durably."""
    with _new_file(path) as file:
        file.write(data)


def _add(tensors: dict[str, Any], name: str, entry: Any) -> None:
    if name in tensors:
        raise QMoEError("duplicate", f"two tensors would have the name {name!r}")
    tensors[name] = entry


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("xb")
    except FileExistsError as error:
        raise QMoEError("duplicate", f"two files would have the name {path.name!r}") from error
    with file:
        yield file
        file.flush()
        os.fsync(file.fileno())
