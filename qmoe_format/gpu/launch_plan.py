"""From a call to the kernel launches it takes. Nothing here needs a GPU.

Arrays belong to whoever executes the launches: CuPy's, torch's, what stands for them until a call
brings them (``Given``), or, where kernels run on a CPU, numpy's (bf16 as uint16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import int_dict_kernels, int_group_kernels, run_batches, runs
from qmoe_format.gpu.arrays import element_type
from qmoe_format.gpu.cuda import DeviceLimits
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.kernel_text import source
from qmoe_format.gpu.launch import Given, Kernel, Launch
from qmoe_format.gpu.packing import Layout, PackedStack
from qmoe_format.gpu.run_batches import Batch
from qmoe_format.gpu.runs import PackedRuns, RunLayout
from qmoe_format.gpu.tiles import SMALL_TILE, THREADS, Product

SORT_THREADS = 256
ELEMENTWISE_THREADS = 256
FEW = 8  # this many pairs are not worth sorting
# A block could multiply so many groups in the time that it takes to stage x: 32 warps have some 300
# instructions each for that, a group has 400 to 1300.
STAGING_GROUPS = 16
MOST_BLOCKS = 65535  # in the second or third dimension of a grid

Number = int | Given


@dataclass(frozen=True, slots=True)
class Workspace:
    """What a call needs of the GPU besides the caller's arrays.

    Attributes:
        limits: of the GPU.
        allocate: makes an array of a shape and an element type there.
        scratch: the arrays made so far.
    """

    limits: DeviceLimits
    allocate: Callable[[tuple[int, ...], str], Any]
    scratch: list[Any] = field(default_factory=list)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate a scratch array."""
        self.scratch.append(self.allocate(shape, dtype))
        return self.scratch[-1]


def matmul(
    stack: PackedStack, expert: Number, x: Any, y: Any, workspace: Workspace
) -> list[Launch]:
    """y [tokens, rows] = x [tokens, columns] times the transpose of matrix ``expert``.

    For one token, x and y may have one dimension.
    """
    tokens = x.shape[0] if len(x.shape) == 2 else 1
    return products(stack, x, y, Pairs(tokens, 1, expert), workspace)


def expert_matvec(
    stack: PackedStack, x: Any, experts: Any, weights: Any, y: Any, workspace: Workspace
) -> list[Launch]:
    """Products of (token, expert) pairs, or their weighted sums over each token's experts.

    Args:
        stack: the matrices W.
        x: [tokens, columns], or [tokens, k, columns] with an x for each pair.
        experts: int32 [tokens, k].
        weights: [tokens, k] or None.
        y: [tokens, k, rows]; with weights [tokens, rows].
        workspace: for scratch arrays.

    Raises:
        QMoEError: ``limit`` for more than ``MOST_BLOCKS`` experts of a token.
    """
    tokens, k = experts.shape
    check_experts(k)
    pairs = Pairs(tokens * k, k if len(x.shape) == 2 else 1, -1, experts)
    if weights is None:
        return products(stack, x, y, pairs, workspace)
    rows = stack.layout.rows
    if not tokens * rows:
        return []
    each = workspace.empty((tokens, k, rows), "fp32")
    return [*products(stack, x, each, pairs, workspace), weighted(each, weights, y)]


def check_experts(k: int) -> None:
    """Refuse (``limit``) more than ``MOST_BLOCKS`` experts of a token."""
    if k > MOST_BLOCKS:
        problem = f"a token has {k} experts, more than {MOST_BLOCKS}"
        raise QMoEError("limit", problem, "multiply by some of them at a time")


