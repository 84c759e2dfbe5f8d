"""Kernels as they are launched: at least one for each choice that shapes their text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks import gpu_anchor
from qmoe_format import codec
from qmoe_format.gpu import launch_plan
from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.launch_plan import Workspace
from qmoe_format.gpu.packing import PackedStack, pack

H200 = DeviceLimits(multiprocessors=132, shared_bytes=227 << 10)
ELEMENTS = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32, "int32": np.int32}


@cache
def stack(
    *,
    rows: int = 4,
    columns: int = 2048,
    zeros: float = 0.885,
    width: int = 12,
    signs: str = "plane",
    scale_dtype: str = "BF16",
    scales: int = 2,
    group_size: int = 0,
    column_scales: bool = False,
) -> PackedStack:
    """Two equal experts."""
    half = (1 - zeros) / 2
    levels = np.random.default_rng(0).choice([-1, 0, 1], (rows, columns), p=[half, zeros, half])
    dtype = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[scale_dtype]
    groups = -(-columns // group_size) if group_size else 1
    matrix = codec.encode_matrix(
        levels.astype(np.int8),
        np.ones((rows, groups, scales), dtype),
        np.ones(columns, dtype) if column_scales else None,
        scale_dtype=scale_dtype,
        group_size=group_size,
        dictionary=codec.fit_dictionary(zeros, width, signs),
    )
    return pack([matrix, matrix])


def array(shape: tuple[int, ...], dtype: str) -> Any:
    return np.empty(shape, ELEMENTS[dtype])


def matmul(tokens: int, dtype: str = "bf16", place: int = -1, **options: Any) -> Launch:
    """The launch at ``place`` of the product of a matrix and ``tokens`` vectors."""
    packed = stack(**options)
    x = array((tokens, packed.layout.columns), dtype)
    y = array((tokens, packed.layout.rows), dtype)
    return launch_plan.matmul(packed, 0, x, y, Workspace(H200, array))[place]


def expert_matvec(tokens: int, place: int, dtype: str = "bf16", **options: Any) -> Launch:
    """The launch at ``place`` of weighted products with 8 experts per token."""
    packed = stack(**options)
    x, weights = array((tokens, packed.layout.columns), dtype), array((tokens, 8), dtype)
    experts, y = array((tokens, 8), "int32"), array((tokens, packed.layout.rows), dtype)
    workspace = Workspace(H200, array)
    return launch_plan.expert_matvec(packed, x, experts, weights, y, workspace)[place]


def decode(dtype: str = "bf16", **options: Any) -> Launch:
    packed = stack(**options)
    y = array((1, packed.layout.rows, packed.layout.columns), dtype)
    return launch_plan.decode(packed, 0, 1, y, Workspace(H200, array))[-1]


def anchor(warps: int) -> Launch:
    """The benchmark's reference kernel."""
    nothing = gpu_anchor.Anchor(1, 40, None, None, None, None)
    return gpu_anchor.matvec(nothing, None, None, warps)


# What most calls launch, compiled for every architecture.
MAIN: dict[str, Callable[[], Launch]] = {
    "product, 1 token": partial(matmul, 1),
    "product, pairs": partial(expert_matvec, 1, 0),
    "product, groups of 16 tokens": partial(expert_matvec, 2, 1),
    "decode": decode,
}
OTHER: dict[str, Callable[[], Launch]] = {
    "product, 4 tokens": partial(matmul, 4),
    "product, 8 tokens": partial(matmul, 8),
    "product, fp16": partial(matmul, 1, "fp16"),
    "product, fp32, 8 tokens": partial(matmul, 8, "fp32"),
    "product, width 8": partial(matmul, 1, width=8),
    "product, width 16": partial(matmul, 1, width=16),
    "product, 60 % zeros": partial(matmul, 1, zeros=0.6),
    "product, 60 % zeros, 16 tokens": partial(matmul, 16, zeros=0.6),
    "product, 95 % zeros": partial(matmul, 1, zeros=0.95),
    "product, many non-zeros": partial(matmul, 1, width=16, zeros=0.3),
    "product, many non-zeros, 16 tokens": partial(matmul, 16, width=16, zeros=0.3),
    "product, signs in codewords": partial(matmul, 1, signs="codeword"),
    "product, symmetric fp16 scales": partial(matmul, 1, scale_dtype="F16", scales=1),
    "product, fp32 scales of groups and columns": partial(
        matmul, 1, scale_dtype="F32", group_size=7, column_scales=True
    ),
    "product, scales of groups and columns, 8 tokens": partial(
        matmul, 8, group_size=7, column_scales=True
    ),
    "product, x not in shared memory": partial(matmul, 1, rows=1, columns=60_000),
    "decode, fp16, scales of groups and columns": partial(
        decode, "fp16", group_size=7, column_scales=True
    ),
    "decode, fp32, width 8": partial(decode, "fp32", width=8),
    "decode, 60 % zeros": partial(decode, zeros=0.6),
    "decode, width 16, many non-zeros": partial(decode, width=16, zeros=0.3),
    "decode, signs in codewords": partial(decode, signs="codeword"),
    "prepare": partial(matmul, 1, place=0, rows=1, columns=60_000),
    "group": partial(expert_matvec, 2, 0),
    "combine": partial(expert_matvec, 2, -1),
    "QMoE's product, 8 rows a block": partial(anchor, 8),
    "QMoE's product, 32 rows a block": partial(anchor, 32),
}
