"""A small ``.qmoe`` file of random stacks, and the dense weights that it holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import qmoe_format
from qmoe_format.codec import dequantize, encode_matrix
from qmoe_format.dtypes import from_float32
from tests.codec.strategies import random_levels

EXPERTS, HIDDEN, INNER = 6, 48, 40
SHAPES = {  # experts, rows, columns
    "gate": (EXPERTS, INNER, HIDDEN),
    "up": (EXPERTS, INNER, HIDDEN),
    "gate_up": (EXPERTS, 2 * INNER, HIDDEN),
    "down": (EXPERTS, HIDDEN, INNER),
}

Dense = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_stacks(path: Path) -> Dense:
    """Write random stacks of ``SHAPES``, 60 % of them zeros; return their weights, float32."""
    weights = {}
    low_high = np.array([-0.2, 0.2], np.float32)
    rng = np.random.default_rng(0)
    with qmoe_format.Writer(path) as writer:
        for number, (name, shape) in enumerate(sorted(SHAPES.items())):
            experts, rows, columns = shape
            matrices = [
                encode_matrix(
                    random_levels(rows, columns, 0.6, 100 * number + expert),
                    from_float32(rng.random((rows, 1, 2), np.float32) * low_high, "BF16"),
                    from_float32(0.5 + rng.random(columns, np.float32), "BF16"),
                )
                for expert in range(experts)
            ]
            with writer.add_stack(name, shape, "BF16", "int-dict") as stack:
                for matrix in matrices:
                    stack.append(matrix)
            weights[name] = torch.from_numpy(np.stack([dequantize(each) for each in matrices]))
    return weights