def weighted(each: Any, weights: Any, y: Any, listed: Any = None, experts: int = 1) -> Launch:
    """y [tokens, rows]: sums of products ``each`` fp32 [tokens, k, rows] times ``weights``.

    With ``listed`` [tokens, k], products of experts that are none of ``experts`` are left out.
    """
    tokens, k, rows = each.shape
    return elementwise(
        "combine",
        size=(tokens, rows),
        arguments=(each, weights, y, listed, *ints(tokens, k, rows, experts)),
        WEIGHT_TYPE=element_type(weights.dtype),
        Y_TYPE=element_type(y.dtype),
        INDEX="int32" if listed is None else element_type(listed.dtype),
        LEAVE_OUT=int(listed is not None),
    )


def decode(
    stack: PackedStack, first: Number, count: int, y: Any, workspace: Workspace
) -> list[Launch]:
    """y [count, rows, columns]: the weights of ``count`` matrices from ``first`` on."""
    layout, limits = stack.layout, workspace.limits
    if not count * layout.units or not layout.columns:
        return []
    dtype = element_type(y.dtype)
    if stack.runs and isinstance(layout, DictLayout):
        kernel = runs.decode(stack.runs.layout, dtype, layout.refinement is not None)
        blocks = -(-count * stack.runs.layout.groups * 32 // kernel.threads)
        sizes = ints(layout.experts, layout.rows, layout.columns)
        return [
            Launch(kernel, blocks, (*stack.runs.arrays.values(), *sizes, y, *ints(first, count)))
        ]
    kernel = _decode_kernel(layout, dtype, limits)
    resident = limits.shared_bytes // kernel.shared_bytes if kernel.shared_bytes else 8
    blocks = min(limits.multiprocessors * max(1, resident), count * layout.units)
    return [Launch(kernel, blocks, (*_stack(stack), y, *ints(first, count)))]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The (token, expert) pairs of a call.

    Attributes:
        count: number of pairs.
        per_x: pairs that share a row of x.
        expert: the expert of all of them, or -1.
        experts: int32 [count], the expert of each, if ``expert`` is -1; in any shape.
    """

    count: int
    per_x: int
    expert: Number
    experts: Any = None


def products(
    stack: PackedStack, x: Any, y: Any, pairs: Pairs, workspace: Workspace
) -> list[Launch]:
    """y [pairs, rows], with x [pairs / pairs.per_x, columns]."""
    layout, limits, per_x = stack.layout, workspace.limits, pairs.per_x
    if not pairs.count or not layout.rows:
        return []
    if stack.runs:
        batch = batch_for(stack, x, pairs, limits)
        if batch:
            return _by_batches(stack.runs, batch, x, y, pairs, workspace)
        return [_by_runs(stack.runs, *part, limits) for part in _parts(x, y, pairs)]
    if pairs.experts is None:
        wanted = next((size for size in THREADS if pairs.count <= size), max(THREADS))
    else:
        wanted = 1 if pairs.count <= FEW else max(THREADS)
    tile = _tile(layout, element_type(x.dtype), wanted, limits)
    launches: list[Launch] = []
    listed = tiles = None
    if pairs.experts is None:
        mode = "ONE"
    elif tile > 1:
        mode = "GROUPS"
        launches, listed, tiles = _sort(layout, pairs, tile, workspace)
    else:
        mode, listed = "LIST", pairs.experts
    if not tile and isinstance(layout, DictLayout):
        launches, x = _prepare(layout, stack.arrays["column_scale"], x, pairs, workspace)
        per_x = 1
    product = Product(element_type(x.dtype), element_type(y.dtype), mode, tile)
    kernel = _product_kernel(layout, product, limits)
    arguments = (x, y, listed, tiles, *ints(pairs.expert, pairs.count, per_x))
    blocks = min(limits.multiprocessors, pairs.count * layout.units)
    return [*launches, Launch(kernel, blocks, (*_stack(stack), *arguments))]


def _parts(x: Any, y: Any, pairs: Pairs) -> Iterator[tuple[Any, Any, Pairs]]:
    """A call with at most ``MOST_BLOCKS`` x, or several."""
    count, experts = pairs.count // pairs.per_x, pairs.experts
    if count <= MOST_BLOCKS:
        yield x, y, pairs
        return
    x, y = x.reshape(count, -1), y.reshape(count, -1)
    experts = None if experts is None else experts.reshape(count, -1)
    for first in range(0, count, MOST_BLOCKS):
        part = slice(first, min(first + MOST_BLOCKS, count))
        listed = None if experts is None else experts[part]
        size = (part.stop - first) * pairs.per_x
        yield x[part], y[part], replace(pairs, count=size, experts=listed)


def _by_runs(packed: PackedRuns, x: Any, y: Any, pairs: Pairs, limits: DeviceLimits) -> Launch:
    """y [pairs, rows], one token after another, even if they have the same expert."""
    layout = packed.layout
    mode = "ONE" if pairs.experts is None else "LIST"
    kernel = runs.product(layout, element_type(x.dtype), element_type(y.dtype), mode)
    blocks, each = shares(layout, pairs.count, limits)
    sizes = ints(layout.experts, layout.rows)
    call = (x, y, pairs.experts, *ints(pairs.expert, each), ring(layout))
    grid = (blocks, pairs.per_x, pairs.count // pairs.per_x)
    return Launch(kernel, grid, (*packed.arrays.values(), *sizes, *call))


def shares(layout: RunLayout, matrices: int, limits: DeviceLimits) -> tuple[int, int]:
    """Blocks for each of so many matrices, and groups for a block.

    A block stages x of one pair only: one that came to a second would be late. There is one block
    to a multiprocessor at a time, so their number should be a little less than a multiple.
    """

    def time(blocks: int) -> int:
        turns = -(-matrices * blocks // limits.multiprocessors)
        return turns * (STAGING_GROUPS + -(-layout.groups // blocks))

    blocks = min(range(1, min(limits.multiprocessors, layout.groups) + 1), key=time)
    each = -(-layout.groups // blocks)
    return -(-layout.groups // each), each


def _by_batches(
    packed: PackedRuns,
    batch: Batch,
    x: Any,
    y: Any,
    pairs: Pairs,
    workspace: Workspace,
) -> list[Launch]:
    """y [pairs, rows], an expert's tokens together."""
    layout, limits = batch.layout, workspace.limits
    count = pairs.count if layout.column_scales else pairs.count // pairs.per_x
    terms = workspace.empty((count, batch.terms, batch.places), batch.term)
    sorting: tuple[Any, ...] = (None, None, None, None)
    mode = "ONE"
    if pairs.experts is not None:
        mode, sorting = "GROUPS", _sorting(layout.experts, pairs, workspace)
    about = ints(pairs.expert, pairs.count, pairs.per_x)
    prepare, product = _batch_kernels(batch, element_type(y.dtype), mode)
    column_scale, experts = packed.arrays["column_scale"], np.int32(layout.experts)
    cut = (x, column_scale, terms, pairs.experts, *sorting, experts, *about)
    call = (terms, y, *sorting[:2], *about, np.uint32(batch.ring), np.int32(batch.line_bytes - 1))
    return [
        Launch(prepare, prepare.blocks(count * batch.places + prepare.threads, limits), cut),
        Launch(
            product,
            min(limits.multiprocessors, pairs.count * layout.groups),
            (*packed.arrays.values(), experts, np.int32(layout.rows), *call),
        ),
    ]


def batch_for(stack: PackedStack, x: Any, pairs: Pairs, limits: DeviceLimits) -> Batch | None:
    """How to multiply by an expert's tokens together; None if that does not pay."""
    assert stack.runs
    packed, dtype = stack.runs, element_type(x.dtype)
    batch = run_batches.choose(packed.layout, packed.highest, dtype, limits)
    matrices = 1 if pairs.experts is None else min(stack.layout.experts, pairs.count)
    return batch if batch and pairs.count >= batch.fewest * matrices else None


def ring(layout: RunLayout) -> np.uint32:
    """From a region's end to the beginning of the next one."""
    return np.uint32(runs.LINE_BYTES * layout.slots - 4)


def _sort(
    layout: Layout, pairs: Pairs, tile: int, workspace: Workspace
) -> tuple[list[Launch], Any, Any]:
    """Order pairs by expert and cut them into tiles: launches, order, tiles."""
    arrays = _sorting(layout.experts, pairs, workspace)
    text = source("types", "sort", THREADS=SORT_THREADS, TOKENS=tile, SOME=SMALL_TILE)
    arguments = (pairs.experts, *arrays, *ints(pairs.count, layout.experts))
    return [Launch(Kernel("sort", text, SORT_THREADS), 1, arguments)], *arrays[:2]


def _sorting(experts: int, pairs: Pairs, workspace: Workspace) -> tuple[Any, Any, Any, Any]:
    """What sorting writes: order, tiles and scratch."""
    return (
        workspace.empty((pairs.count,), "int32"),
        workspace.empty((1 + 3 * pairs.count,), "int32"),
        workspace.empty((pairs.count,), "int32"),
        workspace.empty((experts + 1,), "int32"),
    )


def _prepare(
    layout: DictLayout, column_scale: Any, x: Any, pairs: Pairs, workspace: Workspace
) -> tuple[list[Launch], Any]:
    """x of each pair times its expert's column scales, in global memory: launches and that x."""
    scaled = workspace.empty((pairs.count, layout.columns + 1), "fp32")
    sizes = ints(layout.experts, pairs.expert, pairs.count, pairs.per_x, layout.columns)
    launch = elementwise(
        "prepare",
        size=(pairs.count, layout.columns + 1),
        arguments=(x, column_scale, pairs.experts, scaled, *sizes),
        X_TYPE=element_type(x.dtype),
        COLUMN_SCALES=int(layout.column_scales),
    )
    return [launch], scaled


def elementwise(
    *files: str, size: tuple[int, int], arguments: tuple[Any, ...], **defines: str | int
) -> Launch:
    """A launch of the last of ``files``, a thread for each element of a row or of some rows."""
    kernel = Kernel(files[-1], source("types", *files, **defines), ELEMENTWISE_THREADS)
    rows, columns = size
    return Launch(kernel, (-(-columns // kernel.threads), min(rows, MOST_BLOCKS), 1), arguments)


def _tile(layout: Layout, x_dtype: str, wanted: int, limits: DeviceLimits) -> int:
    """The most tokens, up to ``wanted``, whose x fits into shared memory; 0 if none does."""
    if isinstance(layout, DictLayout):
        return int_dict_kernels.tile(layout, x_dtype, wanted, limits)
    return int_group_kernels.tile(layout, x_dtype, wanted, limits)


@lru_cache(maxsize=1024)
def _product_kernel(layout: Layout, product: Product, limits: DeviceLimits) -> Kernel:
    if isinstance(layout, DictLayout):
        return int_dict_kernels.product(layout, product, limits)
    return int_group_kernels.product(layout, product)


@lru_cache(maxsize=1024)
def _batch_kernels(batch: Batch, y: str, pairs: str) -> tuple[Kernel, Kernel]:
    return batch.prepare(pairs), batch.product(y, pairs)


@lru_cache(maxsize=1024)
def _decode_kernel(layout: Layout, y_dtype: str, limits: DeviceLimits) -> Kernel:
    if isinstance(layout, DictLayout):
        return int_dict_kernels.decode(layout, y_dtype, limits)
    return int_group_kernels.decode(layout, y_dtype)


def _stack(stack: PackedStack) -> tuple[Any, ...]:
    """The arguments for a ``Stack`` of the kernels."""
    return (*stack.arrays.values(), *ints(*stack.layout.sizes))


def ints(*numbers: Number) -> tuple[np.int32 | Given, ...]:
    return tuple(each if isinstance(each, Given) else np.int32(each) for each in numbers)
