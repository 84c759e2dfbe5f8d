"""Kernels as they are launched: at least one for each choice that shapes their text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks import gpu_anchor
from qmoe_format import codec
from qmoe_format.gpu import expert_plan, launch_plan, runs
from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.launch_plan import Workspace
from qmoe_format.gpu.packing import PackedStack, pack
from qmoe_format.gpu.runs import PackedRuns, RunLayout
from qmoe_format.quantize import gpu_steps
from tests.gpu.problems import dictionary, random_levels

H200 = DeviceLimits(multiprocessors=132, shared_bytes=227 << 10, capability=90)
ELEMENTS = {
    "bf16": np.uint16,
    "fp16": np.float16,
    "fp32": np.float32,
    "int32": np.int32,
    "int64": np.int64,
}


@cache
def stack(
    *,
    rows: int = 4,
    columns: int = 2048,
    zeros: float = 0.885,
    width: int = 12,
    refined: tuple[float, int] | None = None,
    scales: int = 2,
    column_scales: bool = False,
) -> PackedStack:
    """Two equal ``int-dict`` experts; ``refined``: zeros and width of the refinement."""
    rng = np.random.default_rng(0)
    levels = random_levels(rows, columns, zeros, rng, 1 - refined[0] if refined else 0.0)
    matrix = codec.encode_matrix(
        levels,
        np.ones((rows, scales), np.uint16),
        np.ones(columns, np.uint16) if column_scales else None,
        dictionary=dictionary(zeros, width),
        refinement_dictionary=dictionary(*refined) if refined else None,
    )
    return pack([matrix, matrix])


@cache
def groups(
    *,
    bits: int,
    grid: str = "linear",
    zero_points: bool = False,
    rows: int = 4,
    columns: int = 2048,
) -> PackedStack:
    """Two equal ``int-group`` experts."""
    shape = (rows, -(-columns // 64))
    matrix = codec.pack_groups(
        np.zeros((rows, columns), np.uint8),
        np.ones(shape, np.uint16),
        bits,
        grid=grid,
        group_size=64,
        zero_points=np.zeros(shape, np.uint8) if zero_points else None,
    )
    return pack([matrix, matrix])


def packed_stack(**options: Any) -> PackedStack:
    """``int-group`` if its number of bits is given."""
    return groups(**options) if "bits" in options else stack(**options)


def array(shape: tuple[int, ...], dtype: str) -> Any:
    return np.empty(shape, ELEMENTS[dtype])


def matmul(tokens: int, dtype: str = "bf16", place: int = -1, **options: Any) -> Launch:
    """The launch at ``place`` of the product of a matrix and ``tokens`` vectors."""
    packed = packed_stack(**options)
    x = array((tokens, packed.layout.columns), dtype)
    y = array((tokens, packed.layout.rows), dtype)
    return launch_plan.matmul(packed, 0, x, y, Workspace(H200, array))[place]


def with_runs(columns: int, bits: int, lanes: int, highest: int = 1, **options: Any) -> PackedStack:
    """A stack with empty runs: what they hold does not shape a kernel."""
    packed = stack(columns=columns, **options)
    column_scales = bool(options.get("column_scales"))
    layout = RunLayout(2, 4, columns, bits, lanes, options.get("scales", 2), column_scales)
    return replace(packed, runs=PackedRuns(layout, {"column_scale": None}, highest))


def run_product(
    columns: int,
    bits: int,
    lanes: int,
    dtype: str = "bf16",
    tokens: int = 1,
    k: int = 0,
    place: int = -1,
    **options: Any,
) -> Launch:
    """The launch at ``place`` of a product from runs; with ``k``, of so many experts a token."""
    packed = with_runs(columns, bits, lanes, **options)
    x, workspace = array((tokens, columns), dtype), Workspace(H200, array)
    if not k:
        return launch_plan.matmul(packed, 0, x, array((tokens, 4), dtype), workspace)[place]
    experts, y = array((tokens, k), "int32"), array((tokens, k, 4), dtype)
    return launch_plan.expert_matvec(packed, x, experts, None, y, workspace)[place]


def run_experts(
    place: int,
    columns: int,
    bits: int,
    lanes: int,
    dtype: str = "bf16",
    stacks: int = 2,
    **options: Any,
) -> Launch:
    """The launch at ``place`` of 2 whole experts of a token; all their matrices are alike."""
    packed = with_runs(columns, bits, lanes, **options)
    x, experts, weights = array((1, columns), dtype), array((1, 2), "int64"), array((1, 2), dtype)
    call = [packed] * stacks, packed, x, experts, weights, array((1, 4), dtype)
    launches = expert_plan.gated_experts(*call, Workspace(H200, array))
    assert len(launches) == 3
    return launches[place]


def run_decode(columns: int, bits: int, lanes: int, dtype: str = "bf16", **options: Any) -> Launch:
    """The launch that decodes a matrix from runs."""
    packed = with_runs(columns, bits, lanes, **options)
    return launch_plan.decode(packed, 0, 1, array((1, 4, columns), dtype), Workspace(H200, array))[
        0
    ]


def transcode(name: str, bits: int, lanes: int) -> Launch:
    """A launch of the transcoder."""
    layout = RunLayout(1, 4, 2048, bits, lanes, 2, column_scales=False)
    levels = array((1, 4, 2048), "fp16")
    names = ("offsets", "starts", "order", "bases", "words", "row_scale")
    nothing = {key: array((1,), "int32") for key in names}
    return {
        "sizes": lambda: runs.sizes(layout, levels, None, None, H200),
        "order": lambda: runs.order(layout, None, None, None, nothing),
        "offsets": lambda: runs.offsets(layout, None, nothing),
        "codes": lambda: runs.codes(layout, levels, nothing, 0, H200),
    }[name]()


def expert_matvec(tokens: int, place: int, dtype: str = "bf16", **options: Any) -> Launch:
    """The launch at ``place`` of weighted products with 8 experts per token."""
    packed = packed_stack(**options)
    x, weights = array((tokens, packed.layout.columns), dtype), array((tokens, 8), dtype)
    experts, y = array((tokens, 8), "int32"), array((tokens, packed.layout.rows), dtype)
    workspace = Workspace(H200, array)
    return launch_plan.expert_matvec(packed, x, experts, weights, y, workspace)[place]


def decode(dtype: str = "bf16", **options: Any) -> Launch:
    packed = packed_stack(**options)
    y = array((1, packed.layout.rows, packed.layout.columns), dtype)
    return launch_plan.decode(packed, 0, 1, y, Workspace(H200, array))[-1]


def quantizer(name: str) -> Launch:
    """A step of the recipe ``rd``."""
    return Launch(gpu_steps.kernel(name), 1, ())


def anchor(warps: int) -> Launch:
    """The benchmark's reference kernel."""
    nothing = gpu_anchor.Anchor(1, 40, None, None, None, None)
    return gpu_anchor.matvec(nothing, None, None, warps)


