"""A file of experts, in which each appears under its name and with its shape in the float model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qmoe_format.checkpoints.published_qmoe.dictionary import MAX_PAIRS
from qmoe_format.checkpoints.published_qmoe.matrix import DOWNLOAD, PublishedMatrix
from qmoe_format.checkpoints.tensor_info import ELEMENT_BYTES
from qmoe_format.checkpoints.weight_files import TorchShard
from qmoe_format.errors import QMoEError

_PART = re.compile(r"(?P<matrix>.+\.expert_\d+\.(?:wi|wo))\.(?P<part>[^.]+)")
_DTYPES = {"w_comp": "I16", "row_off": "I32", "ter_minmax": "BF16"}
_OTHER = {"wi": "wo", "wo": "wi"}


@dataclass(frozen=True, slots=True)
class Size:
    """Of a matrix; ``bytes`` in its file."""

    columns: int
    codewords: int
    bytes: int


class PublishedShard(TorchShard):
    """One ``expNN.pt``.

    Attributes:
        sizes: of the matrices that ``tensors`` has found, by their names in the float model.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sizes: dict[str, Size] = {}

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each expert's matrix as bfloat16.

        Raises:
            QMoEError: ``checkpoint`` if something is missing, too much, of another dtype, or if
                there cannot be enough codewords: they bound what decoding allocates.
        """
        matrices = self._find()
        rows = {name: self._rows(name, parts) for name, parts in matrices.items()}
        for name, parts in matrices.items():
            other = f"{name[:-2]}{_OTHER[name[-2:]]}"
            if other not in rows:
                raise self._wrong(other, "is missing")
            columns, count = rows[other], parts["w_comp"]  # wi is [d_ff, d_model], wo the reverse
            if count < rows[name] * -(-columns // (2 * MAX_PAIRS)):
                raise self._wrong(
                    f"{name}.w_comp",
                    f"has {count} codewords, too few for {rows[name]} x {columns} weights",
                )
            stored = sum(ELEMENT_BYTES[_DTYPES[part]] * n for part, n in parts.items())
            self.sizes[f"{name}.weight"] = Size(columns, count, stored)
            yield f"{name}.weight", "BF16", (rows[name], columns)

    def matrix(self, name: str) -> PublishedMatrix:
        """A matrix by one of the names that ``tensors`` gives; views of the memory map."""
        prefix = name.removesuffix("weight")
        codewords, offsets, scales = (
            self._file[f"{prefix}{part}"].detach().contiguous() for part in _DTYPES
        )
        return PublishedMatrix(
            f"{self.path}: tensor {name!r}",
            codewords.numpy().view(np.uint16),
            offsets.numpy(),
            scales.view(torch.uint16).numpy().reshape(-1, 2),
            self.sizes[name].columns,
        )

    def read(self, name: str) -> Tensor:
        """A matrix as bfloat16 [rows, columns], not a view."""
        found = self.matrix(name)
        levels = torch.from_numpy(found.levels())
        scales = torch.from_numpy(found.scales).view(torch.bfloat16)
        values = torch.where(levels < 0, scales[:, :1], scales[:, 1:])
        return values.masked_fill(levels == 0, 0)

    def _find(self) -> dict[str, dict[str, int]]:
        """How long each part of each matrix is."""
        matrices: dict[str, dict[str, int]] = defaultdict(dict)
        for name, dtype, shape in super().tensors():
            match = _PART.fullmatch(name)
            if match is None or match["part"] not in {*_DTYPES, "weight"}:
                raise self._wrong(name, "is no part of an expert as QMoE stores it")
            if match["part"] == "weight":  # of no use: it is empty
                continue
            if dtype != _DTYPES[match["part"]] or len(shape) != 1:
                wanted = f"{_DTYPES[match['part']]} of one dimension"
                raise self._wrong(name, f"is {dtype} {list(shape)} instead of {wanted}")
            matrices[match["matrix"]][match["part"]] = shape[0]
        return matrices

    def _rows(self, name: str, parts: Mapping[str, int]) -> int:
        for part in _DTYPES:
            if part not in parts:
                raise self._wrong(f"{name}.{part}", "is missing")
        rows = parts["row_off"] - 1
        if rows < 0 or parts["ter_minmax"] != 2 * rows:
            raise self._wrong(
                f"{name}.ter_minmax",
                f"has {parts['ter_minmax']} elements, not two for each of {rows} rows",
            )
        return rows

    def _wrong(self, name: str, problem: str) -> QMoEError:
        return QMoEError("checkpoint", f"{self.path}: tensor {name!r} {problem}", DOWNLOAD)
