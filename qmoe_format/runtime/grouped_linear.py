"""y = x W^T with the W of experts that stay compressed, differentiable with respect to x.

One token is multiplied straight from the codewords, and so are a few. For many, rows of W are
decoded into a buffer of bounded size, which a dense product takes: no expert is ever whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from qmoe_format import codec
from qmoe_format.errors import QMoEError
from qmoe_format.runtime.lazy_stack import Stack

# How many tokens of one expert are multiplied in which way; benchmarks/products.py measures it.
# Up to so many one by one.
ALONE = 2
# From the codewords, sixteen tokens at once take time for each non-zero; the dense product takes it
# for each weight, and for decoding it first. They are even at about so many tokens times non-zeros
# a weight.
DENSE = 17.0
PER_THREAD = 1 << 18  # weights for which waking another thread is worth it
SCRATCH = 8 << 20  # bytes of decoded weights at a time
GPU_TYPES = (torch.bfloat16, torch.float16, torch.float32)
GPU_FEW = 64  # tokens of one expert: what gpu.matmul is meant for


class Group(NamedTuple):
    """Rows ``first`` to ``last`` of x are for ``expert``."""

    expert: int
    first: int
    last: int


def way(tokens: int, zero_fraction: float) -> str:
    """How so many tokens of one expert are multiplied: ``alone``, ``together`` or ``dense``."""
    if tokens <= ALONE:
        return "alone"
    return "dense" if tokens * (1 - zero_fraction) > DENSE else "together"


def linear(stack: Stack, x: torch.Tensor, expert: int) -> torch.Tensor:
    """y [tokens, rows] = x [tokens, columns] W^T with the W of one expert of ``stack``.

    x of any floating type, y of the same; products are summed in float32. Raises ``QMoEError``:
    ``argument`` for another shape, ``not-found`` for an expert that there is not.
    """
    return grouped_linear((stack,), x, (Group(expert, 0, len(x)),))


def grouped_linear(
    stacks: Sequence[Stack], x: torch.Tensor, groups: Sequence[Group]
) -> torch.Tensor:
    """y [tokens, rows of all stacks]: each group of rows of x [tokens, columns] with its expert.

    ``groups`` cover all rows of x. The products with each of ``stacks`` are side by side in y.
    Else as ``linear``.
    """
    for stack in stacks:
        if x.ndim != 2 or x.shape[1] != stack.shape[2]:
            raise QMoEError(
                "argument",
                f"x has the shape {list(x.shape)}, {stack.name} takes [tokens, {stack.shape[2]}]",
            )
    y: torch.Tensor = _GroupedLinear.apply(x, tuple(stacks), tuple(groups))  # type: ignore[no-untyped-call]
    return y


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, stacks: tuple[Stack, ...], groups: tuple[Group, ...]
    ) -> torch.Tensor:
        ctx.stacks, ctx.groups = stacks, groups
        return _on_gpu(stacks, x, groups) if x.is_cuda else _on_cpu(stacks, x, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        dx = dy.new_zeros((len(dy), ctx.stacks[0].shape[2]), dtype=torch.float32)
        for stack, columns in _side_by_side(ctx.stacks):
            for expert, first, last in ctx.groups:
                for rows, weights in _decoded(stack, expert, dx):
                    dx[first:last] += dy[first:last, columns][:, rows].to(dx.dtype) @ weights
        return dx.to(dy.dtype), None, None


def _on_cpu(stacks: tuple[Stack, ...], x: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
    given = x.detach().to(torch.float32).contiguous()
    y = torch.empty((len(x), sum(stack.shape[1] for stack in stacks)), dtype=torch.float32)
    x_array, y_array = given.numpy(), y.numpy()
    single: list[codec.Product] = []
    for stack, columns in _side_by_side(stacks):
        for expert, first, last in groups:
            matrix = stack.matrix(expert)
            how = way(last - first, matrix.trits.zero_fraction)
            if how == "alone":
                single += [(matrix, x_array[i], y_array[i, columns]) for i in range(first, last)]
            elif how == "dense":
                for rows, weights in _decoded(stack, expert, given):
                    torch.mm(given[first:last], weights.T, out=y[first:last, columns][:, rows])
            else:
                codec.matmul(
                    matrix, x_array[first:last], y_array[first:last, columns], stack.threads
                )
    size = sum(matrix.rows * matrix.columns for matrix, _, _ in single)
    codec.matvecs(single, min(stacks[0].threads, 1 + size // PER_THREAD))
    return y.to(x.dtype)


def _on_gpu(stacks: tuple[Stack, ...], x: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
    from qmoe_format import gpu

    dtype = x.dtype if x.dtype in GPU_TYPES else torch.float32
    given = x.detach().to(dtype).contiguous()
    y = given.new_empty((len(x), sum(stack.shape[1] for stack in stacks)))
    for stack, columns in _side_by_side(stacks):
        for expert, first, last in groups:
            if last - first > GPU_FEW:
                for _, weights in _decoded(stack, expert, given):
                    y[first:last, columns] = given[first:last] @ weights.T
            else:
                device = stack.upload(x.get_device())
                y[first:last, columns] = gpu.matmul(device[expert], given[first:last])
    return y.to(x.dtype)


def _side_by_side(stacks: Sequence[Stack]) -> Iterator[tuple[Stack, slice]]:
    """Each stack, and which columns of y are its own."""
    start = 0
    for stack in stacks:
        yield stack, slice(start, start + stack.shape[1])
        start += stack.shape[1]


def _decoded(stack: Stack, expert: int, like: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of W and their weights, in one buffer that the next ones overwrite.

    Of the type and on the device of ``like``; on a GPU the whole of W at once.
    """
    _, rows, columns = stack.shape
    if like.is_cuda:
        from qmoe_format import gpu

        weights = like.new_empty((rows, columns))
        device = stack.upload(like.get_device())
        gpu.decode(device[expert], out=weights)
        yield slice(0, rows), weights
        return
    matrix = stack.matrix(expert)
    together = max(1, SCRATCH // (4 * max(columns, 1)))
    buffer = np.empty((min(together, rows), columns), np.float32)
    for first in range(0, rows, together):
        part = buffer[: min(together, rows - first)]
        codec.dequantize_rows(matrix, first, part, stack.threads)
        yield slice(first, first + len(part)), torch.from_numpy(part)
