"""Matrices of every kind, and the calls of ``qmoe_format.gpu`` made on the CPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt

from qmoe_format.codec import EncodedMatrix, dequantize, encode_matrix
from qmoe_format.dtypes import from_float32, to_float32
from qmoe_format.gpu import plan
from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.packing import Stack
from tests.codec.strategies import dictionary, random_trits
from tests.gpu import shim

Floats = npt.NDArray[np.float32]

NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
# Half an ulp, relative to a number, and the least half ulp.
ROUNDING = {"bf16": (2.0**-8, 2.0**-134), "fp16": (2.0**-11, 2.0**-25), "fp32": (0.0, 0.0)}
# Two blocks at most: there is more to find between two than between many, and they are slow here.
LARGE = plan.Device(multiprocessors=2, shared_bytes=227 << 10)
SMALL = plan.Device(multiprocessors=2, shared_bytes=1 << 10)  # neither table nor x fits


@dataclass(frozen=True, slots=True)
class Kind:
    """What chooses a kernel's text."""

    dictionary: tuple[str, float, int]  # signs, share of zeros, width
    scale_dtype: str
    scales: int
    group_size: int
    column_scale: bool
    dtype: str  # of x and y
    tokens: int
    weighted: bool  # sums over the experts of a token
    device: plan.Device


CHOICES: tuple[list[Any], ...] = (
    # Entries of 1, 2, 4 and 8 words, in all forms; tables above 12 bits are not in shared memory.
    [
        *[("plane", 0.885, 8), ("plane", 0.885, 12), ("plane", 0.6, 9), ("plane", 0.3, 11)],
        *[("codeword", 0.885, 13), ("codeword", 0.3, 10)],
    ],
    ["BF16", "F16", "F32"],
    [1, 2],
    [0, 1, 64],
    [False, True],
    ["bf16", "fp16", "fp32"],
    [1, 3, 20],
    [False, True],
    [LARGE, SMALL],
)


def _kinds() -> list[Kind]:
    """Few kinds in which any two choices occur together."""
    rng = random.Random(0)
    rows: list[tuple[Any, ...]] = []
    missing = {
        (i, a, j, b)
        for (i, some), (j, others) in combinations(enumerate(CHOICES), 2)
        for a, b in product(some, others)
    }

    def covered(row: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        return {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(row), 2)} & missing

    while missing:
        tried = [tuple(rng.choice(some) for some in CHOICES) for _ in range(200)]
        rows.append(max(tried, key=lambda row: len(covered(row))))
        missing -= covered(rows[-1])
    return [Kind(*row) for row in rows]


KINDS = _kinds()


@dataclass(frozen=True, slots=True)
class Shape:
    """What matrices of a kind may still differ in."""

    rows: int
    columns: int
    zeros: float
    rows_per_segment: int | None
    seed: int
    exact: bool = False  # scales are powers of two


shapes = st.builds(
    Shape,
    st.integers(0, 40),
    st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 1000])),
    st.sampled_from([0.0, 0.5, 0.885, 0.99, 1.0]),
    st.sampled_from([None, 1, 3, 1000]),
    st.integers(0, 9),
    st.booleans(),
)
LONG = Shape(3, 4001, 0.8, 2, 0)


