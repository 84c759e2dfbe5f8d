"""GGUF's types for weights, made by llama.cpp's own code and read back by gguf-py.

Needs the extra ``gguf``: gguf-py, and llama-cpp-python, see ``ggml``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import ggml
from benchmarks.evaluation import Model
from qmoe_format.calibration.sequences import Batch
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Progress

TYPES = (
    *("IQ1_S", "IQ1_M", "TQ1_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K"),
    *("IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K"),
)

Importance = dict[str, NDArray[np.float32]]
"""Of the columns of each expert's matrix, ``[experts, columns]`` by stack."""


def bits(name: str) -> float:
    """Bits per weight of a type, with its scales."""
    _, weights, size = ggml.size(name)
    return 8 * size / weights


def fits(name: str, columns: int) -> bool:
    """Whether a row consists of whole blocks of a type."""
    return columns % ggml.size(name)[1] == 0


def round_trip(
    name: str, weights: NDArray[np.float32], importance: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What llama.cpp makes of a matrix.

    Args:
        name: of a type that ``fits``.
        weights: float32 ``[rows, columns]``.
        importance: of the columns, float32 ``[columns]``.

    Returns:
        The dequantized weights, as ``weights``.
    """
    gguf: Any = import_module("gguf")
    back: NDArray[np.float32] = gguf.quants.dequantize(
        ggml.quantize(name, weights, importance), gguf.GGMLQuantizationType(ggml.size(name)[0])
    )
    return back


class GGUFExperts:
    """Replaces a model's experts by what llama.cpp makes of them."""

    def __init__(
        self,
        model: Model,
        original: Mapping[str, torch.Tensor],
        batches: Sequence[Batch],
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            model: with its original weights.
            original: these, float32 ``[experts, rows, columns]`` by stack.
            batches: of the calibration text.
            progress: called with the number of batches read and to read.

        Raises:
            QMoEError: ``dependency`` if a package is missing.
        """
        ggml.library("ggml-base")  # rather now than after a calibration
        self._model = model
        self._original = original
        self._importance = column_importance(model, batches, progress)

    def replace(self, name: str, progress: Progress | None = None) -> float:
        """Let the model compute with experts of a type.

        Args:
            name: of the type.
            progress: called with the number of matrices done and to do.

        Returns:
            Bits per weight.

        Raises:
            QMoEError: ``argument`` if the rows of a matrix are no whole blocks of the type.
        """
        done, total = 0, sum(map(len, self._original.values()))
        for stack, experts in self._original.items():
            columns = experts.shape[2]
            if not fits(name, columns):
                raise QMoEError("argument", f"{stack}: {columns} columns, not whole blocks")
            for expert, weights in enumerate(experts.numpy()):
                found = round_trip(name, weights, self._importance[stack][expert])
                self._model.replace(stack, expert, found)
                done += 1
                if progress:
                    progress(done, total)
        return bits(name)


def column_importance(
    model: Model, batches: Sequence[Batch], progress: Progress | None = None
) -> Importance:
    """Mean squared input of each column of each expert, as ``llama-imatrix`` measures it.

    As there, an expert without tokens has an importance of 1 everywhere.

    Args:
        model: with its original weights.
        batches: of the calibration text.
        progress: called with the number of batches read and to read.
    """
    sums = {
        name: torch.zeros(len(experts), experts[0].shape[1], dtype=torch.float64)
        for name, experts in model.matrices.items()
    }
    tokens = {name: torch.zeros(len(experts), 1) for name, experts in model.matrices.items()}

    def add(name: str, expert: int, inputs: torch.Tensor) -> None:
        sums[name][expert] += inputs.square().sum(0, dtype=torch.float64)
        tokens[name][expert] += len(inputs)

    with model.watched(add):
        for number, batch in enumerate(batches, 1):
            model.logits(batch)
            if progress:
                progress(number, len(batches))
    return {
        name: torch.where(tokens[name] > 0, total / tokens[name].clamp(min=1), 1.0).float().numpy()
        for name, total in sums.items()
    }
