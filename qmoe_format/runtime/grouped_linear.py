"""y = x W^T with experts that stay compressed, differentiable with respect to x.

A few tokens are multiplied with weights as they are stored. For many, rows of W are decoded into a
scratch buffer for a dense product: on the CPU no expert is ever decoded as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qmoe_format import codec
from qmoe_format.errors import QMoEError
from qmoe_format.runtime.lazy_stack import LazyStack
from qmoe_format.runtime.tuning import Tuning

GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Kernel = Literal["matvec", "matmul", "dense"]
"""As stored one token at a time, as stored several at once, or with decoded weights."""


class Group(NamedTuple):
    """Rows ``first`` to ``last`` of x go to ``expert``."""

    expert: int
    first: int
    last: int


def choose_kernel(tokens: int, matrix: codec.Matrix, tuning: Tuning) -> Kernel:
    """The fastest kernel on a CPU for the tokens of one expert."""
    if tokens <= tuning.matvec_tokens:
        return "matvec"
    if isinstance(matrix, codec.GroupedMatrix):
        return "dense" if tokens > tuning.grouped_dense_tokens else "matmul"
    nonzeros = 1 - matrix.levels.zero_fraction
    return "dense" if tokens * nonzeros > tuning.dense_tokens else "matmul"


def grouped_linear(
    stacks: Sequence[LazyStack], x: Tensor, groups: Sequence[Group], tuning: Tuning
) -> Tensor:
    """Multiply each group of tokens by its expert of every stack: y [tokens, rows of all stacks].

    Args:
        stacks: of equally many columns.
        x: floating [tokens, columns]; y has its dtype, sums are float32.
        groups: cover all rows of ``x``.

    Raises:
        QMoEError: ``argument`` for another shape of ``x``; ``not-found`` for an unknown expert;
            the codes of reading.
    """
    for stack in stacks:
        if x.ndim != 2 or x.shape[1] != stack.shape[2]:
            raise QMoEError(
                "argument",
                f"{stack.name}: x has shape {list(x.shape)}, not [tokens, {stack.shape[2]}]",
                "give one row of activations per token",
            )
    y: Tensor = _GroupedLinear.apply(x, stacks, groups, tuning)  # type: ignore[no-untyped-call]
    return y


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stacks: Sequence[LazyStack], groups: Sequence[Group], tuning: Tuning
    ) -> Tensor:
        ctx.stacks, ctx.groups, ctx.tuning = stacks, groups, tuning
        if x.is_cuda:
            return _on_gpu(stacks, x, groups, tuning)
        return _on_cpu(stacks, x, groups, tuning, exact=ctx.needs_input_grad[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        dx = dy.new_zeros((len(dy), ctx.stacks[0].shape[2]), dtype=torch.float32)
        for stack, columns in _side_by_side(ctx.stacks):
            for expert, first, last in ctx.groups:
                for rows, weights in _decoded_rows(stack, expert, dx, ctx.tuning):
                    dx[first:last] += dy[first:last, columns][:, rows].to(dx.dtype) @ weights
        return dx.to(dy.dtype), None, None, None


def _on_cpu(
    stacks: Sequence[LazyStack], x: Tensor, groups: Sequence[Group], tuning: Tuning, exact: bool
) -> Tensor:
    """``exact``: whatever ``LazyStack.hot`` says."""
    x_float = x.detach().to(torch.float32).contiguous()
    y = torch.empty((len(x), sum(stack.shape[1] for stack in stacks)), dtype=torch.float32)
    x_array, y_array = x_float.numpy(), y.numpy()
    singles: list[codec.Matvec] = []
    rounded: list[codec.RoundedProduct] = []
    packed: list[codec.PackedProduct] = []
    for stack, columns in _side_by_side(stacks):
        for expert, first, last in groups:
            matrix = stack.matrix(expert)
            if stack.hot and not exact and codec.packable(matrix):
                found = stack.hot.find((stack.name, expert), matrix, last - first, tuning.threads)
                if found:
                    packed.append((found, x_array[first:last], y_array[first:last, columns]))
                else:
                    rounded.append((matrix, x_array[first:last], y_array[first:last, columns]))
                continue
            kernel = choose_kernel(last - first, matrix, tuning)
            if kernel == "matvec":
                singles += [(matrix, x_array[i], y_array[i, columns]) for i in range(first, last)]
            elif kernel == "matmul":
                part = y_array[first:last, columns]
                codec.matmul(matrix, x_array[first:last], part, tuning.threads)
            else:
                for rows, weights in _decoded_rows(stack, expert, x_float, tuning):
                    torch.mm(x_float[first:last], weights.T, out=y[first:last, columns][:, rows])
    codec.matvecs(singles, _threads(singles, tuning.weights_per_thread, tuning))
    codec.multiply_rounded(rounded, _threads(rounded, tuning.weights_per_thread, tuning))
    codec.multiply_packed(packed, _threads(packed, tuning.packed_per_thread, tuning))
    return y.to(x.dtype)


def _threads(products: Sequence[tuple[Any, Any, Any]], per_thread: int, tuning: Tuning) -> int:
    size: int = sum(out.size * matrix.columns for matrix, _, out in products)
    return min(tuning.threads, 1 + size // per_thread)


def _on_gpu(
    stacks: Sequence[LazyStack], x: Tensor, groups: Sequence[Group], tuning: Tuning
) -> Tensor:
    from qmoe_format import gpu

    dtype = x.dtype if x.dtype in GPU_DTYPES else torch.float32
    x_gpu = x.detach().to(dtype).contiguous()
    y = x_gpu.new_empty((len(x), sum(stack.shape[1] for stack in stacks)))
    for stack, columns in _side_by_side(stacks):
        for expert, first, last in groups:
            if last - first > tuning.gpu_expert_tokens:
                for _, weights in _decoded_rows(stack, expert, x_gpu, tuning):
                    y[first:last, columns] = x_gpu[first:last] @ weights.T
            else:
                uploaded = stack.upload(x.get_device())
                y[first:last, columns] = gpu.matmul(uploaded[expert], x_gpu[first:last])
    return y.to(x.dtype)


def _side_by_side(stacks: Sequence[LazyStack]) -> Iterator[tuple[LazyStack, slice]]:
    """Each stack and its columns of y."""
    start = 0
    for stack in stacks:
        yield stack, slice(start, start := start + stack.shape[1])


def _decoded_rows(
    stack: LazyStack, expert: int, like: Tensor, tuning: Tuning
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of W and their weights, of the dtype and on the device of ``like``.

    On a GPU all rows come at once; on the CPU a few at a time, which overwrite those before.
    """
    _, rows, columns = stack.shape
    if like.is_cuda:
        from qmoe_format import gpu

        weights = like.new_empty((rows, columns))
        gpu.decode(stack.upload(like.get_device())[expert], out=weights)
        yield slice(0, rows), weights
        return
    matrix = stack.matrix(expert)
    tile = max(1, tuning.scratch_bytes // (4 * max(columns, 1)))
    scratch = np.empty((min(tile, rows), columns), np.float32)
    for first in range(0, rows, tile):
        part = scratch[: min(tile, rows - first)]
        codec.dequantize_rows(matrix, first, part, tuning.threads)
        yield slice(first, first + len(part)), torch.from_numpy(part)
