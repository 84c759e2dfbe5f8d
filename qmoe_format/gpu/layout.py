"""A stack of matrices as the kernels read it: several arrays in one buffer. Pure numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]

ALIGNMENT = 256  # of an array in the buffer
# The kernels count the weights of one segment or row, and the bits of a segment, in 32 bits.
MAX_WEIGHTS = 1 << 26
MAX_SEGMENT_BYTES = 1 << 27


@dataclass(frozen=True, slots=True, eq=False)  # by identity: a key that is hashed fast
class Layout:
    """What all matrices of a stack have in common, and where its arrays are.

    Attributes:
        units: parts of a matrix that are multiplied one by one: segments, or rows.
        places: offset in bytes, numpy dtype and shape of each array, by name, in the order of the
            kernels' parameters.
        bytes: size of the whole buffer.
    """

    experts: int
    rows: int
    columns: int
    units: int
    places: dict[str, tuple[int, np.dtype[Any], Shape]]
    bytes: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' parameters after the arrays."""
        return self.experts, self.rows, self.columns

    def arrays(self, buffer: Any) -> dict[str, Any]:
        """The arrays, as views of ``buffer`` uint8 [bytes]."""
        views = {}
        for name, (offset, dtype, shape) in self.places.items():
            size = math.prod(shape) * dtype.itemsize
            views[name] = buffer[offset : offset + size].view(dtype).reshape(shape)
        return views


def places(
    shapes: dict[str, tuple[Any, Shape]],
) -> tuple[dict[str, tuple[int, np.dtype[Any], Shape]], int]:
    """``places`` and ``bytes`` of a layout whose arrays have these dtypes and shapes."""
    found, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        found[name] = (end, np.dtype(dtype), shape)
        end = align(end + math.prod(shape) * np.dtype(dtype).itemsize + 1, ALIGNMENT)
    return found, end


def align(size: int, step: int) -> int:
    """The smallest multiple of ``step`` that is not below ``size``."""
    return -(-size // step) * step
