"""Matrices in a GPU's memory, as they are stored in a file: no dense weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qmoe_format.codec import EncodedMatrix
from qmoe_format.errors import QMoEError
from qmoe_format.gpu import cuda, packing
from qmoe_format.gpu.packing import Layout, Stack

STAGING = 32 << 20  # bytes of page-locked memory; twice that, as one half is filled at a time


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """One matrix of a stack on a GPU: y = W x, W [rows, columns]."""

    stack: DeviceStack
    expert: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.stack.shape[1:]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStack:
    """Encoded matrices of one shape on a GPU. ``stack[e]`` is one of them, without a copy.

    ``device``  number of the GPU
    ``bytes``   that the stack takes there
    """

    device: int
    packed: Stack
    # Scratch arrays of calls that a graph recorded: its launches use them again and again.
    recorded: list[Any] = field(default_factory=list, repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, rows, columns."""
        layout = self.packed.layout
        return layout.experts, layout.rows, layout.columns

    @property
    def bytes(self) -> int:
        """Memory that the stack takes on the GPU."""
        return self.packed.layout.bytes

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
    matrices: EncodedMatrix | Sequence[EncodedMatrix],
    *,
    device: int | None = None,
    stream: Any = None,
) -> DeviceStack:
    """Copy one matrix, or several of one shape and form, to a GPU as they are coded.

    ``device``: its number, CuPy's current one if None. ``stream``: a CuPy stream; the copy is
    asynchronous on it, and whoever uses the stack on another one has to wait for it. If None, the
    copy is done when this returns. The matrices may be dropped then in either case.

    Raises ``QMoEError``: ``dependency``, ``device`` (no CuPy, no GPU), ``memory``, ``argument``
    for no matrix or matrices that do not fit each other, ``limit`` for a segment of more than 2^26
    weights.
    """
    sequence = [matrices] if isinstance(matrices, EncodedMatrix) else list(matrices)
    layout = packing.layout(sequence)
    cupy = cuda.require()
    number = cupy.cuda.Device().id if device is None else device
    cuda.device(number)
    with cupy.cuda.Device(number):
        on = cupy.cuda.get_current_stream() if stream is None else stream
        with on:
            with cuda.device_memory():
                buffer = cupy.zeros(layout.bytes, np.uint8)
            _copy(cupy, layout, sequence, buffer, on)
        if stream is None:  # no one knows on which stream the stack will be used first
            on.synchronize()
    return DeviceStack(number, Stack(layout, layout.arrays(buffer)))


# Events, and page-locked memory that is being copied until then.
_in_flight: list[tuple[Any, Any]] = []
_in_flight_lock = threading.Lock()


def _copy(
    cupy: Any, layout: Layout, matrices: Sequence[EncodedMatrix], buffer: Any, stream: Any
) -> None:
    """Fill ``buffer``, by way of two halves of page-locked memory in turn."""
    with _in_flight_lock:
        _in_flight[:] = [(event, memory) for event, memory in _in_flight if not event.done]
    size = min(STAGING, layout.bytes)
    halves = []
    for _ in range(2):
        memory = cupy.cuda.alloc_pinned_memory(size)
        halves.append((memory, np.frombuffer(memory, np.uint8, size)))
    events = [cupy.cuda.Event(disable_timing=True) for _ in halves]
    turn = used = 0
    for offset, data in packing.parts(layout, matrices):
        for start in range(0, data.size, size):
            piece = data[start : start + size]
            if used + piece.size > size:
                events[turn].record(stream)
                turn, used = 1 - turn, 0
                events[turn].synchronize()
            memory, half = halves[turn]
            half[used : used + piece.size] = piece
            cupy.cuda.runtime.memcpyAsync(
                *(buffer.data.ptr + offset + start, memory.ptr + used, piece.size),
                *(cupy.cuda.runtime.memcpyHostToDevice, stream.ptr),
            )
            used += piece.size
    events[turn].record(stream)
    with _in_flight_lock:
        _in_flight.append((events[turn], halves))


def matrix_of(weights: DeviceStack | DeviceMatrix) -> DeviceMatrix:
    """The matrix that ``weights`` is. Raises ``QMoEError``: ``argument`` for a stack of several."""
    if isinstance(weights, DeviceMatrix):
        return weights
    if len(weights) != 1:
        raise QMoEError(
            "argument",
            f"this is a stack of {len(weights)} matrices: choose one, stack[e], or call "
            "expert_matvec",
        )
    return weights[0]
