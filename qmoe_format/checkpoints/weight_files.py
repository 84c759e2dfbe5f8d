"""Weight files, safetensors or ``torch.save``, read lazily through memory maps.

A mapped page counts as resident memory until its map is dropped, so whoever reads much calls
``release`` from time to time; the next ``read`` opens the file again. Of a file elsewhere one
tensor, or one row of one, is requested at a time.
"""

from __future__ import annotations

import errno
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmoe_format.checkpoints.safetensors_header import StoredTensor, read_header
from qmoe_format.checkpoints.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from qmoe_format.errors import QMoEError
from qmoe_format.machine import out_of_memory
from qmoe_format.remote import Location, RemotePath


def open_shard(path: Location) -> Shard:
    """A weight file; its suffix says of which kind.

    Raises:
        QMoEError: ``checkpoint`` if it is missing, or elsewhere and of ``torch.save``.
    """
    if not path.is_file():
        raise QMoEError(
            "checkpoint",
            f"{path}: this weight file is missing",
            "download the whole checkpoint again",
        )
    if isinstance(path, RemotePath):
        if path.suffix == ".safetensors":
            return RemoteSafetensorsShard(path)
        raise QMoEError(
            "checkpoint",
            f"{path}: of weight files elsewhere only safetensors can be read",
            "copy the checkpoint to this machine",
        )
    return SafetensorsShard(path) if path.suffix == ".safetensors" else TorchShard(path)


class Shard(ABC):
    """One weight file. Methods raise ``QMoEError``: ``checkpoint`` if it is damaged."""

    def __init__(self, path: Location) -> None:
        self.path: Location = path
        self._opened: Any = None

    @property
    def _file(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    @abstractmethod
    def _open(self) -> Any: ...

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor; reads no weights."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor of this file, usually a view of the memory map."""

    def read_row(self, name: str, index: int) -> Tensor:
        """Likewise, one row of its first dimension."""
        return self.read(name)[index]

    def release(self) -> None:
        """Drop the map as soon as no tensor uses it."""
        self._opened = None

    def _unknown_dtype(self, name: str, dtype: str) -> QMoEError:
        return QMoEError(
            "checkpoint",
            f"{self.path}: tensor {name!r} is of type {dtype}, which the format cannot hold",
            f"convert it to one of {', '.join(TORCH_DTYPES)}",
        )


class SafetensorsShard(Shard):
    """A ``.safetensors`` file."""

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise QMoEError(
                "checkpoint",
                f"{self.path}: not a complete safetensors file ({error})",
                "download it again",
            ) from error

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for name in self._file.keys():  # noqa: SIM118 (not a mapping)
            part = self._file.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in TORCH_DTYPES:
                raise self._unknown_dtype(name, dtype)
            yield name, dtype, tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class RemoteSafetensorsShard(Shard):
    """Likewise, elsewhere. Its tensors are copies, so nothing is there to be released."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__(path)
        self._remote = path

    def _open(self) -> Mapping[str, StoredTensor]:
        try:
            return read_header(self._remote)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, QMoEError):
                raise
            raise QMoEError(
                "checkpoint",
                f"{self.path}: not a complete safetensors file ({error})",
                "copy it there again",
            ) from error

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for name, stored in self._file.items():
            if stored.dtype not in TORCH_DTYPES:
                raise self._unknown_dtype(name, stored.dtype)
            yield name, stored.dtype, stored.shape

    def read(self, name: str) -> Tensor:
        return self._tensor(*self._file[name])

    def read_row(self, name: str, index: int) -> Tensor:
        dtype, shape, begin, end = self._file[name]
        length = (end - begin) // shape[0]
        return self._tensor(dtype, shape[1:], begin + index * length, begin + (index + 1) * length)

    def release(self) -> None:
        """The header is kept."""

    def _tensor(self, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> Tensor:
        if begin == end:
            return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        data = bytearray(self._remote.read(begin, end - begin))  # torch may write into a tensor
        return torch.frombuffer(data, dtype=torch.uint8).view(TORCH_DTYPES[dtype]).reshape(shape)


class TorchShard(Shard):
    """A file of ``torch.save``, loaded without running code from it."""

    def _open(self) -> Any:
        assert isinstance(self.path, Path)
        state = load_torch_file(self.path)
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
        ):
            raise QMoEError(
                "checkpoint",
                f"{self.path}: holds something other than tensors by name",
                "download the checkpoint again",
            )
        return state

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for name, tensor in self._file.items():
            layout = "nested" if tensor.is_nested else tensor.layout
            if tensor.dtype not in DTYPE_NAMES or layout is not torch.strided:
                raise self._unknown_dtype(name, f"{tensor.dtype}, {layout}")
            # A stride of 0 makes many elements of one, and a tensor on "meta" has none.
            if tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
                raise QMoEError(
                    "checkpoint",
                    f"{self.path}: tensor {name!r} has fewer elements than its shape "
                    f"{list(tensor.shape)}",
                    "save the model as safetensors",
                )
            yield name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file[name]
        return tensor.detach()


def load_torch_file(path: Path) -> Any:
    """What ``torch.save`` has written; runs no code from it, and maps tensors.

    Raises:
        QMoEError: ``checkpoint`` if it is damaged, or could expand beyond its size.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(each.compress_type for each in archive.infolist()):
                    raise ValueError("it is compressed")  # so it may expand a thousandfold
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damage can raise anything
        seeks_before_0 = isinstance(error, OSError) and error.errno == errno.EINVAL
        if out_of_memory(error) or (isinstance(error, OSError) and not seeks_before_0):
            raise
        reason = str(error).partition("\n")[0]
        raise QMoEError(
            "checkpoint",
            f"{path}: torch.load cannot map it as a file of weights ({reason})",
            "download it again, or save the model as safetensors",
        ) from error
