"""Matrices of every kind, and the calls of ``qmoe_format.gpu`` made on the CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt

from qmoe_format.codec import (
    Dictionary,
    dequantize,
    encode_matrix,
    fit_dictionary,
    pack_groups,
)
from qmoe_format.dtypes import from_float32, to_float32
from qmoe_format.gpu import launch_plan
from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.int_dict_kernels import REFINED_THREADS, RING
from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.launch_plan import Workspace
from qmoe_format.gpu.packing import Matrix, PackedStack
from tests.gpu import shim

Floats = npt.NDArray[np.float32]

NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
# Half an ulp, relative to a number, and the smallest half ulp.
ROUNDING = {"bf16": (2.0**-8, 2.0**-134), "fp16": (2.0**-11, 2.0**-25), "fp32": (0.0, 0.0)}
# Two blocks at most: two are enough to disagree, and more are slow here.
LARGE = DeviceLimits(multiprocessors=2, shared_bytes=227 << 10, capability=90)


@dataclass(frozen=True, slots=True)
class DictKind:
    """What decides a kernel's text for ``int-dict``."""

    # Of mask and refinement: the dictionary's fraction of zeros, and its width.
    strings: tuple[tuple[float, int], tuple[float, int] | None]
    scales: int
    column_scale: bool
    dtype: str  # of x and y
    tokens: int
    weighted: bool  # sums over the experts of a token
    small: bool  # neither tables nor x fit into shared memory

    @property
    def limits(self) -> DeviceLimits:
        rings = RING * REFINED_THREADS // 32 if self.strings[1] else 0
        return replace(LARGE, shared_bytes=rings + (1 << 10)) if self.small else LARGE


@dataclass(frozen=True, slots=True)
class GroupKind:
    """What decides a kernel's text for ``int-group``."""

    bits: int
    grid: tuple[str, bool]  # its name, and whether there are zero points
    dtype: str
    tokens: int
    weighted: bool
    small: bool

    @property
    def limits(self) -> DeviceLimits:
        return replace(LARGE, shared_bytes=1 << 10) if self.small else LARGE


Kind = DictKind | GroupKind

_CALLS: tuple[list[Any], ...] = (
    ["bf16", "fp16", "fp32"],
    [1, 3, 20],
    [False, True],
    [False, True],
)
DICT_CHOICES: tuple[list[Any], ...] = (
    # Entries of 1, 2, 4 and 8 words, in all forms; tables of more than 12 bits stay out of shared
    # memory.
    [
        *[((0.885, 8), None), ((0.885, 12), None), ((0.6, 9), None), ((0.885, 13), None)],
        *[((0.3, 11), (0.95, 13)), ((0.6, 12), (0.7, 12)), ((0.01, 8), (0.25, 8))],
    ],
    [1, 2],
    [False, True],
    *_CALLS,
)
GROUP_CHOICES: tuple[list[Any], ...] = (
    [2, 3, 4, 8],
    [("linear", False), ("linear", True), ("log", False)],
    *_CALLS,
)


def _covering(choices: Sequence[list[Any]]) -> list[tuple[Any, ...]]:
    """A few rows in which any two choices occur together."""
    rng = random.Random(0)
    rows: list[tuple[Any, ...]] = []
    missing = {
        (i, a, j, b)
        for (i, some), (j, others) in combinations(enumerate(choices), 2)
        for a, b in product(some, others)
    }

    def covered(row: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        return {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(row), 2)} & missing

    while missing:
        tried = [tuple(rng.choice(some) for some in choices) for _ in range(200)]
        rows.append(max(tried, key=lambda row: len(covered(row))))
        missing -= covered(rows[-1])
    return rows


DICT_KINDS = [DictKind(*row) for row in _covering(DICT_CHOICES)]
GROUP_KINDS = [GroupKind(*row) for row in _covering(GROUP_CHOICES)]
KINDS: list[Kind] = [*DICT_KINDS, *GROUP_KINDS]


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


@lru_cache(maxsize=64)
def dictionary(zeros: float, width: int) -> Dictionary:
    """Fitted once."""
    return fit_dictionary(zeros, width)


def random_levels(
    rows: int, columns: int, zeros: float, rng: np.random.Generator, ones: float = 0.0
) -> npt.NDArray[np.int8]:
    """Independent levels; a refinement of them has about so many ones for each bit."""
    magnitudes = rng.geometric(1 - ones, (rows, columns)).clip(1, 127)
    magnitudes *= rng.random((rows, columns)) >= zeros
    levels: npt.NDArray[np.int8] = magnitudes * rng.choice([-1, 1], (rows, columns))
    return levels.astype(np.int8)


def matrix(kind: Kind, shape: Shape, seed: int = 0) -> Matrix:
    """A random matrix; those with other seeds can be in the same stack."""
    rng = np.random.default_rng([shape.seed, seed])

    def scale(*sizes: int) -> npt.NDArray[np.uint16]:
        values = rng.standard_normal(sizes)
        if shape.exact:
            values = 2.0 ** rng.integers(-2, 3, sizes) * rng.choice([-1.0, 1.0], sizes)
        return from_float32(values.astype(np.float32), "BF16")

    if isinstance(kind, GroupKind):
        return _grouped(kind, shape, seed, rng, scale)
    # In a stack, some are refined and some are not.
    mask, refinement = kind.strings[0], None if seed % 3 else kind.strings[1]
    return encode_matrix(
        random_levels(
            shape.rows, shape.columns, shape.zeros, rng, 1 - refinement[0] if refinement else 0.0
        ),
        scale(shape.rows, kind.scales),
        scale(shape.columns) if kind.column_scale else None,
        dictionary=dictionary(*mask),
        refinement_dictionary=dictionary(*refinement) if refinement else None,
        rows_per_segment=shape.rows_per_segment,
    )


def _grouped(
    kind: GroupKind, shape: Shape, seed: int, rng: np.random.Generator, scale: Any
) -> Matrix:
    """Some codes occur more often, the greatest and least included."""
    grid, zero_points = kind.grid
    codes = rng.integers(0, 1 << kind.bits, (shape.rows, shape.columns))
    if grid == "log":
        # So that sums are exact, or do not underflow.
        codes = codes // (most := 1 << (kind.bits - 1)) * most + codes % min(most, 4)
    size = (0, 32, 64, 128)[(shape.seed + seed) % 4]
    groups = -(-shape.columns // size) if size else 1
    return pack_groups(
        codes.astype(np.uint8),
        scale(shape.rows, groups),
        kind.bits,
        grid=grid,
        group_size=size,
        zero_points=rng.integers(0, 1 << kind.bits, (shape.rows, groups)).astype(np.uint8)
        if zero_points
        else None,
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


def within_tolerance(matrix: Matrix, x: Floats, y: Floats, dtype: str = "fp32") -> bool:
    """Whether y is W x by [M-1], rounded to ``dtype``; x [tokens, columns]."""
    weights = dequantize(matrix).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    room = (matrix.columns + 8) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weights.T))
    relative, least = ROUNDING[dtype]
    room += relative * (np.abs(exact) + room) * 1.01 + least
    return bool((np.abs(y - exact) <= room).all())
