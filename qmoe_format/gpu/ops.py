"""y = W x on a GPU from compressed weights, and W itself where it is wanted.

x and y are CuPy arrays or torch tensors, used as they are, on the current stream of their library.
Nothing waits for the GPU, and every call can be captured in a CUDA graph once a call with arrays of
the same shapes and dtypes has been made before, so that its kernels are compiled. Sums are float32
([M-1], [M-2]) and the same from run to run; a subnormal product counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda, expert_plan, launch_plan
from qmoe_format.gpu.arrays import FLOATS, Library, element_type, library_of, signature
from qmoe_format.gpu.device_stack import DeviceMatrix, DeviceStack
from qmoe_format.gpu.launch import Given, Launch, Prepared
from qmoe_format.gpu.launch_plan import Workspace

MOST_PREPARED = 256  # calls of a stack that differ in what they are or in the shapes of arrays


def matvec(weights: DeviceStack | DeviceMatrix, x: Any, out: Any = None) -> Any:
    """Multiply a matrix by a vector: y = W x.

    Args:
        weights: ``stack[e]``, or a stack of one matrix.
        x: [columns], bf16 (in CuPy: uint16), fp16 or fp32.
        out: y to write, of any of these dtypes; by default a new array of the dtype of x.

    Returns:
        y [rows], an array of the same library.

    Raises:
        QMoEError: ``argument`` for x or out of another library, GPU, shape or dtype, or not
            contiguous; ``memory``.

    Example::

        y = gpu.matvec(stack[7], x)
    """
    return _product(weights, x, out, 1)


def matmul(weights: DeviceStack | DeviceMatrix, x: Any, out: Any = None) -> Any:
    """Multiply a matrix by each row of x: y = x W^T. Otherwise like ``matvec``.

    Meant for 2 to about 32 tokens; for more, ``decode`` and a dense product are faster.

    Args:
        weights: ``stack[e]``, or a stack of one matrix.
        x: [tokens, columns].
        out: y [tokens, rows] to write.
    """
    return _product(weights, x, out, 2)


def expert_matvec(
    stack: DeviceStack, x: Any, experts: Any, weights: Any = None, out: Any = None
) -> Any:
    """Multiply each token by the experts it is routed to. Otherwise like ``matvec``.

    Args:
        stack: the experts' matrices W.
        x: [tokens, columns], or [tokens, k, columns] with an x for each pair.
        experts: int32 [tokens, k], on the GPU. A number that is not an expert's, which the host
            cannot see, makes the result of its pair NaN.
        weights: [tokens, k], bf16, fp16 or fp32: add up the products of each token, in float32
            and before they are rounded to the dtype of y.
        out: y to write.

    Returns:
        y [tokens, k, rows] = W[experts[t, i]] x[t]; with weights [tokens, rows], the sum of
        weights[t, i] W[experts[t, i]] x[t] in the order of i.

    Example::

        y = gpu.expert_matvec(stack, x, experts)  # x [5, 768], experts [5, 2]: y [5, 2, 3072]
    """

    def prepare() -> _Call:
        _, rows, columns = stack.shape
        library = library_of(x, "x", stack.device)
        library.check(experts, "experts", (-1, -1), ("int32",))
        tokens, k = experts.shape
        library.check(x, "x", (tokens, k, columns) if len(x.shape) == 3 else (tokens, columns))
        shape: tuple[int, ...] = (tokens, k, rows)
        if weights is not None:
            library.check(weights, "weights", (tokens, k))
            shape = (tokens, rows)
        y = _result(library, out, shape, element_type(x.dtype))
        arrays = (x, experts, weights)
        return _Call(library, stack, arrays, y, lambda packed, _, *others: plan(packed, *others))

    plan = launch_plan.expert_matvec
    return _run(stack, "experts", 0, (x, experts, weights), out, prepare)


def gated_experts(
    inputs: DeviceStack | Sequence[DeviceStack],
    output: DeviceStack,
    x: Any,
    experts: Any,
    weights: Any,
    out: Any = None,
) -> Any:
    """Whole experts, from gate and up to down: for a few tokens, in three launches.

    Args:
        inputs: a stack with gate above up, or two stacks.
        output: down, of as many experts.
        x: [tokens, columns], bf16 (in CuPy: uint16), fp16 or fp32.
        experts: int32 or int64 [tokens, k], on the GPU. Those that do not exist are left out.
        weights: [tokens, k], bf16, fp16 or fp32.
        out: y to write, of any of these dtypes; by default a new array of the dtype of x.

    Returns:
        y [tokens, rows], the sum of weights[t, i] down(silu(gate x[t]) * up x[t]) of the experts
        experts[t, i], in the order of i. Products with gate and up are rounded to the dtype of x;
        so is silu(gate x) * up x, except where tokens go one after another from runs.

    Raises:
        QMoEError: ``argument`` for stacks that do not fit each other, or as for ``matvec``;
            ``limit`` for more than 65535 experts of a token; ``memory``.

    Example::

        y = gpu.gated_experts((gate, up), down, x, experts, weights)
    """
    stacks = (inputs,) if isinstance(inputs, DeviceStack) else tuple(inputs)
    # Whether they have runs, too: otherwise a call with codewords would be made again.
    what = ("gated", *((stack, stack.packed.runs is None) for stack in stacks))

    def prepare() -> _Call:
        _check_layer(stacks, output)
        library = library_of(x, "x", output.device)
        library.check(experts, "experts", (-1, -1), ("int32", "int64"))
        tokens, k = experts.shape
        library.check(x, "x", (tokens, stacks[0].shape[2]))
        library.check(weights, "weights", (tokens, k))
        y = _result(library, out, (tokens, output.shape[1]), element_type(x.dtype))
        for key in list(output.prepared):  # calls with other inputs, which would keep those
            if isinstance(key[0], tuple) and key[0][0] == "gated" and key[0] != what:
                del output.prepared[key]
        packed = [stack.packed for stack in stacks]
        plan = expert_plan.gated_experts
        arrays = (x, experts, weights)
        return _Call(
            library, output, arrays, y, lambda last, _, *others: plan(packed, last, *others)
        )

    return _run(output, what, 0, (x, experts, weights), out, prepare)


def _check_layer(inputs: Sequence[DeviceStack], output: DeviceStack) -> None:
    """Raises ``QMoEError``, ``argument``, if these are not the stacks of one layer."""
    experts, _, inner = output.shape
    shapes = [stack.shape for stack in inputs]
    if len(inputs) not in (1, 2) or set(shapes) != {
        (experts, 2 * inner // len(inputs), shapes[0][2])
    }:
        named = ", ".join(str(list(stack.shape)) for stack in (*inputs, output))
        raise QMoEError(
            "argument",
            f"stacks of shapes {named} are not gate, up and down of one layer",
            "give stacks [experts, inner, hidden] twice, or one [experts, 2 inner, hidden], and "
            "one [experts, hidden, inner]",
        )
    if len({stack.device for stack in (*inputs, output)}) > 1:
        raise QMoEError("argument", "the stacks are on different GPUs", "upload them to one GPU")


def decode(weights: DeviceStack | DeviceMatrix, dtype: str = "bf16", out: Any = None) -> Any:
    """Decode a matrix or a whole stack, exact to the bit.

    Args:
        weights: what to decode.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        out: W to write, CuPy's or torch's; its own dtype counts instead of ``dtype``.

    Returns:
        W [rows, columns], of a stack [experts, rows, columns]: ``out``, or a CuPy array (bf16:
        uint16).

    Raises:
        QMoEError: ``argument`` for another dtype, or an out that does not fit; ``memory``.
    """
    if isinstance(weights, DeviceStack):
        stack, first, count = weights, 0, len(weights)
    else:
        stack, first, count = weights.stack, weights.expert, 1
    if dtype not in FLOATS:
        raise QMoEError(
            "argument", f"weights cannot be decoded to {dtype}", f"choose {' or '.join(FLOATS)}"
        )

    def prepare() -> _Call:
        library = Library(stack.device) if out is None else library_of(out, "out", stack.device)
        y = _result(library, out, weights.shape, dtype)
        return _Call(
            library, stack, (), y, lambda packed, n, *others: plan(packed, n, count, *others)
        )

    plan = launch_plan.decode
    return _run(stack, ("decode", dtype, count), first, (), out, prepare)


def _matrix(weights: DeviceStack | DeviceMatrix) -> DeviceMatrix:
    if isinstance(weights, DeviceMatrix):
        return weights
    if len(weights) != 1:
        raise QMoEError(
            "argument",
            f"this is a stack of {len(weights)} matrices",
            "choose one of them, stack[e], or call expert_matvec",
        )
    return weights[0]


def _product(weights: DeviceStack | DeviceMatrix, x: Any, out: Any, dimensions: int) -> Any:
    """``matvec`` for x of one dimension, ``matmul`` for two."""
    matrix = _matrix(weights)
    stack = matrix.stack

    def prepare() -> _Call:
        rows, columns = matrix.shape
        library = library_of(x, "x", stack.device)
        library.check(x, "x", (-1, columns)[-dimensions:])
        y = _result(library, out, (*x.shape[:-1], rows), element_type(x.dtype))
        return _Call(library, stack, (x,), y, launch_plan.matmul)

    return _run(stack, dimensions, matrix.expert, (x,), out, prepare)


def _result(library: Library, out: Any, shape: tuple[int, ...], dtype: str) -> Given:
    """What y is: ``out``, checked; if it is None, of this dtype."""
    if out is None:
        return Given(shape, dtype)
    library.check(out, "out", shape)
    return Given(shape, element_type(out.dtype))


class _Call:
    """A call as it is prepared for all whose arrays have the same signatures.

    Args:
        library: what the arrays belong to.
        stack: what is multiplied or decoded.
        arrays: those of the first such call, checked; some may be None.
        y: the result.
        plan: from the stack, a number, what stands for the arrays, y and a workspace.
    """

    def __init__(
        self,
        library: Library,
        stack: DeviceStack,
        arrays: Sequence[Any],
        y: Given,
        plan: Callable[..., list[Launch]],
    ) -> None:
        workspace = Workspace(cuda.limits(stack.device), Given)
        number, given = (
            Given(),
            [a if a is None else Given(tuple(a.shape), element_type(a.dtype)) for a in arrays],
        )
        launches = plan(stack.packed, number, *given, y, workspace)
        self.library, self.y, self.scratch = library, y, workspace.scratch
        everything = [number, *given, y, *workspace.scratch]
        self.launches = Prepared(launches, everything, stack.device)


def _run(
    stack: DeviceStack,
    what: Any,
    number: int,
    arrays: tuple[Any, ...],
    out: Any,
    prepare: Callable[[], _Call],
) -> Any:
    """Do a call with a matrix ``number``; ``prepare`` it unless one like it was prepared before."""
    key = (what, *map(signature, arrays), signature(out))
    call = stack.prepared.get(key)
    if call is None:
        call = prepare()
        if len(stack.prepared) >= MOST_PREPARED:
            stack.prepared.clear()
        stack.prepared[key] = call
    library = call.library
    y = library.empty(call.y.shape, call.y.dtype) if out is None else out
    scratch = [library.empty(each.shape, each.dtype) for each in call.scratch]
    stream = library.stream()
    call.launches.run((np.int32(number), *arrays, y, *scratch), stream)
    # torch keeps for its graph what was allocated during a capture; CuPy knows nothing of graphs.
    if scratch and not library.torch and stream.is_capturing():
        stack.recorded.append(scratch)
    return y
