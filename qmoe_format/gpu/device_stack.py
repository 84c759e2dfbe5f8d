"""Matrices in a GPU's memory, encoded as they are in a file or as runs: no dense weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda, packing
from qmoe_format.gpu.int_dict_packing import DictLayout
from qmoe_format.gpu.packing import Layout, Matrix, PackedStack
from qmoe_format.gpu.runs import choose, expected_bytes
from qmoe_format.gpu.transcode import runs_of

STAGING = 32 << 20  # bytes of page-locked memory in each of two buffers
SPARE = 0.1  # of a GPU's memory, for activations and the like


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """One matrix of a stack on a GPU: y = W x, W [rows, columns]."""

    stack: DeviceStack
    expert: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.stack.shape[1:]


@dataclass(slots=True, eq=False)
class DeviceStack:
    """Encoded matrices of one shape on a GPU. ``stack[e]`` is one of them, without a copy.

    Like other arrays of CuPy's, a stack has to be kept until calls on streams other than CuPy's
    current one are done: its memory may be used anew at once.

    Attributes:
        device: number of the GPU.
        packed: the arrays there.
        recorded: scratch arrays of calls captured in a CUDA graph, which uses them at every replay;
            they stay as long as the stack.
        prepared: calls that were made before, ready to be launched again.
    """

    device: int
    packed: PackedStack
    recorded: list[Any] = field(default_factory=list, repr=False)
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, rows, columns."""
        layout = self.packed.layout
        return layout.experts, layout.rows, layout.columns

    @property
    def bytes(self) -> int:
        """Memory that the stack takes on the GPU."""
        runs = self.packed.runs
        return runs.bytes if runs else self.packed.layout.bytes

    def __len__(self) -> int:
        return self.packed.layout.experts

    def __getitem__(self, expert: int) -> DeviceMatrix:
        experts = len(self)
        if not -experts <= expert < experts:
            raise IndexError(f"expert {expert} of a stack of {experts}")
        return DeviceMatrix(self, expert % experts)

    def __iter__(self) -> Iterator[DeviceMatrix]:
        return (DeviceMatrix(self, expert) for expert in range(len(self)))


def upload(
    matrices: Matrix | Sequence[Matrix], *, device: int | None = None, runs: bool = True
) -> DeviceStack:
    """Copy matrices to a GPU. The copy is complete when this returns.

    CuPy keeps the 64 MB of page-locked memory that this takes for the next time.

    Args:
        matrices: ``int-dict`` or ``int-group``; one, or several that differ in nothing but their
            weights, number of levels, dictionaries and group sizes.
        device: number of the GPU; by default CuPy's current one.
        runs: see ``add_runs``; otherwise they stay as they are encoded.

    Raises:
        QMoEError: ``dependency`` without CuPy; ``device`` without a suitable GPU; ``memory``;
            ``argument`` for no matrix, or matrices that cannot form a stack; ``limit`` for a
            segment or row of more than 2^26 weights. If codewords differ in width, matrices are
            encoded anew, and the codes of ``codec.decode`` are possible.

    Example::

        with qmoe_format.open("model.qmoe") as file:
            stack = gpu.upload([file.encoded(name, expert) for expert in range(16)])
        stack.shape  # (16, 3072, 768)
    """
    sequence = packing.alike([matrices] if isinstance(matrices, Matrix) else list(matrices))
    layout = packing.layout(sequence)
    cupy = cuda.require()
    number = cupy.cuda.Device().id if device is None else device
    cuda.limits(number)
    with cupy.cuda.Device(number):
        with cuda.out_of_memory():
            buffer = cupy.zeros(layout.bytes, np.uint8)
        _copy(cupy, layout, sequence, buffer)
    stack = DeviceStack(number, PackedStack(layout, layout.arrays(buffer)))
    del buffer  # only the stack has it: it can let it go
    if runs:
        add_runs(stack)
    return stack


def add_runs(stack: DeviceStack, *, spare: int = 0) -> bool:
    """Make products with ``int-dict`` matrices two to five times as fast: of codewords, make runs.

    Runs take 1.2 to 1.4 times the memory of the codewords, see ``runs``, which go when they are
    made; until then both are there, and at most 1 GB of levels, or a matrix of them.

    Args:
        stack: what to make faster. CUDA graphs of calls with it have to be captured again.
        spare: bytes of the GPU's memory to leave free, besides ``SPARE`` of it.

    Returns:
        Whether the stack has runs now. It stays as it is if large levels or very long rows speak
        against them, or for want of memory.

    Raises:
        QMoEError: ``dependency`` if CuPy cannot compile.
    """
    packed, cupy = stack.packed, cuda.require()
    codewords = packed.layout
    if packed.runs or not isinstance(codewords, DictLayout):
        return packed.runs is not None
    layout, device = choose(codewords, cuda.limits(stack.device)), cupy.cuda.Device(stack.device)
    if layout is None:
        return False
    with device:
        cuda.release()
        free, total = device.mem_info
        taken = expected_bytes(codewords, layout)
        if max(taken, taken - codewords.bytes + spare) > free - SPARE * total:
            return False
        try:
            with cuda.out_of_memory():
                runs = runs_of(packed, layout, stack.device)
        except QMoEError as error:
            if error.code != "memory":
                raise
            return False
        device.synchronize()  # other streams may still read the codewords
        stack.packed = replace(packed, arrays={}, runs=runs)
        stack.prepared.clear()
        del packed
        cuda.release()
    return True


def _copy(cupy: Any, layout: Layout, matrices: Sequence[Matrix], buffer: Any) -> None:
    """Fill ``buffer`` through two page-locked buffers: one is filled while the other is copied."""
    stream = cupy.cuda.get_current_stream()
    size = min(STAGING, layout.bytes)
    memories = [cupy.cuda.alloc_pinned_memory(size) for _ in range(2)]
    halves = [np.frombuffer(memory, np.uint8, size) for memory in memories]
    copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
    turn = used = 0
    for offset, data in packing.pieces(layout, matrices):
        for start in range(0, data.size, size):
            piece = data[start : start + size]
            if used + piece.size > size:
                copied[turn].record(stream)
                turn, used = 1 - turn, 0
                copied[turn].synchronize()
            halves[turn][used : used + piece.size] = piece
            cupy.cuda.runtime.memcpyAsync(
                *(buffer.data.ptr + offset + start, memories[turn].ptr + used, piece.size),
                *(cupy.cuda.runtime.memcpyHostToDevice, stream.ptr),
            )
            used += piece.size
    stream.synchronize()  # the stack may be used next on another stream, such as torch's
