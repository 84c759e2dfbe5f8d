"""y = W x on a GPU, straight from the codewords, and W itself where it is wanted.

x and y are CuPy arrays or torch tensors, used as they are, on the current stream of their library.
Nothing waits for the GPU, and everything can be recorded in a CUDA graph (after one call before,
so that kernels are compiled). Sums are float32 ([M-1], [M-2]), the same from run to run; a
subnormal product counts as 0.
"""

from __future__ import annotations

from typing import Any

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda, plan
from qmoe_format.gpu.arrays import Cupy, Library, library, operand
from qmoe_format.gpu.device_stack import DeviceMatrix, DeviceStack, matrix_of
from qmoe_format.gpu.launch import Launch
from qmoe_format.gpu.plan import Operand

FLOATS = tuple(plan.ELEMENTS)


def matvec(weights: DeviceStack | DeviceMatrix, x: Any, out: Any = None) -> Any:
    """y [rows] = W x, with x [columns] of bf16, fp16 or fp32, and y of the same type.

    ``out``: y to be written, of any of these types. Raises ``QMoEError``: ``argument`` for x or
    out of another library, device, shape or type, or not contiguous; ``memory``.
    """
    matrix = matrix_of(weights)
    home = library(x, "x", matrix.stack.device)
    rows, columns = matrix.shape
    given = operand(home, x, "x", (columns,), FLOATS)
    y = _output(home, out, (rows,), given.dtype)
    _multiply(home, matrix, Operand(x.reshape(1, -1), given.dtype), _reshaped(y, (1, rows)))
    return y.array


def matmul(weights: DeviceStack | DeviceMatrix, x: Any, out: Any = None) -> Any:
    """y [tokens, rows]: W times each row of x [tokens, columns]. Else as ``matvec``.

    Meant for 2 to 64 tokens; for many, ``decode`` and a dense product are faster.
    """
    matrix = matrix_of(weights)
    home = library(x, "x", matrix.stack.device)
    rows, columns = matrix.shape
    given = operand(home, x, "x", (-1, columns), FLOATS)
    y = _output(home, out, (x.shape[0], rows), given.dtype)
    _multiply(home, matrix, given, y)
    return y.array


def expert_matvec(
    stack: DeviceStack, x: Any, experts: Any, weights: Any = None, out: Any = None
) -> Any:
    """All (token, expert) pairs of a layer's tokens in one call.

    ``x`` [tokens, columns], or [tokens, k, columns] if each pair has its own; ``experts`` int32
    [tokens, k], on the GPU; ``weights`` [tokens, k] of bf16, fp16 or fp32, or None.

    Returns y [tokens, k, rows], or with ``weights`` their sums [tokens, rows]: y[t] is the sum of
    weights[t, i] W[experts[t, i]] x[t], added up in the order of i. A number that is not an
    expert's, which the host cannot see, makes the result of its pair NaN. Else as ``matvec``.
    """
    home = library(x, "x", stack.device)
    _, rows, columns = stack.shape
    chosen = operand(home, experts, "experts", (-1, -1), ("int32",)).array
    tokens, k = chosen.shape
    shape = (tokens, k, columns) if len(x.shape) == 3 else (tokens, columns)
    given = operand(home, x, "x", shape, FLOATS)
    scales = None
    if weights is not None:
        scales = operand(home, weights, "weights", (tokens, k), FLOATS)
    y = _output(home, out, (tokens, k, rows) if scales is None else (tokens, rows), given.dtype)
    scratch = _Scratch(home)
    launches = plan.expert_matvec(
        stack.packed, given, chosen, scales, y, cuda.device(stack.device), scratch.empty
    )
    _run(home, stack, launches, scratch)
    return y.array


def decode(weights: DeviceStack | DeviceMatrix, dtype: str = "bf16", out: Any = None) -> Any:
    """The weights [rows, columns], of a stack [experts, rows, columns], exact to the bit.

    ``dtype``: ``bf16``, ``fp16`` or ``fp32``. Without ``out``, a CuPy array (bf16: ``uint16``);
    ``out`` may be torch's and has the type itself. Raises as ``matvec``.
    """
    stack = weights if isinstance(weights, DeviceStack) else weights.stack
    first, count = (0, len(stack)) if isinstance(weights, DeviceStack) else (weights.expert, 1)
    if dtype not in FLOATS:
        raise QMoEError("argument", f"weights are decoded to {' or '.join(FLOATS)}, not {dtype}")
    home = Cupy(stack.device) if out is None else library(out, "out", stack.device)
    y = _output(home, out, weights.shape, dtype)
    launches = plan.decode(stack.packed, first, count, y, cuda.device(stack.device))
    _run(home, stack, launches, _Scratch(home))
    return y.array


class _Scratch:
    """Scratch arrays of a call."""

    def __init__(self, home: Library) -> None:
        self.home = home
        self.arrays: list[Any] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        self.arrays.append(self.home.empty(shape, dtype))
        return self.arrays[-1]


def _multiply(home: Library, matrix: DeviceMatrix, x: Operand, y: Operand) -> None:
    stack, scratch = matrix.stack, _Scratch(home)
    limits = cuda.device(stack.device)
    launches = plan.matmul(stack.packed, matrix.expert, x, y, limits, scratch.empty)
    _run(home, stack, launches, scratch)


def _run(home: Library, stack: DeviceStack, launches: list[Launch], scratch: _Scratch) -> None:
    stream = home.stream()
    cuda.launch(stack.device, stream, launches)
    # torch keeps what was allocated during a recording for its graph; CuPy does not know of graphs.
    if scratch.arrays and isinstance(home, Cupy) and stream.is_capturing():
        stack.recorded.append(scratch.arrays)


def _output(home: Library, out: Any, shape: tuple[int, ...], dtype: str) -> Operand:
    if out is None:
        return Operand(home.empty(shape, dtype), dtype)
    return operand(home, out, "out", shape, FLOATS)


def _reshaped(operand: Operand, shape: tuple[int, ...]) -> Operand:
    return Operand(operand.array.reshape(shape), operand.dtype)
