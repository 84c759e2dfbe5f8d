"""From a call of ``gated_experts`` to the kernel launches it takes: whole experts, gate to down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qmoe_format.gpu import runs
from qmoe_format.gpu.arrays import element_type
from qmoe_format.gpu.launch import Launch
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

    Three launches, as long as pairs go one after another from runs: the inputs, the output, whose
    blocks compute the activation as they stage it, and the sums. (Blocks of an expert have rows of
    their own order, so none could add up those of others.)

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
    total = weighted(each, weights, y, experts, output.layout.experts)
    if not count:
        return [total]
    hidden = workspace.empty((2 * count, inner), dtype)  # as in ``kernels/run_output.cu``
    one_by_one = count <= MOST_BLOCKS and all(
        stack.runs and not batch_for(stack, x, pairs, workspace.limits)
        for stack in (*inputs, output)
    )
    if one_by_one:
        return [
            *_inputs(inputs, x, hidden, experts, workspace),
            _output(output, len(inputs), hidden, each, experts, workspace),
            total,
        ]
    launches, pairs = _narrowed(pairs, workspace)
    for stack, part in zip(inputs, _parts(hidden, len(inputs)), strict=True):
        launches += products(stack, x, part, pairs, workspace)
    activated = workspace.empty((count, inner), dtype)
    activate = elementwise(
        *("gate", "activate"),
        size=(count, inner),
        arguments=(hidden, activated, *ints(count, inner)),
        X_TYPE=dtype,
        STACKS=len(inputs),
    )
    one_x_each = replace(pairs, per_x=1)
    return [*launches, activate, *products(output, activated, each, one_x_each, workspace), total]


def _parts(hidden: Any, stacks: int) -> list[Any]:
    """What each of the inputs writes."""
    size = hidden.shape[0] // stacks
    return [hidden[i * size : (i + 1) * size] for i in range(stacks)]


def _inputs(
    inputs: Sequence[PackedStack], x: Any, hidden: Any, experts: Any, workspace: Workspace
) -> list[Launch]:
    """One launch, or two if the stacks have runs of different kinds."""
    found = [stack.runs for stack in inputs if stack.runs]
    if len(found) == 2 and found[0].layout != found[1].layout:
        return [
            launch
            for stack, part in zip(inputs, _parts(hidden, 2), strict=True)
            for launch in _inputs([stack], x, part, experts, workspace)
        ]
    layout, (tokens, k) = found[0].layout, experts.shape
    blocks, groups = shares(layout, len(found) * tokens * k, workspace.limits)
    kernel = runs.inputs(layout, *map(element_type, (x.dtype, experts.dtype)), len(found))
    first, second = found[0].arrays.values(), found[-1].arrays.values()
    call = (x, hidden, experts, *ints(groups), ring(layout))
    arguments = (*first, *second, *ints(layout.experts, layout.rows), *call)
    return [Launch(kernel, (len(found) * blocks, k, tokens), arguments)]


def _output(
    stack: PackedStack, inputs: int, hidden: Any, each: Any, experts: Any, workspace: Workspace
) -> Launch:
    """``inputs``: from how many stacks ``hidden`` comes."""
    assert stack.runs
    layout, (tokens, k) = stack.runs.layout, experts.shape
    blocks, groups = shares(layout, tokens * k, workspace.limits)
    kernel = runs.output(layout, *map(element_type, (hidden.dtype, experts.dtype)), inputs)
    call = (hidden, each, experts, *ints(groups), ring(layout))
    sizes = ints(layout.experts, layout.rows)
    return Launch(kernel, (blocks, k, tokens), (*stack.runs.arrays.values(), *sizes, *call))


def _narrowed(pairs: Pairs, workspace: Workspace) -> tuple[list[Launch], Pairs]:
    """The pairs with numbers of experts of 32 bits, and what makes those."""
    experts = pairs.experts
    if element_type(experts.dtype) == "int32":
        return [], pairs
    numbers = workspace.empty(experts.shape, "int32")
    arguments = (experts, numbers, *ints(pairs.count))
    launch = elementwise("narrow", size=(1, pairs.count), arguments=arguments)
    return [launch], replace(pairs, experts=numbers)
