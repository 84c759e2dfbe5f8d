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
from qmoe_format.gpu import launch_plan
from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.launch_plan import Workspace
from qmoe_format.gpu.packing import PackedStack
from tests.codec.strategies import dictionary, random_levels
from tests.gpu import shim

Floats = npt.NDArray[np.float32]

NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
# Half an ulp, relative to a number, and the smallest half ulp.
ROUNDING = {"bf16": (2.0**-8, 2.0**-134), "fp16": (2.0**-11, 2.0**-25), "fp32": (0.0, 0.0)}
# Two blocks at most: two are enough to disagree, and more are slow here.
LARGE = DeviceLimits(multiprocessors=2, shared_bytes=227 << 10)
SMALL = DeviceLimits(multiprocessors=2, shared_bytes=1 << 10)  # neither table nor x fits


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides a kernel's text."""

    dictionary: tuple[str, float, int]  # signs, fraction of zeros, width
    scale_dtype: str
    scales: int
    group_size: int
    column_scale: bool
    dtype: str  # of x and y
    tokens: int
    weighted: bool  # sums over the experts of a token
    limits: DeviceLimits


CHOICES: tuple[list[Any], ...] = (
    # Entries of 1, 2, 4 and 8 words, in all forms; tables of more than 12 bits stay out of shared
    # memory.
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
    """A few kinds in which any two choices occur together."""
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
    """How matrices of a kind may still differ."""

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
    """A random matrix; those with other seeds can be in the same stack."""
    rng = np.random.default_rng([shape.seed, seed])
    groups = -(-shape.columns // kind.group_size) if kind.group_size else 1

    def scale(*sizes: int) -> npt.NDArray[Any]:
        values = rng.standard_normal(sizes)
        if shape.exact:
            values = 2.0 ** rng.integers(-2, 3, sizes) * rng.choice([-1.0, 1.0], sizes)
        return from_float32(values.astype(np.float32), kind.scale_dtype)

    signs, zeros, width = kind.dictionary
    return encode_matrix(
        random_levels(shape.rows, shape.columns, shape.zeros, seed),
        scale(shape.rows, groups, kind.scales),
        scale(shape.columns) if kind.column_scale else None,
        scale_dtype=kind.scale_dtype,
        group_size=kind.group_size,
        dictionary=dictionary(zeros, width, signs),
        rows_per_segment=shape.rows_per_segment,
    )


def vectors(kind: Kind, shape: Shape, *sizes: int) -> Floats:
    """x float32 [*sizes, columns], exact in the kind's dtype."""
    rng = np.random.default_rng(shape.seed)
    whole = (*sizes, shape.columns)
    x = rng.integers(-8, 9, whole) if shape.exact else rng.standard_normal(whole)
    return rounded(x.astype(np.float32), kind.dtype)


def array(dtype: str, values: Floats) -> npt.NDArray[Any]:
    """``values``, rounded to ``dtype``; bf16 is uint16."""
    return from_float32(np.ascontiguousarray(values), NAMES[dtype])


def unwritten(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Fresh memory: NaN everywhere, or some number."""
    if dtype == "int32":
        return np.full(shape, 0x5A5A5A5A, np.int32)
    return array(dtype, np.full(shape, np.nan, np.float32))


def workspace(limits: DeviceLimits) -> Workspace:
    return Workspace(limits, unwritten)


def rounded(values: Floats, dtype: str) -> Floats:
    return to_float32(from_float32(values, NAMES[dtype]), NAMES[dtype])


@dataclass(frozen=True, slots=True)
class Machine:
    """The shim, with an order of threads and a fault: text in a kernel, and its replacement."""

    order: int = shim.FORWARD
    fault: tuple[str, str] | None = None

    def run(self, launches: list[Launch], limits: DeviceLimits) -> None:
        for launch in launches:
            kernel = launch.kernel
            assert kernel.shared_bytes <= limits.shared_bytes
            if self.fault and self.fault[0] in kernel.source:
                assert kernel.source.count(self.fault[0]) == 1
                kernel = replace(kernel, source=kernel.source.replace(*self.fault))
            shim.execute(replace(launch, kernel=kernel), self.order)


FAULTLESS = Machine()


def matmul(
    kind: Kind, stack: PackedStack, x: Floats, machine: Machine = FAULTLESS, expert: int = 0
) -> Floats:
    """y [tokens, rows] for x [tokens, columns]."""
    y = unwritten((len(x), stack.layout.rows), kind.dtype)
    given = array(kind.dtype, x)
    launches = launch_plan.matmul(stack, expert, given, y, workspace(kind.limits))
    machine.run(launches, kind.limits)
    return to_float32(y, NAMES[kind.dtype])


def expert_matvec(
    kind: Kind,
    stack: PackedStack,
    x: Floats,
    experts: npt.NDArray[np.int32],
    weights: Floats | None = None,
    machine: Machine = FAULTLESS,
) -> Floats:
    """y [tokens, k, rows], or with weights [tokens, rows]; x [tokens, (k,) columns]."""
    shape = experts.shape if weights is None else experts.shape[:1]
    y = unwritten((*shape, stack.layout.rows), kind.dtype)
    by = None if weights is None else array(kind.dtype, weights)
    given = array(kind.dtype, x)
    launches = launch_plan.expert_matvec(stack, given, experts, by, y, workspace(kind.limits))
    machine.run(launches, kind.limits)
    return to_float32(y, NAMES[kind.dtype])


def decode(
    stack: PackedStack,
    dtype: str,
    machine: Machine = FAULTLESS,
    part: tuple[int, int] | None = None,
    offset: int = 0,
) -> npt.NDArray[Any]:
    """The bits of matrices ``part`` (first, count), [count, rows, columns].

    Their address is ``offset`` elements above a multiple of 16 bytes.
    """
    first, count = part or (0, stack.layout.experts)
    size = count * stack.layout.rows * stack.layout.columns
    shape = (count, stack.layout.rows, stack.layout.columns)
    y = unwritten((offset + size,), dtype)[offset:].reshape(shape)
    machine.run(launch_plan.decode(stack, first, count, y, workspace(LARGE)), LARGE)
    return y


def within_tolerance(matrix: EncodedMatrix, x: Floats, y: Floats, dtype: str = "fp32") -> bool:
    """Whether y is W x by [M-1], rounded to ``dtype``; x [tokens, columns]."""
    weights = dequantize(matrix).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    room = (matrix.columns + 8) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weights.T))
    relative, least = ROUNDING[dtype]
    room += relative * (np.abs(exact) + room) * 1.01 + least
    return bool((np.abs(y - exact) <= room).all())
