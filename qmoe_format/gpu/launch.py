"""What is launched, apart from who launches it: tests run the same ``Launch`` on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    ``source``        the whole CUDA text, defines included
    ``kernel``        name of the ``extern "C"`` function in it
    ``grid, block``   numbers of blocks, and of threads in a block
    ``shared_bytes``  dynamic shared memory of a block
    ``arguments``     arrays of whoever launches, or numpy scalars, in the kernel's order
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[Any, ...]
