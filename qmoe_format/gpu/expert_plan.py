"""From a call of ``gated_experts`` to the kernel launches it takes: whole experts, gate to down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from qmoe_format.gpu import runs
from qmoe_format.gpu.arrays import element_type
from qmoe_format.gpu.launch import Kernel, Launch
from qmoe_format.gpu.launch_plan import (
    MOST_BLOCKS,
    Pairs,
    Workspace,
    batch_for,
    check_experts,
    elementwise,
    ints,
    products,
    ring,
    shares,
    weighted,
)
from qmoe_format.gpu.packing import PackedStack
from qmoe_format.gpu.runs import RunLayout


def gated_experts(
    inputs: Sequence[PackedStack],
    output: PackedStack,
    x: Any,
    experts: Any,
    weights: Any,
    y: Any,
    workspace: Workspace,
) -> list[Launch]:
    """y [tokens, rows]: each token's experts, weighted and added up.

    Three launches from runs, with as many pairs as go one after another: the inputs, the output,
    whose blocks compute the activation as they stage it, and the sums. (Blocks of an expert have
    rows of their own order, so none could add up those of others.)

    Args:
        inputs: gate above up in one stack, or two.
        output: down.
        x: [tokens, columns].
        experts: int32 or int64 [tokens, k]; those that do not exist are left out.
        weights: [tokens, k].
        y: [tokens, rows].
        workspace: for scratch arrays.

    Raises:
        QMoEError: ``limit`` for more than ``MOST_BLOCKS`` experts of a token.
    """
    (tokens, k), (rows, inner) = experts.shape, (output.layout.rows, output.layout.columns)
    check_experts(k)
    if not tokens * rows:
        return []
    count, dtype = tokens * k, element_type(x.dtype)
    pairs = Pairs(count, k, -1, experts)
    each = workspace.empty((tokens, k, rows), "fp32")
    # Gate and up of a pair lie together; those of two stacks, first all gates, then all ups.
    hidden = workspace.empty((2 * count, inner), dtype)
    apart, stride = (1, 2 * inner) if len(inputs) == 1 else (count, inner)
    gate, up = hidden[0 : 2 * count - apart], hidden[apart : 2 * count]
    one_by_one = 0 < count <= MOST_BLOCKS and all(
        stack.runs and not batch_for(stack, x, pairs, workspace.limits)
        for stack in (*inputs, output)
    )
    if one_by_one:
        launches = [
            *_inputs(inputs, x, hidden, experts, workspace),
            _output(output, gate, up, stride, each, experts, workspace),
        ]
    else:
        launches, pairs = _narrowed(pairs, workspace)
        parts = (hidden,) if len(inputs) == 1 else (gate, up)
        for stack, part in zip(inputs, parts, strict=True):
            launches += products(stack, x, part, pairs, workspace)
        activated = workspace.empty((count, inner), dtype)
        launches.append(
            elementwise(
                *("gate", "activate"),
                size=count * inner,
                workspace=workspace,
                arguments=(gate, up, activated, *ints(count, inner, stride)),
                X_TYPE=dtype,
            )
        )
        launches += products(output, activated, each, replace(pairs, per_x=1), workspace)
    return [*launches, weighted(each, weights, y, workspace, experts, output.layout.experts)]


def _inputs(
    inputs: Sequence[PackedStack], x: Any, hidden: Any, experts: Any, workspace: Workspace
) -> list[Launch]:
    """One launch, or two if the stacks have runs of different kinds."""
    found = [stack.runs for stack in inputs if stack.runs]
    if len(found) == 2 and found[0].layout != found[1].layout:
        half = hidden.shape[0] // 2
        parts = hidden[0:half], hidden[half : 2 * half]
        return [
            launch
            for stack, part in zip(inputs, parts, strict=True)
            for launch in _inputs([stack], x, part, experts, workspace)
        ]
    layout, (tokens, k) = found[0].layout, experts.shape
    blocks, groups = shares(layout, len(found) * tokens * k, workspace.limits)
    kernel = _inputs_kernel(layout, *map(element_type, (x.dtype, experts.dtype)), len(found))
    first, second = found[0].arrays.values(), found[-1].arrays.values()
    call = (x, hidden, experts, *ints(groups), ring(layout))
    arguments = (*first, *second, *ints(layout.experts, layout.rows), *call)
    return [Launch(kernel, (len(found) * blocks, k, tokens), arguments)]


def _output(
    stack: PackedStack,
    gate: Any,
    up: Any,
    stride: int,
    each: Any,
    experts: Any,
    workspace: Workspace,
) -> Launch:
    assert stack.runs
    layout, (tokens, k) = stack.runs.layout, experts.shape
    blocks, groups = shares(layout, tokens * k, workspace.limits)
    kernel = _output_kernel(layout, *map(element_type, (gate.dtype, experts.dtype)))
    call = (gate, up, each, experts, *ints(stride, groups), ring(layout))
    sizes = ints(layout.experts, layout.rows)
    return Launch(kernel, (blocks, k, tokens), (*stack.runs.arrays.values(), *sizes, *call))


def _narrowed(pairs: Pairs, workspace: Workspace) -> tuple[list[Launch], Pairs]:
    """The pairs with numbers of experts of 32 bits, and what makes those."""
    experts = pairs.experts
    if element_type(experts.dtype) == "int32":
        return [], pairs
    numbers = workspace.empty(experts.shape, "int32")
    arguments = (experts, numbers, *ints(pairs.count))
    launch = elementwise("narrow", size=pairs.count, workspace=workspace, arguments=arguments)
    return [launch], replace(pairs, experts=numbers)


@lru_cache(maxsize=1024)
def _inputs_kernel(layout: RunLayout, x: str, index: str, stacks: int) -> Kernel:
    return runs.inputs(layout, x, index, stacks)


@lru_cache(maxsize=1024)
def _output_kernel(layout: RunLayout, x: str, index: str) -> Kernel:
    return runs.output(layout, x, index)
