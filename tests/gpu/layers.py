"""Layers of whole experts, and what ``gated_experts`` should make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec import dequantize
from qmoe_format.gpu import expert_plan
from qmoe_format.gpu.packing import pack
from tests.gpu import run_reference
from tests.gpu.problems import (
    FAULTLESS,
    LARGE,
    Floats,
    Kind,
    Machine,
    Shape,
    array,
    matrix,
    rounded,
    unwritten,
    vectors,
    workspace,
)

EXPERTS = 3


class Layer:
    """Random experts [inner, hidden] twice, or [2 inner, hidden], and [hidden, inner].

    Args:
        runs: bits and lanes of each stack; none: codewords.
    """

    def __init__(
        self,
        kind: Kind,
        hidden: int = 70,
        inner: int = 40,
        stacks: int = 2,
        runs: tuple[tuple[int, int], ...] = ((4, 8), (4, 8), (3, 4)),
    ) -> None:
        shapes = [Shape(2 * inner // stacks, hidden, 0.6, None, seed) for seed in range(stacks)]
        shapes.append(Shape(hidden, inner, 0.6, None, 7))
        stored = [[matrix(kind, shape, seed) for seed in range(EXPERTS)] for shape in shapes]
        dense = [np.stack([dequantize(each) for each in stack]) for stack in stored]
        self.kind, self.inputs, self.output = kind, np.concatenate(dense[:-1], 1), dense[-1]
        packed = [run_reference.stack(m, *r) for m, r in zip(stored, runs, strict=False)]
        self.stored, self.packed = stored, packed or [pack(each) for each in stored]

    def expected(
        self, x: Floats, experts: npt.NDArray[Any], weights: Floats
    ) -> npt.NDArray[np.float64]:
        """Products with the inputs are rounded to the dtype of x."""
        y = np.zeros((len(x), self.output.shape[1]))
        for t, i in np.ndindex(experts.shape):
            if 0 <= experts[t, i] < EXPERTS:
                exact = self.inputs[experts[t, i]].astype(np.float64) @ x[t]
                gate, up = np.split(rounded(exact.astype(np.float32), self.kind.dtype), 2)
                hidden = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
                y[t] += weights[t, i] * (self.output[experts[t, i]].astype(np.float64) @ hidden)
        return y

    def run(
        self,
        x: Floats,
        experts: npt.NDArray[Any],
        weights: Floats,
        machine: Machine = FAULTLESS,
        kernels: list[str] | None = None,
    ) -> Floats:
        """What the kernels make of that; ``kernels`` gets their names."""
        dtype = self.kind.dtype
        y = unwritten((len(x), self.output.shape[1]), "fp32")
        *inputs, output = self.packed
        given = array(dtype, x), experts, array(dtype, weights)
        launches = expert_plan.gated_experts(inputs, output, *given, y, workspace(LARGE))
        if kernels is not None:
            kernels[:] = [launch.kernel.name for launch in launches]
        machine.run(launches, LARGE)
        return y


def near(y: Floats, expected: npt.NDArray[np.float64], activated: str = "fp32") -> bool:
    """``activated``: to what silu(gate) * up is rounded."""
    room = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 4e-3}[activated]
    return bool((abs(y - expected) <= room * (1 + abs(expected).max())).all())


def layer_call(kind: Kind, tokens: int, k: int, index: str, hidden: int = 70) -> tuple[Any, ...]:
    """x, experts, of which some do not exist, and weights."""
    rng = np.random.default_rng(tokens)
    experts = rng.integers(0, EXPERTS, (tokens, k)).astype(index)
    experts.flat[1::5], experts.flat[3::7] = EXPERTS, -1
    weights = rounded(rng.random((tokens, k)).astype(np.float32), kind.dtype)
    return vectors(kind, Shape(1, hidden, 0.5, None, 3), tokens), experts, weights
