"""Folders as QMoE's authors publish them, written without the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ENTRIES, MAX_PAIRS = 65_536, 14
PROBABILITY = (0.885, (1 - 0.885) / 2, (1 - 0.885) / 2)  # of the symbols 0, lower, upper

Pairs = tuple[int, ...]
State = Mapping[str, Tensor]


def sequences(least: float, sequence: Pairs = (), p: float = 1.0) -> Iterator[Any]:
    """All sequences of 1 to 14 pairs that are at least so probable, with their probabilities."""
    for pair in range(9):
        longer, product = (*sequence, pair), p * (PROBABILITY[pair // 3] * PROBABILITY[pair % 3])
        if product >= least:
            yield -product, longer
            if len(longer) < MAX_PAIRS:
                yield from sequences(least, longer, product)


@lru_cache(maxsize=1)
def dictionary() -> list[Pairs]:
    """The pairs of each codeword."""
    found = sorted(sequences(least=6e-6))
    return [sequence for _, sequence in found[:ENTRIES]]


@lru_cache(maxsize=1)
def codewords() -> dict[Pairs, int]:
    return {sequence: number for number, sequence in enumerate(dictionary())}


def encode_row(symbols: npt.NDArray[Any]) -> list[int]:
    """Symbols 0 to 2 of a row to codewords, the longest that matches first."""
    padded = np.append(symbols, [0] * (symbols.size % 2)).reshape(-1, 2)
    found: list[int] = []
    sequence: Pairs = ()
    for pair in (padded[:, 0] + 3 * padded[:, 1]).tolist():
        if (*sequence, pair) not in codewords():
            found.append(codewords()[sequence])
            sequence = ()
        sequence = (*sequence, pair)
    return [*found, codewords()[sequence]]


def decode_row(codes: npt.NDArray[Any], columns: int) -> list[int]:
    """The inverse, as slow and plain as can be."""
    pairs = [pair for code in codes.tolist() for pair in dictionary()[code]]
    symbols = [symbol for pair in pairs for symbol in (pair % 3, pair // 3)]
    assert len(symbols) == columns + columns % 2
    return symbols[:columns]


def packed(weights: Tensor) -> dict[str, Tensor]:
    """A matrix of at most two values other than 0 in a row, bfloat16 [rows, columns]."""
    low, high = weights.min(1, keepdim=True)[0], weights.max(1, keepdim=True)[0]
    symbols = torch.zeros(weights.shape, dtype=torch.int32)
    symbols[weights == low] = 1
    symbols[weights == high] = 2
    rows = [encode_row(row) for row in symbols.numpy()]
    codes = np.array([code for row in rows for code in row], np.uint16)
    return {
        "w_comp": torch.from_numpy(codes.view(np.int16)),
        "row_off": torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int32),
        "ter_minmax": torch.cat([low, high], 1).flatten(),
        "weight": torch.zeros(0, dtype=torch.bfloat16),
    }


def ternary(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Random weights for ``packed``; the first seven rows are the special cases."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    low, high = 0.1 + torch.rand(2, max(rows, 7), 1, generator=generator)
    chance = torch.rand(len(low), columns, generator=generator)
    weights = torch.where(chance < 0.1, -low, 0.0).where(chance < 0.9, high)
    weights[0] = 0
    weights[1].clamp_(min=0)  # the lower value is 0
    weights[2].clamp_(max=0)  # the upper one is
    weights[3] = 0.5
    weights[4] = -0.5
    weights[5] = torch.where(chance[5] < 0.5, 0.25, 0.75)  # no zero, two positive values
    weights[6] = torch.where(chance[6] < 0.5, -0.25, -0.75)
    return weights[:rows].bfloat16().contiguous()


def write_published(folder: Path, state: State, config: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a Switch Transformer.

    Args:
        state: of transformers' model; experts are ternary.
        config: the contents of ``config.json``.
    """
    dense, layers = {}, dict[str, dict[str, Tensor]]()
    for name, weights in state.items():
        layer, experts, _ = name.partition(".experts.")
        if experts:
            matrix = name.removesuffix("weight")
            parts = {f"{matrix}{part}": tensor for part, tensor in packed(weights).items()}
            layers.setdefault(layer, {}).update(parts)
        else:
            dense[name] = weights
    ordered = sorted(layers, key=lambda layer: (layer.startswith("decoder"), layer))
    return save_published(folder, dense, [layers[layer] for layer in ordered], config)


def save_published(
    folder: Path, dense: State, layers: Iterable[State], config: Mapping[str, Any]
) -> Path:
    """Write a checkpoint of tensors as they are stored."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(dense, folder / "noexp.pt")
    sizes = {}
    for number, layer in enumerate(layers):
        torch.save(layer, folder / f"exp{number:02}.pt")
        for name, tensor in layer.items():
            if name.endswith(".w_comp"):
                sizes[name.removesuffix(".w_comp")] = tensor.numel()
    torch.save(sizes, folder / "sizes.pt")
    return folder
