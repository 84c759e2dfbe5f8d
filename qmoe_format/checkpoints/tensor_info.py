"""What a weight file says about a tensor without reading it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qmoe_format.dtypes import STORAGE

ELEMENT_BYTES = {name: dtype.itemsize for name, dtype in STORAGE.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as weight file number ``shard`` describes it; ``dtype`` as in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return self.elements * ELEMENT_BYTES[self.dtype]
