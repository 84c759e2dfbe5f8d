"""A weight of the float model that a checkpoint stores as codes and scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qmoe_format.errors import QMoEError

Read = Callable[[str], Tensor]
"""A stored tensor by name, usually a view of a memory map."""
ReadRow = Callable[[str, int, int], Tensor]
Floats = npt.NDArray[np.float32]
DOWNLOAD = "download the whole checkpoint again"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor(ABC):
    """A weight made of several stored tensors.

    Attributes:
        name: its name in the float model.
        shape: of the decoded weight; a third dimension, before the others, counts experts.
        stored: the names of the stored tensors that it is decoded from, by what they are.
        ignored: names of those that belong to it without changing it, such as scales of inputs.
        format: for people: ``fp8``, ``gptq int4``.
    """

    name: str
    shape: tuple[int, ...]
    stored: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    format: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all stored tensors that it replaces."""
        return (*self.stored.values(), *self.ignored)

    def decode(self, read: Read) -> Tensor:
        """The weight as float32, contiguous.

        Args:
            read: gives a stored tensor by name.

        Raises:
            QMoEError: ``checkpoint`` if a scale is not finite or the parts contradict each other.
        """
        tensors = {kind: read(name) for kind, name in self.stored.items()}
        out = torch.empty(self.shape)
        if len(self.shape) < 3:
            self._decode(tensors, out.numpy())
            return out
        for expert, matrix in enumerate(out):
            own = {kind: row(each, expert, len(out)) for kind, each in tensors.items()}
            self._decode(own, matrix.numpy())
        return out

    def decode_expert(self, read: ReadRow, expert: int) -> Tensor:
        """One matrix of a fused tensor, likewise; looks at nothing else.

        Args:
            read: gives what ``row`` does of a stored tensor by name.
        """
        count = self.shape[0]
        out = torch.empty(self.shape[1:])
        own = {kind: read(name, expert, count) for kind, name in self.stored.items()}
        self._decode(own, out.numpy())
        return out

    @abstractmethod
    def _decode(self, tensors: Mapping[str, Tensor], out: Floats) -> None:
        """Decode one matrix from the stored tensors by what they are."""

    def _scales(self, tensor: Tensor) -> Floats:
        """Scales of any dtype as float32, contiguous; E8M0 is also stored as uint8."""
        exponents = tensor.dtype in (torch.uint8, torch.float8_e8m0fnu)
        scales: Floats = (
            _E8M0[to_array(tensor, torch.uint8)] if exponents else to_array(tensor.float())
        )
        self._check_finite(scales)
        return scales

    def _check_finite(self, scales: Floats) -> None:
        if not np.isfinite(scales).all():
            raise refusal(self.name, f"one of its scales ({self.format}) is infinite or NaN")


def row(tensor: Tensor, index: int, count: int) -> Tensor:
    """Row ``index`` of a tensor of ``count`` rows; all of another tensor."""
    return tensor[index] if tensor.shape[:1] == (count,) else tensor


_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
E8M0_DTYPES = ("U8", "F8_E8M0")
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def to_array(tensor: Tensor, dtype: torch.dtype | None = None) -> npt.NDArray[Any]:
    """A tensor as a contiguous array; if there is a ``dtype``, its bits as that."""
    tensor = tensor.contiguous()
    array: npt.NDArray[Any] = (tensor.view(dtype) if dtype else tensor).numpy()
    return array


def unpack(words: npt.NDArray[np.uint32], bits: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` numbers of ``bits`` each from every row of ``words``, lowest bits first."""
    starts = np.arange(count) * bits
    low, shift = starts >> 5, starts & 31
    high = np.minimum(low + 1, words.shape[-1] - 1)
    wide = words.astype(np.uint64)
    pairs = wide[..., low] | wide[..., high] << np.uint64(32)
    return (pairs >> shift.astype(np.uint64) & np.uint64((1 << bits) - 1)).astype(np.int64)


def refusal(name: str, problem: str, advice: str = DOWNLOAD) -> QMoEError:
    """An error about a weight or a stored tensor."""
    return QMoEError("checkpoint", f"tensor {name!r}: {problem}", advice)
