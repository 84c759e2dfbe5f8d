"""Weight files, safetensors or ``torch.save``, read lazily through memory maps.

A mapped page counts as resident memory until its map is dropped, so whoever reads much calls
``release`` from time to time; the next ``read`` opens the file again.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmoe_format.checkpoints.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from qmoe_format.errors import QMoEError


class Shard(Protocol):
    """One weight file."""

    path: Path

    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Dtype name and shape of each tensor, by name; reads no weights."""

    def read(self, name: str) -> Tensor:
        """A tensor of this shard, usually a view on the memory map."""

    def release(self) -> None:
        """Drop the map as soon as no tensor uses it."""


def open_shard(path: Path) -> Shard:
    if not path.is_file():
        raise QMoEError(
            "checkpoint", f"{path}: this weight file is missing; fetch the whole checkpoint again"
        )
    return SafetensorsShard(path) if path.suffix == ".safetensors" else TorchShard(path)


class SafetensorsShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None  # safe_open, which has no types

    def _open(self) -> Any:
        if self._file is None:
            try:
                self._file = safe_open(self.path, framework="pt")
            except SafetensorError as error:
                raise QMoEError(
                    "checkpoint",
                    f"{self.path}: not a whole safetensors file ({error}); fetch it again",
                ) from error
        return self._file

    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        file = self._open()
        found = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in TORCH_DTYPES:
                raise _unknown_dtype(self.path, name, dtype)
            found[name] = (dtype, tuple(part.get_shape()))
        return found

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._open().get_tensor(name)
        return tensor

    def release(self) -> None:
        self._file = None


class TorchShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Tensor] | None = None

    def _open(self) -> dict[str, Tensor]:
        if self._state is None:
            try:
                state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
                reason = str(error).partition("\n")[0]
                raise QMoEError(
                    "checkpoint",
                    f"{self.path}: not a whole file of weights that torch.load can map ({reason}); "
                    "fetch it again, or save the model as safetensors",
                ) from error
            if not isinstance(state, dict) or not all(
                isinstance(name, str) and isinstance(tensor, Tensor)
                for name, tensor in state.items()
            ):
                raise QMoEError(
                    "checkpoint",
                    f"{self.path}: holds something else than tensors by name; fetch the "
                    "checkpoint again",
                )
            self._state = state
        return self._state

    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        found = {}
        for name, tensor in self._open().items():
            if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
                raise _unknown_dtype(self.path, name, f"{tensor.dtype}, {tensor.layout}")
            found[name] = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        return found

    def read(self, name: str) -> Tensor:
        return self._open()[name].detach()

    def release(self) -> None:
        self._state = None


def _unknown_dtype(path: Path, name: str, dtype: str) -> QMoEError:
    return QMoEError(
        "checkpoint",
        f"{path}: tensor {name!r} is of type {dtype}, which the format cannot hold; convert it to "
        f"one of {', '.join(TORCH_DTYPES)}",
    )