def matrix(kind: Kind, shape: Shape, seed: int = 0) -> EncodedMatrix:
    """Matrices with other seeds are of the same stack."""
    rng = np.random.default_rng([shape.seed, seed])
    groups = -(-shape.columns // kind.group_size) if kind.group_size else 1

    def scale(*sizes: int) -> npt.NDArray[Any]:
        values = rng.standard_normal(sizes)
        if shape.exact:
            values = 2.0 ** rng.integers(-2, 3, sizes) * rng.choice([-1.0, 1.0], sizes)
        return from_float32(values.astype(np.float32), kind.scale_dtype)

    signs, zeros, width = kind.dictionary
    return encode_matrix(
        random_trits(shape.rows, shape.columns, shape.zeros, seed),
        scale(shape.rows, groups, kind.scales),
        scale(shape.columns) if kind.column_scale else None,
        scale_dtype=kind.scale_dtype,
        group_size=kind.group_size,
        dictionary=dictionary(zeros, width, signs),
        rows_per_segment=shape.rows_per_segment,
    )


def vectors(kind: Kind, shape: Shape, *sizes: int) -> Floats:
    """x float32 [*sizes, columns], which the kind's type holds exactly."""
    rng = np.random.default_rng(shape.seed)
    whole = (*sizes, shape.columns)
    x = rng.integers(-8, 9, whole) if shape.exact else rng.standard_normal(whole)
    return rounded(x.astype(np.float32), kind.dtype)


def operand(dtype: str, values: Floats) -> plan.Operand:
    """``values``, which ``dtype`` holds exactly, or else rounded."""
    return plan.Operand(from_float32(np.ascontiguousarray(values), NAMES[dtype]), dtype)


def unwritten(dtype: str, *shape: int) -> plan.Operand:
    """Nothing but NaN."""
    nan = from_float32(np.full(shape, np.nan, np.float32), NAMES[dtype])
    return plan.Operand(nan, dtype)


def scratch(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """What is in fresh memory: anything."""
    if dtype == "int32":
        return np.full(shape, 0x5A5A5A5A, np.int32)
    return np.asarray(unwritten(dtype, *shape).array)


def rounded(values: Floats, dtype: str) -> Floats:
    return to_float32(from_float32(values, NAMES[dtype]), NAMES[dtype])


@dataclass(frozen=True, slots=True)
class Machine:
    """The shim, with an order of threads and a fault: a text in a kernel, and what replaces it."""

    order: int = shim.FORWARD
    fault: tuple[str, str] | None = None

    def run(self, launches: list[Launch], device: plan.Device) -> None:
        for launch in launches:
            assert launch.shared_bytes <= device.shared_bytes
            if self.fault and self.fault[0] in launch.source:
                assert launch.source.count(self.fault[0]) == 1
                launch = replace(launch, source=launch.source.replace(*self.fault))
            shim.execute(launch, self.order)


FAULTLESS = Machine()


def matmul(
    kind: Kind, stack: Stack, x: Floats, machine: Machine = FAULTLESS, expert: int = 0
) -> Floats:
    """y [tokens, rows] for x [tokens, columns]."""
    y = unwritten(kind.dtype, len(x), stack.layout.rows)
    x_operand = operand(kind.dtype, x)
    machine.run(plan.matmul(stack, expert, x_operand, y, kind.device, scratch), kind.device)
    return to_float32(y.array, NAMES[kind.dtype])


def expert_matvec(
    kind: Kind,
    stack: Stack,
    x: Floats,
    experts: npt.NDArray[np.int32],
    weights: Floats | None = None,
    machine: Machine = FAULTLESS,
) -> Floats:
    """y [tokens, k, rows], or with weights [tokens, rows]; x [tokens, (k,) columns]."""
    y = unwritten(kind.dtype, *experts.shape[: 2 if weights is None else 1], stack.layout.rows)
    by = None if weights is None else operand(kind.dtype, weights)
    x_operand = operand(kind.dtype, x)
    launches = plan.expert_matvec(stack, x_operand, experts, by, y, kind.device, scratch)
    machine.run(launches, kind.device)
    return to_float32(y.array, NAMES[kind.dtype])


def decode(
    stack: Stack,
    dtype: str,
    machine: Machine = FAULTLESS,
    part: tuple[int, int] | None = None,
    offset: int = 0,
) -> npt.NDArray[Any]:
    """The bits of matrices ``part`` (first, count), [count, rows, columns].

    ``offset``: elements by which their address is not a multiple of 16 bytes.
    """
    first, count = part or (0, stack.layout.experts)
    size = count * stack.layout.rows * stack.layout.columns
    shape = (count, stack.layout.rows, stack.layout.columns)
    y: npt.NDArray[Any] = unwritten(dtype, offset + size).array[offset:].reshape(shape)
    machine.run(plan.decode(stack, first, count, plan.Operand(y, dtype), LARGE), LARGE)
    return y


def within_tolerance(matrix: EncodedMatrix, x: Floats, y: Floats, dtype: str = "fp32") -> bool:
    """[M-1], and y's rounding to ``dtype``; x [tokens, columns]."""
    weights = dequantize(matrix).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    room = (matrix.columns + 8) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weights.T))
    relative, least = ROUNDING[dtype]
    room += relative * (np.abs(exact) + room) * 1.01 + least
    return bool((np.abs(y - exact) <= room).all())
