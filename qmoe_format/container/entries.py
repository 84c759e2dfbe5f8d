"""What the index says about each thing in a file, as dataclasses (SPEC.md section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from qmoe_format.dtypes import STORAGE
from qmoe_format.errors import QMoEError

Parameter: TypeAlias = bool | int | str
NO_PARAMETERS: Mapping[str, Parameter] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Item:
    """What one extent holds once it is decoded: a tensor, or one expert of a stack.

    Attributes:
        dtype, shape: before encoding.
        parameters: the encoding's further keys in the index.
    """

    dtype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS, hash=False)

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a tensor without dimensions."""
        return math.prod(self.shape)

    @property
    def element_size(self) -> int:
        """Bytes of one element.

        Raises:
            QMoEError: ``unsupported`` if the dtype is unknown.
        """
        if self.dtype not in STORAGE:  # [T-5]
            raise QMoEError("unsupported", f"element type {self.dtype!r} is unknown")
        return STORAGE[self.dtype].itemsize

    @property
    def size(self) -> int:
        """Bytes before encoding."""
        return self.elements * self.element_size


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor, or a stack of experts.

    Attributes:
        dtype, shape: before encoding; the first dimension of a stack counts its experts.
        stack: whether this is a stack of experts.
        members: what the experts were called in the checkpoint, ``{}`` for their number; empty if
            the stack was one tensor there.
        transposed: whether the matrices of the stack were ``[in, out]`` there; in the file they are
            ``[out, in]``, like ``shape``.
        extent: number of the first extent.
        extent_count: 1, or the number of experts.
        stored_bytes: length of all extents, without alignment.
        parameters: the encoding's further keys.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    stack: bool
    members: str
    transposed: bool
    extent: int
    extent_count: int
    stored_bytes: int
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: NO_PARAMETERS, hash=False)

    @property
    def item(self) -> Item:
        """What one extent holds: the tensor, or an expert."""
        return Item(self.dtype, self.shape[1:] if self.stack else self.shape, self.parameters)

    @property
    def elements(self) -> int:
        """Number of elements of all experts."""
        return math.prod(self.shape)

    def label(self, expert: int) -> str:
        """What an error message calls the tensor, or one of its experts."""
        return f"tensor {self.name!r}" + (f", expert {expert}" if self.stack else "")


class _ByteEntry:
    """What attachments and dictionaries share: they are some bytes, in one extent."""

    __slots__ = ()
    size: int
    extent_count = 1

    @property
    def item(self) -> Item:
        """What the extent holds."""
        return Item("U8", (self.size,))


@dataclass(frozen=True, slots=True)
class AttachmentEntry(_ByteEntry):
    """An attached file of ``size`` bytes, which takes ``stored_bytes``."""

    name: str
    size: int
    encoding: str
    extent: int
    stored_bytes: int

    def label(self, _: int = 0) -> str:
        """What an error message calls it."""
        return f"attachment {self.name!r}"


@dataclass(frozen=True, slots=True)
class DictionaryEntry(_ByteEntry):
    """Dictionary ``number`` of a file, whose tree has ``size`` bytes."""

    number: int
    size: int
    encoding: str
    extent: int
    width: int
    max_length: int
    max_ones: int

    def label(self, _: int = 0) -> str:
        """What an error message calls it."""
        return f"dictionary {self.number}"


Entry: TypeAlias = TensorEntry | AttachmentEntry | DictionaryEntry
