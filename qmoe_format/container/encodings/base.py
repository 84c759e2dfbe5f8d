"""What every encoding is, and what the container lends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from qmoe_format.container.entries import Item, Parameter
from qmoe_format.dtypes import STORAGE, Bytes
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary

GetDictionary: TypeAlias = "Callable[[int], Dictionary]"
"""A file's dictionary of this number, read when first asked for; ``malformed`` if there is none."""


class Sink(Protocol):
    """Where an encoding writes its extent."""

    @property
    def length(self) -> int:
        """Bytes of the extent so far."""

    def write(self, data: bytes | memoryview) -> None:
        """Append."""

    def restart(self) -> None:
        """Discard what was written of this extent."""

    def dictionary_number(self, dictionary: Dictionary) -> int:
        """The number of this dictionary in the file; it is added if it is new."""


@dataclass(frozen=True, slots=True)
class Payload:
    """What the headers of a tensor's extents tell.

    Attributes:
        bytes: that hold weights: not scales, lengths or headers.
        nonzeros: number of weights that are not zero; None if the encoding does not tell.
        refinement_bytes: those of them that hold magnitudes above 1.
        refinement_zeros, refinement_ones: bits of the strings that these encode.
    """

    bytes: int
    nonzeros: int | None = None
    refinement_bytes: int = 0
    refinement_zeros: int = 0
    refinement_ones: int = 0

    def __add__(self, other: Payload) -> Payload:
        sums: Any = (
            None if a is None or b is None else a + b
            for a, b in zip(astuple(self), astuple(other), strict=True)
        )
        return Payload(*sums)


class Encoding(ABC):
    """One way to store a tensor, or an expert of a stack, in an extent.

    A value to be stored, or one in its stored form, is an array in storage form (BF16 as uint16) or
    another object with a ``shape``, such as an ``EncodedMatrix``.

    Attributes:
        name: what the index calls it.
        defaults: the further keys of a tensor's entry, with their default values. An encoding that
            has any is for tensors only.
        header_bytes: the most bytes at the beginning of an extent that ``payload`` reads. 0: it is
            not called, everything is payload, and nothing else is known.
        multipliable: whether ``codec`` and ``gpu`` multiply by what ``encoded`` returns.
        raw_if_larger: whether a writer stores ``raw`` instead where this saves nothing.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Parameter]] = {}
    header_bytes: ClassVar[int] = 0
    multipliable: ClassVar[bool] = False
    raw_if_larger: ClassVar[bool] = False

    def check_entry(self, item: Item) -> None:  # noqa: B027 -- most have nothing to check
        """Check dtype, shape and parameters when a file is opened or a tensor is begun.

        The parameters' keys and kinds are right already.

        Raises:
            QMoEError: ``limit``, ``malformed``, ``unsupported``.
        """

    def check_length(self, length: int, item: Item) -> None:  # noqa: B027
        """Check an attachment's extent by its ``length`` in bytes, when a file is opened. [A-1]

        Raises:
            QMoEError: ``malformed``.
        """

    @abstractmethod
    def decode(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> npt.NDArray[Any]:
        """The array, in storage form, that an extent's bytes stand for; it may be a view of them.

        Nothing is allocated before the lengths have been compared with ``stored``.

        Raises:
            QMoEError: with the codes of the encoding's section in SPEC.md.
        """

    def encoded(self, stored: Bytes, item: Item, dictionary: GetDictionary) -> Any:
        """The value in its stored form, which ``encode`` takes; by default the decoded array."""
        return self.decode(stored, item, dictionary)

    def verify(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> None:
        """Check everything that can be checked; by default by decoding."""
        self.decode(stored, item, dictionary, threads)

    def payload(self, header: Bytes, item: Item) -> Payload:
        """What an extent's ``header`` tells; it is all that can be checked of it.

        Raises:
            QMoEError: ``malformed``, ``limit``.
        """
        raise NotImplementedError

    def parameters_of(self, value: Any) -> dict[str, Parameter]:
        """The further keys of the entry of a tensor that has this value."""
        return {}

    def check_value(self, value: Any, item: Item) -> None:
        """Refuse a value that cannot be stored as ``item``.

        Raises:
            QMoEError: ``argument``.
        """
        expected = STORAGE[item.dtype]
        if not isinstance(value, np.ndarray):
            raise wrong_type(self, value, "a numpy array")
        if value.shape != item.shape or value.dtype != expected:
            raise QMoEError(
                "argument",
                f"the array is {value.dtype} {list(value.shape)}, "
                f"not {expected} {list(item.shape)} (for {item.dtype})",
                "give an array of the declared shape and type",
            )

    @abstractmethod
    def encode(self, value: Any, item: Item, sink: Sink) -> None:
        """Write the extent of a value that ``check_value`` has passed."""


def wrong_type(encoding: Encoding, value: object, right: str) -> QMoEError:
    """What ``check_value`` raises."""
    what = f"{encoding.name} cannot store a value of type {type(value).__name__}"
    return QMoEError("argument", what, f"give {right}")


def as_array(data: Bytes, item: Item) -> npt.NDArray[Any]:
    """Bytes of the right number as the item's array, without a copy."""
    return data.view(STORAGE[item.dtype]).reshape(item.shape)


def as_bytes(array: npt.NDArray[Any]) -> Bytes:
    """An array's elements as uint8 [n], without a copy if they are contiguous."""
    return np.asarray(array).reshape(-1).view(np.uint8)  # a subclass may reshape otherwise
