"""A small ``.qmoe`` file of random stacks, and the dense weights that it holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import qmoe_format
from qmoe_format.codec import Matrix, dequantize, encode_matrix, pack_groups
from qmoe_format.dtypes import from_float32
from tests.codec.strategies import random_levels

EXPERTS, HIDDEN, INNER = 6, 48, 40
SHAPES = {  # experts, rows, columns
    "gate": (EXPERTS, INNER, HIDDEN),
    "up": (EXPERTS, INNER, HIDDEN),
    "gate_up": (EXPERTS, 2 * INNER, HIDDEN),
    "down": (EXPERTS, HIDDEN, INNER),
}

KINDS = ("ternary", "refined", "groups")

Dense = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(kind: str, rows: int, columns: int, seed: int) -> Matrix:
    """A random one of ``KINDS``; 60 % of the levels of the first two are 0."""
    rng = np.random.default_rng(seed)
    if kind == "groups":
        size = 32 * (seed % 2)  # half of a stack's experts have one group a row
        groups = -(-columns // size) if size else 1
        codes = rng.integers(0, 8, (rows, columns)).astype(np.uint8)
        scale = from_float32(0.05 + 0.05 * rng.random((rows, groups), np.float32), "BF16")
        points = rng.integers(2, 6, (rows, groups)).astype(np.uint8)
        return pack_groups(codes, scale, 3, group_size=size, zero_points=points)
    levels = random_levels(rows, columns, 0.6, seed)
    if kind == "refined":
        levels *= rng.integers(1, 4, levels.shape).astype(np.int8)
    low_high = np.array([-0.2, 0.2], np.float32) * rng.random((rows, 2), np.float32)
    by_column = 0.5 + rng.random(columns, np.float32)
    return encode_matrix(levels, from_float32(low_high, "BF16"), from_float32(by_column, "BF16"))


def write_stacks(path: Path, kind: str) -> Dense:
    """Write random stacks of ``SHAPES``; return their weights, float32."""
    weights = {}
    encoding = "int-group" if kind == "groups" else "int-dict"
    with qmoe_format.Writer(path) as writer:
        for number, (name, shape) in enumerate(sorted(SHAPES.items())):
            experts, rows, columns = shape
            seeds = range(100 * number, 100 * number + experts)
            matrices = [matrix(kind, rows, columns, seed) for seed in seeds]
            with writer.add_stack(name, shape, "BF16", encoding) as stack:
                for each in matrices:
                    stack.append(each)
            weights[name] = torch.from_numpy(np.stack([dequantize(each) for each in matrices]))
    return weights
