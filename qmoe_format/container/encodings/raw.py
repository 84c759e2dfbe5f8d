"""Encoding ``raw``: a tensor's bytes as they are (SPEC.md section 4)."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from qmoe_format.container.encodings.base import Encoding, GetDictionary, Sink, as_array, as_bytes
from qmoe_format.container.entries import Item
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError


class Raw(Encoding):
    """Bytes as they are; decoding gives a read-only view of the file."""

    name = "raw"

    def check_length(self, length: int, item: Item) -> None:
        if length != item.size:
            raise QMoEError("malformed", f"{length} bytes are stored, not {item.size}")

    def decode(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> npt.NDArray[Any]:
        self.check_length(stored.size, item)
        return as_array(stored, item)

    def encode(self, value: npt.NDArray[Any], item: Item, sink: Sink) -> None:
        sink.write(as_bytes(value).data)
