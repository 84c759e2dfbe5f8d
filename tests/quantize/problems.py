"""Matrices, inputs, and a plain GPTQ to compare with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from safetensors import safe_open
from torch import Tensor

from qmoe_format.quantize import cpu_steps
from qmoe_format.quantize.hessian import Factored, Statistics, inverse_factor
from qmoe_format.quantize.level_weights import LevelWeights, Quantized
from qmoe_format.quantize.padding import padded, padded_columns, padded_rows, padded_square
from qmoe_format.quantize.solution import Problem, Solution

Array = npt.NDArray[np.float64]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs like a model's: correlated columns of very different sizes."""
    mixed = random(tokens, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    spread = random(columns, seed=seed + 2).mul(0.7).exp()
    return (mixed / math.sqrt(columns) + 0.3 * random(tokens, 1, seed=seed + 3)) * spread


def calibrated(inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Statistics:
    """Statistics of one expert for each of the inputs."""
    result = Statistics.zeros(len(inputs), inputs[0].shape[1], dtype=dtype)
    for expert, each in enumerate(inputs):
        result.add(expert, each)
    return result


def array(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def energy(weights: Array, sums: Array) -> Array:
    """w S w of each row."""
    result: Array = ((weights @ sums) * weights).sum(-1)
    return result


def levels_of(result: Quantized) -> LevelWeights:
    """What a recipe of this kind returns."""
    assert isinstance(result.weights, LevelWeights)
    return result.weights


def code_length(levels: Tensor) -> float:
    """Bits per level of mask, signs and refinement, the strings coded by their own frequencies."""
    nonzeros = float(levels.count_nonzero())
    ups = float(levels.abs().sum(dtype=torch.float64)) - nonzeros
    bits = binary_bits(nonzeros, levels.numel() - nonzeros) + nonzeros + binary_bits(ups, nonzeros)
    return bits / levels.numel()


def binary_bits(ones: float, zeros: float) -> float:
    """The ideal code length of a string of bits."""
    counts = [count for count in (ones, zeros) if count]
    return sum(count * math.log2((ones + zeros) / count) for count in counts)


@dataclass(frozen=True, slots=True)
class Batch:
    """Matrices in float32, and levels from rounding, int8: ``[experts, rows, columns]``."""

    weights: Tensor
    hessian: Tensor
    levels: Tensor
    scale: Tensor
    column_scale: Tensor

    @classmethod
    def of(cls, experts: int, rows: int, columns: int, seed: int, most: int = 1) -> Batch:
        """``most``: the largest level; the more, the less it is worth."""
        inputs = [correlated(3 * columns + 5, columns, seed + e) for e in range(experts)]
        sums = torch.stack([x.T @ x / x.square().mean(1).sum() for x in inputs])
        hessian = sums + 0.05 * torch.eye(columns)
        weights = random(experts, rows, columns, seed=seed + 50)
        column_scale = random(experts, columns, seed=seed + 51).mul(0.3).exp()
        scale = 1.2 / most * random(experts, rows, seed=seed + 52).mul(0.2).exp()
        value = scale[:, :, None] * column_scale[:, None]
        levels = (weights / value).round().clamp(-most, most).to(torch.int8)
        return cls(weights, hessian, levels, scale, column_scale)

    @property
    def quantized(self) -> Tensor:
        return self.levels * self.scale[:, :, None] * self.column_scale[:, None]

    @property
    def target(self) -> Tensor:
        return self.weights @ self.hessian

    @property
    def gradient(self) -> Tensor:
        return (self.weights - self.quantized) @ self.hessian

    def errors(self, levels: Tensor, scale: Tensor, column_scale: Tensor) -> Array:
        """``[experts, rows]`` in float64."""
        value = array(scale)[:, :, None] * array(column_scale)[:, None]
        off = array(self.weights) - array(levels) * value
        result: Array = ((off @ array(self.hessian)) * off).sum(2)
        return result

    def solution(self, lengthen: float = 0.0) -> tuple[Problem, Solution]:
        """As ``rd`` works on them, with row scales refitted: weights are over the largest one."""
        d, experts = 0.01, len(self.weights)
        factor = padded_square(factor_of(self.hessian))
        hessian = padded_square(self.hessian)
        ready = Factored(hessian, factor, torch.ones(experts), [d] * experts, [None] * experts)
        problem = Problem.of(self.weights, ready, hessian, lengthen)
        scale = padded_rows((self.scale / problem.largest[:, None]).float())
        columns = padded_columns(self.column_scale)
        return problem, Solution(problem, padded(self.levels), scale, columns)


@contextmanager
def many_threads(threads: int) -> Iterator[None]:
    """Rows are divided among so many threads, however few they are."""
    before, least = torch.get_num_threads(), cpu_steps._LEAST_ROWS
    cpu_steps._LEAST_ROWS = 1
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        cpu_steps._LEAST_ROWS = least
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class Plain:
    """What a plain GPTQ returns for one matrix.

    Attributes:
        levels: ``[rows, columns]``.
        margin: of each decision, the distance to the nearest threshold over the largest value less
            the smallest.
    """

    levels: npt.NDArray[np.int8]
    margin: Array


def plain_gptq(
    weights: Array,
    hessian: Array,
    values: Array,
    prices: Array | None = None,
    column_scale: Array | None = None,
) -> Plain:
    """Column by column in float64, without a factor of H and without blocks.

    Each column is eliminated from H^-1 once it is decided (Optimal Brain Surgeon), as in the
    derivation of GPTQ; a quantizer that uses a triangular factor has to get the same result.

    Args:
        weights: ``[rows, columns]``.
        hessian: ``[columns, columns]``.
        values: of each level, the middle one 0, before their column's scale, ``[rows, levels]``.
        prices: of each level, likewise; by default 0.
        column_scale: ``[columns]``; by default 1.
    """
    rows, columns = weights.shape
    rest = weights.copy()
    inverse = np.linalg.inv(hessian)
    levels = np.zeros((rows, columns), np.int8)
    margin = np.full((rows, columns), np.inf)
    every = np.arange(rows)
    for column in range(columns):
        d = inverse[0, 0]
        scaled = values * (1.0 if column_scale is None else column_scale[column])
        costs = (rest[:, column, None] - scaled) ** 2
        if prices is not None:
            costs += d * prices
        # Of equal costs the one of level 0, which is in the middle.
        middle = values.shape[1] // 2
        best = np.where(costs[:, middle] == costs.min(1), middle, costs.argmin(1))
        levels[:, column] = best - middle
        # The costs of two values are equal at a threshold; each step away from it changes their
        # difference by twice the distance of the values.
        apart = np.abs(scaled - scaled[every, best, None])
        more = costs - costs[every, best, None]
        steps = np.divide(more, 2 * apart, out=np.full_like(more, np.inf), where=apart > 0)
        span = scaled[:, -1] - scaled[:, 0]
        nearest = steps.min(1)
        margin[:, column] = np.divide(nearest, span, out=np.full(rows, np.inf), where=span > 0)
        wrong = rest[:, column] - scaled[every, best]
        rest[:, column + 1 :] -= wrong[:, None] * (inverse[0, 1:] / d)
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:] / d)
    return Plain(levels, margin)


def check_agrees(levels: Tensor, plain: Plain, tolerance: float = 1e-4) -> None:
    """The same levels, but for a few rows that differ from a near-tie on."""
    assert levels.shape == plain.levels.shape
    differ = levels.numpy() != plain.levels
    apart = differ.any(1)
    for row in np.flatnonzero(apart):
        column = int(differ[row].argmax())
        margin = plain.margin[row, column]
        assert margin < tolerance, f"row {row}, column {column}: margin {margin:g}"
    assert apart.mean() <= 0.1 or apart.sum() <= 1


def factor_of(hessian: Tensor) -> Tensor:
    return torch.stack([inverse_factor(each) for each in hessian])


REAL = ["switch wi", "switch wo", "mixtral w1", "mixtral w2"]


def real(
    folder: Path, which: str, rows: int, columns: int, tokens: int
) -> tuple[Tensor, list[Tensor]]:
    """The upper left of a matrix of two experts, and inputs for each.

    The inputs are those of a model's first layer: normalized token embeddings, frequent tokens more
    often, different ones for each expert; for the second matrix, passed through the first.
    """
    model, matrix = which.split()
    data = _Tensors(folder / f"{model}-mini")
    if model == "switch":
        embedding = data.read("shared.weight")
        prefix = "encoder.block.1.layer.1."
        norm = data.read(f"{prefix}layer_norm.weight")
        experts = [f"{prefix}mlp.experts.expert_{e}." for e in (0, 9)]
    else:
        embedding = data.read("model.embed_tokens.weight")
        prefix = "model.layers.0."
        norm = data.read(f"{prefix}post_attention_layernorm.weight")
        experts = [f"{prefix}block_sparse_moe.experts.{e}." for e in (0, 5)]
    weights, inputs = [], []
    for seed, expert in enumerate(experts):
        generator = np.random.default_rng(seed)
        # Log-uniform: low ids are the frequent tokens.
        ids = np.exp(generator.uniform(0, np.log(len(embedding)), tokens)).astype(int)
        neighbors = np.roll(ids, 1)
        x = embedding[ids] + 0.5 * embedding[neighbors]
        x = x / x.square().mean(1, keepdim=True).sqrt() * norm
        if matrix == "wo":
            x = torch.relu(x @ data.read(f"{expert}wi.weight").T)
        elif matrix == "w2":
            gate, up = (data.read(f"{expert}{name}.weight") for name in ("w1", "w3"))
            x = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        weights.append(data.read(f"{expert}{matrix}.weight")[:rows, :columns])
        inputs.append(x[:, :columns])
    return torch.stack(weights), inputs


class _Tensors:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self._files: dict[str, Any] = index["weight_map"]

    def read(self, name: str) -> Tensor:
        with safe_open(self._folder / self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.float()
