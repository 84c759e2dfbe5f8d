"""Sharded safetensors, written one tensor at a time.

The safetensors library wants a whole shard in memory; the file is a JSON header followed by the
tensors' bytes, so streaming takes a few lines. Needs numpy only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qmoe_format.dtypes import STORAGE
from qmoe_format.errors import QMoEError

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to write; ``parts`` gives its elements in order, in arrays of the storage dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


def write_sharded(
    folder: Path,
    tensors: Iterable[OutputTensor],
    shard_bytes: int,
    written: Callable[[OutputTensor], None] = lambda tensor: None,
) -> None:
    """Write ``model-00001-of-0000N.safetensors`` … and their index into ``folder``.

    A shard has at most ``shard_bytes`` of tensors, or one that is larger.

    Raises:
        QMoEError: ``duplicate`` if two tensors have one name, or a file is there already.
        OSError: the operating system refused.
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
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        for tensor in shard:
            if tensor.name in weight_map:
                raise QMoEError("duplicate", f"two tensors would have the name {tensor.name!r}")
            weight_map[tensor.name] = file
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, written)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_new(folder / INDEX_NAME, json.dumps(index, indent=2).encode() + b"\n")


def write_safetensors(
    path: Path,
    tensors: Sequence[OutputTensor],
    written: Callable[[OutputTensor], None] = lambda tensor: None,
) -> None:
    """Write one safetensors file; largest elements first, so that all are aligned.

    Raises as ``write_sharded``.
    """
    tensors = sorted(tensors, key=lambda tensor: -STORAGE[tensor.dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        if tensor.name in header:
            raise QMoEError("duplicate", f"two tensors would have the name {tensor.name!r}")
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _create(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            start = file.tell()
            for part in tensor.parts():
                file.write(part.reshape(-1).view(np.uint8).data)
            if file.tell() != start + tensor.nbytes:
                raise AssertionError(f"{tensor.name}: wrote {file.tell() - start} bytes")
            written(tensor)
        file.flush()
        os.fsync(file.fileno())


def write_new(path: Path, data: bytes) -> None:
    """Write a file durably; ``duplicate`` if there is one already."""
    with _create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _create(path: Path) -> BinaryIO:
    try:
        return path.open("xb")
    except FileExistsError as error:
        raise QMoEError("duplicate", f"two files would have the name {path.name!r}") from error
