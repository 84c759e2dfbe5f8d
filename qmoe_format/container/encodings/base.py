"""What every encoding is: ``Encoding``, and the two things that the container lends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from qmoe_format.container.entries import Item, Parameter
from qmoe_format.dtypes import STORAGE, Bytes
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec import Dictionary, EncodedMatrix


class Dictionaries(Protocol):
    """A file's dictionaries by number, read when first asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Dictionary: ...


class Sink(Protocol):
    """Where an encoding writes its extent."""

    @property
    def length(self) -> int:
        """Bytes of the extent so far."""

    def write(self, data: bytes | memoryview) -> None:
        """Append."""

    def restart(self) -> None:
        """Forget what was written of this extent."""

    def dictionary_number(self, dictionary: Dictionary) -> int:
        """The number of this dictionary in the file; it is added if it is new."""


class Encoding(ABC):
    """One way to store a tensor, or an expert of a stack, in an extent.

    ``name`` stands in the index, ``defaults`` has the further keys of a tensor's entry with the
    values they have where nothing else says so.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Parameter]] = {}

    def check_entry(self, item: Item) -> None:  # noqa: B027 -- most have nothing to check
        """Check dtype, shape and parameters when a file is opened or a tensor is begun.

        The parameters' keys and kinds are right already. Raises ``QMoEError``: ``limit``,
        ``malformed``, ``unsupported``.
        """

    @abstractmethod
    def decode(
        self, stored: Bytes, item: Item, dictionaries: Dictionaries, threads: int = 1
    ) -> npt.NDArray[Any]:
        """The array, in storage form (BF16 as uint16), of an extent's bytes; it may be a view.

        Raises ``QMoEError`` with the codes of the encoding's section; nothing is allocated before
        the lengths have been compared with ``stored``.
        """

    def verify(
        self, stored: Bytes, item: Item, dictionaries: Dictionaries, threads: int = 1
    ) -> None:
        """Check everything that can be checked; by default by decoding."""
        self.decode(stored, item, dictionaries, threads)

    def parameters_of(self, value: npt.NDArray[Any] | EncodedMatrix) -> dict[str, Parameter]:
        """The further keys that a value to be stored asks for."""
        return {}

    def check_value(self, value: npt.NDArray[Any] | EncodedMatrix, item: Item) -> None:
        """Raise ``QMoEError("argument")`` unless ``value`` can be stored as ``item``."""
        check_array(value, item)

    @abstractmethod
    def encode(self, value: Any, item: Item, sink: Sink) -> None:
        """Write the extent of a value that ``check_value`` has passed."""


def check_array(value: object, item: Item) -> None:
    """Raise ``QMoEError("argument")`` unless ``value`` is an array of the item's shape and type."""
    expected = STORAGE[item.dtype]
    if not isinstance(value, np.ndarray):
        raise QMoEError("argument", f"a {type(value).__name__} was given, not a numpy array")
    if value.shape != item.shape or value.dtype != expected:
        raise QMoEError(
            "argument",
            f"the array is {value.dtype} {list(value.shape)}, "
            f"{item.dtype} {list(item.shape)} needs {expected} {list(item.shape)}",
        )


def as_array(data: Bytes, item: Item) -> npt.NDArray[Any]:
    """Bytes of the right number as the item's array, without a copy."""
    return data.view(STORAGE[item.dtype]).reshape(item.shape)


def as_bytes(array: npt.NDArray[Any]) -> Bytes:
    """An array's elements as uint8 [n], without a copy if they are contiguous."""
    return np.asarray(array).reshape(-1).view(np.uint8)  # a subclass may reshape otherwise