# What most calls launch, compiled for every architecture.
MAIN: dict[str, Callable[[], Launch]] = {
    "product, 1 token": partial(matmul, 1),
    "product, groups of 16 tokens": partial(expert_matvec, 2, 1),
    "product of runs": partial(run_product, 14336, 6, 16, column_scales=True),
    "product of runs, groups of tokens": partial(
        run_product, 14336, 6, 16, tokens=16, k=2, column_scales=True
    ),
    "inputs of experts": partial(run_experts, 0, 4096, 6, 8, column_scales=True),
    "output of experts": partial(run_experts, 1, 14336, 6, 16, column_scales=True),
    "decode": decode,
    "decode from runs": partial(run_decode, 14336, 6, 16),
    "product, refined, pairs": partial(expert_matvec, 1, 0, refined=(0.7, 12)),
    "product of 4 bits, 1 token": partial(matmul, 1, bits=4),
    "GPTQ in a block": partial(quantizer, "gptq_block"),
    "descent in a block": partial(quantizer, "sweep"),
    "descent, moves passed on": partial(quantizer, "pass_on"),
}
MANY: dict[str, Any] = {"width": 16, "zeros": 0.3}
OTHER: dict[str, Callable[[], Launch]] = {
    "product, pairs": partial(expert_matvec, 1, 0),
    "product, 4 tokens": partial(matmul, 4),
    "product, fp16": partial(matmul, 1, "fp16"),
    "product, fp32, 8 tokens": partial(matmul, 8, "fp32"),
    "product, width 16, symmetric": partial(matmul, 1, width=16, scales=1),
    "product, 60 % zeros": partial(matmul, 1, zeros=0.6),
    "product, 60 % zeros, 16 tokens": partial(matmul, 16, zeros=0.6),
    "product, 95 % zeros": partial(matmul, 1, zeros=0.95),
    "product, many non-zeros": partial(matmul, 1, **MANY),
    "product, many non-zeros, 16 tokens": partial(matmul, 16, **MANY),
    "product, column scales, 8 tokens": partial(matmul, 8, column_scales=True),
    "product, x not in shared memory": partial(matmul, 1, rows=1, columns=60_000),
    "product, refined, 60 % zeros, 16 tokens": partial(matmul, 16, zeros=0.6, refined=(0.7, 12)),
    "product, refined, many non-zeros and ones, 8 tokens": partial(
        matmul, 8, refined=(0.3, 16), **MANY
    ),
    "product, refined, x not in shared memory": partial(
        matmul, 1, rows=1, columns=60_000, refined=(0.95, 12)
    ),
    "product of runs, 3 bits, fp32": partial(run_product, 1536, 3, 2, "fp32", column_scales=True),
    "product of runs, 4 bits, any columns": partial(run_product, 4097, 4, 8, scales=1),
    "product of runs, 5 bits, fp16": partial(run_product, 7168, 5, 8, "fp16"),
    "product of runs, 8 bits": partial(run_product, 2048, 8, 4),
    "product of runs, 3 bits, fp32, 16 tokens": partial(
        run_product, 1536, 3, 2, "fp32", tokens=16, column_scales=True
    ),
    "product of runs, 4 bits, any columns, levels to 7, 16 tokens": partial(
        run_product, 4097, 4, 8, tokens=16, highest=7, scales=1
    ),
    "product of runs, 5 bits, fp16, groups of tokens": partial(
        run_product, 7168, 5, 8, "fp16", tokens=16, k=2
    ),
    "product of runs, 6 bits, levels to 7, groups of tokens": partial(
        run_product, 1536, 6, 2, tokens=16, k=2, highest=7, column_scales=True
    ),
    "product of runs, one scale, groups of tokens": partial(
        run_product, 14336, 6, 16, tokens=16, k=2, scales=1, column_scales=True
    ),
    "product of runs, 8 bits, fp16, levels to 63, 16 tokens": partial(
        run_product, 2048, 8, 4, "fp16", tokens=16, highest=63
    ),
    "inputs of experts, 4 bits, any columns": partial(run_experts, 0, 4097, 4, 8, scales=1),
    "inputs of experts, fp32, one stack": partial(run_experts, 0, 2048, 5, 4, "fp32", stacks=1),
    "output of experts, 3 bits, fp32": partial(run_experts, 1, 768, 3, 4, "fp32"),
    "output of experts, 4 bits, fp16, any columns": partial(run_experts, 1, 1537, 4, 2, "fp16"),
    "sums of experts": partial(run_experts, 2, 768, 3, 4),
    "terms of x": partial(run_product, 14336, 6, 16, tokens=16, place=0, column_scales=True),
    "terms of x and groups": partial(run_product, 1536, 6, 2, "fp16", tokens=16, k=2, place=0),
    "decode from runs, fp32": partial(run_decode, 1536, 3, 2, "fp32"),
    "decode from runs, fp16, refined": partial(run_decode, 4096, 4, 8, "fp16", refined=(0.7, 12)),
    "decode from runs, refined, column scales": partial(
        run_decode, 7168, 5, 8, refined=(0.7, 12), column_scales=True
    ),
    "sizes of runs": partial(transcode, "sizes", 5, 8),
    "order of runs": partial(transcode, "order", 5, 8),
    "offsets of runs": partial(transcode, "offsets", 5, 8),
    "codes of runs": partial(transcode, "codes", 6, 2),
    "decode, fp16, column scales": partial(decode, "fp16", column_scales=True),
    "decode, fp32, width 8": partial(decode, "fp32", width=8),
    "decode, 60 % zeros": partial(decode, zeros=0.6),
    "decode, width 16, many non-zeros": partial(decode, **MANY),
    "decode, refined": partial(decode, zeros=0.6, refined=(0.7, 12)),
    "decode, refined, fp32, many non-zeros and ones": partial(
        decode, "fp32", column_scales=True, refined=(0.3, 16), **MANY
    ),
    "product of 2 bits, pairs": partial(expert_matvec, 1, 0, bits=2),
    "product of 3 bits, zero points, 16 tokens": partial(matmul, 16, bits=3, zero_points=True),
    "product of 8 bits, fp32, groups of 8 tokens": partial(
        expert_matvec, 2, 1, "fp32", bits=8, zero_points=True
    ),
    "product of 8 bits, log, 4 tokens": partial(matmul, 4, bits=8, grid="log"),
    "product of 4 bits, x not in shared memory": partial(
        matmul, 1, rows=1, columns=60_000, bits=4, grid="log"
    ),
    "decode of 3 bits": partial(decode, bits=3),
    "decode of 8 bits, log, fp32": partial(decode, "fp32", bits=8, grid="log"),
    "prepare": partial(matmul, 1, place=0, rows=1, columns=60_000),
    "sort": partial(expert_matvec, 2, 0),
    "combine": partial(expert_matvec, 2, -1),
    "QMoE's product, 8 rows a block": partial(anchor, 8),
    "QMoE's product, 32 rows a block": partial(anchor, 32),
}
