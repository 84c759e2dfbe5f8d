"""y = W x on a GPU from compressed weights, and W itself where it is wanted.

x and y are CuPy arrays or torch tensors, used as they are, on the current stream of their library.
Nothing waits for the GPU, and every call can be captured in a CUDA graph once it has been made
before, so that its kernels are compiled. Sums are float32 ([M-1], [M-2]) and the same from run to
run; a subnormal product counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda, launch_plan
from qmoe_format.gpu.arrays import FLOATS, Library, element_type, library_of
from qmoe_format.gpu.device_stack import DeviceMatrix, DeviceStack
from qmoe_format.gpu.launch import Launch, execute
from qmoe_format.gpu.launch_plan import Workspace


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
    matrix = _matrix(weights)
    rows, columns = matrix.shape
    library = library_of(x, "x", matrix.stack.device)
    library.check(x, "x", (columns,))
    y = library.output(out, (rows,), element_type(x.dtype))
    vectors = (x.reshape(1, -1), y.reshape(1, rows))
    _run(library, matrix.stack, launch_plan.matmul, matrix.expert, *vectors)
    return y


def matmul(weights: DeviceStack | DeviceMatrix, x: Any, out: Any = None) -> Any:
    """Multiply a matrix by each row of x: y = x W^T. Otherwise like ``matvec``.

    Meant for 2 to about 32 tokens; for more, ``decode`` and a dense product are faster.

    Args:
        weights: ``stack[e]``, or a stack of one matrix.
        x: [tokens, columns].
        out: y [tokens, rows] to write.
    """
    matrix = _matrix(weights)
    rows, columns = matrix.shape
    library = library_of(x, "x", matrix.stack.device)
    library.check(x, "x", (-1, columns))
    y = library.output(out, (x.shape[0], rows), element_type(x.dtype))
    _run(library, matrix.stack, launch_plan.matmul, matrix.expert, x, y)
    return y


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
    _, rows, columns = stack.shape
    library = library_of(x, "x", stack.device)
    library.check(experts, "experts", (-1, -1), ("int32",))
    tokens, k = experts.shape
    library.check(x, "x", (tokens, k, columns) if len(x.shape) == 3 else (tokens, columns))
    shape: tuple[int, ...] = (tokens, k, rows)
    if weights is not None:
        library.check(weights, "weights", (tokens, k))
        shape = (tokens, rows)
    y = library.output(out, shape, element_type(x.dtype))
    _run(library, stack, launch_plan.expert_matvec, x, experts, weights, y)
    return y


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
    library = Library(stack.device) if out is None else library_of(out, "out", stack.device)
    y = library.output(out, weights.shape, dtype)
    _run(library, stack, launch_plan.decode, first, count, y)
    return y


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


def _run(
    library: Library, stack: DeviceStack, plan: Callable[..., list[Launch]], *arguments: Any
) -> None:
    """Execute what ``plan``, a function of ``launch_plan``, makes of its arguments."""
    workspace = Workspace(cuda.limits(library.device), library.empty)
    launches = plan(stack.packed, *arguments, workspace)
    stream = library.stream()
    execute(launches, stack.device, stream)
    # torch keeps for its graph what was allocated during a capture; CuPy knows nothing of graphs.
    if workspace.scratch and not library.torch and stream.is_capturing():
        stack.recorded.append(workspace.scratch)
