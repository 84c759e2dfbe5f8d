"""What the index says about each thing in a file, as dataclasses (SPEC.md section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qmoe_format.dtypes import STORAGE
from qmoe_format.errors import QMoEError

Parameter = bool | int | str
NO_PARAMETERS: Mapping[str, Parameter] = MappingProxyType({})


def _none() -> Mapping[str, Parameter]:
    return NO_PARAMETERS


@dataclass(frozen=True, slots=True)
class Item:
    """What one extent holds once it is decoded: a tensor, or one expert of a stack.

    ``dtype`` and ``shape`` are those before encoding; ``parameters`` are the encoding's further
    keys in the index.
    """

    dtype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=_none, hash=False)

    @property
    def elements(self) -> int:
        """Their number; 1 for a tensor without dimensions."""
        return math.prod(self.shape)

    @property
    def element_size(self) -> int:
        """Bytes of one element; raises ``QMoEError("unsupported")`` if the dtype is unknown."""
        if self.dtype not in STORAGE:  # [T-4]
            raise QMoEError("unsupported", f"element type {self.dtype!r} is unknown")
        return STORAGE[self.dtype].itemsize

    @property
    def size(self) -> int:
        """Bytes before encoding."""
        return self.elements * self.element_size


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor, or a stack of experts (``stack``: the first dimension counts them).

    ``members``: what the experts were called in the checkpoint, ``{}`` for their number; empty if
    the stack was one tensor there. ``parameters``: the encoding's further keys. ``stored_bytes``:
    the extents' lengths together, without alignment.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    stack: bool
    members: str
    extent: int
    extent_count: int
    stored_bytes: int
    parameters: Mapping[str, Parameter] = field(default_factory=_none, hash=False)

    @property
    def item(self) -> Item:
        """What one extent holds: the tensor, or an expert."""
        return Item(self.dtype, self.shape[1:] if self.stack else self.shape, self.parameters)

    @property
    def elements(self) -> int:
        """Number of elements, all experts together."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class AttachmentEntry:
    """A small file that travels along: ``size`` bytes, ``stored_bytes`` of them in the file."""

    name: str
    size: int
    encoding: str
    extent: int
    stored_bytes: int

    @property
    def item(self) -> Item:
        """What the extent holds: the file's bytes."""
        return Item("U8", (self.size,))


@dataclass(frozen=True, slots=True)
class DictionaryEntry:
    """A dictionary: where its tree of ``size`` bytes is, and what is said about it."""

    size: int
    encoding: str
    extent: int
    width: int
    signs: str
    max_length: int
    max_nonzeros: int

    @property
    def item(self) -> Item:
        """What the extent holds: the tree's bytes."""
        return Item("U8", (self.size,))
