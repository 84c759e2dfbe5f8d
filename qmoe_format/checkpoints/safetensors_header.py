"""Where the tensors of a ``.safetensors`` file lie, for files that the library cannot open."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from qmoe_format.checkpoints.tensor_info import ELEMENT_BYTES
from qmoe_format.remote import RemotePath

_MAX_HEADER = 100_000_000  # bytes, as in the library


class StoredTensor(NamedTuple):
    """``begin`` and ``end`` count bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: RemotePath) -> dict[str, StoredTensor]:
    """The tensors by name; they follow each other without a gap.

    Raises:
        QMoEError: ``not-found``, ``io``.
        ValueError, LookupError, TypeError, AttributeError, RecursionError: for another file.
    """
    size = path.size()
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int.from_bytes(path.read(0, 8), "little")
    if length > min(_MAX_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(path.read(8, length))
    header.pop("__metadata__", None)
    found = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: item[1][2:]):
        if tensor.begin != end:
            raise ValueError(f"{name!r} begins at byte {tensor.begin}, not at {end}")
        end = tensor.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return found


def _tensor(name: str, entry: dict[str, Any], first: int) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"the entry of {name!r} is wrong")
    if dtype in ELEMENT_BYTES and end - begin != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise ValueError(f"{name!r} has {end - begin} bytes, not those of {dtype} {shape}")
    return StoredTensor(dtype, tuple(shape), first + begin, first + end)
