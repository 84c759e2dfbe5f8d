"""The experts of one stack in an open file, compressed until they are multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmoe_format.container.encodings import TERNARY_DICT
from qmoe_format.errors import QMoEError
from qmoe_format.machine import cores

if TYPE_CHECKING:
    from qmoe_format.codec import EncodedMatrix
    from qmoe_format.container.reader import QMoEFile
    from qmoe_format.container.shards import ShardedFile
    from qmoe_format.gpu import DeviceStack


class Stack:
    """The experts of stack ``name`` of ``file``, which stays open while the stack is used.

    ``shape``    experts, rows (out), columns (in)
    ``bytes``    what the experts take in the file
    ``threads``  that a product on the CPU uses; every core if None

    Raises ``QMoEError``: ``not-found`` if there is no such tensor, ``argument`` if it is not a
    stack of ``ternary-dict`` matrices.
    """

    def __init__(self, file: QMoEFile | ShardedFile, name: str, threads: int | None = None) -> None:
        entry = file.tensors.get(name)
        if entry is None:
            raise QMoEError("not-found", f"{file.path} has no stack {name!r}: look at .tensors")
        if not entry.stack or entry.encoding != TERNARY_DICT.name or len(entry.shape) != 3:
            raise QMoEError(
                "argument",
                f"{name!r} in {file.path} is no stack of {TERNARY_DICT.name} matrices but "
                f"{entry.encoding} of shape {list(entry.shape)}: read it with file.read",
            )
        self.name = name
        self.shape: tuple[int, int, int] = (entry.shape[0], entry.shape[1], entry.shape[2])
        self.bytes = entry.stored_bytes
        self.threads = threads or cores()
        self._file = file
        self._matrices: dict[int, EncodedMatrix] = {}
        self._on_gpu: dict[int, DeviceStack] = {}

    def __repr__(self) -> str:
        return f"<Stack {self.name}: {list(self.shape)}, {self.bytes} bytes>"

    def matrix(self, expert: int) -> EncodedMatrix:
        """Expert ``expert`` as stored, views of the file; checked when it is first asked for.

        Raises ``QMoEError``: ``not-found`` if there is no such expert, or what is wrong with it.
        """
        matrix = self._matrices.get(expert)
        if matrix is None:
            matrix = self._matrices[expert] = self._file.encoded(self.name, expert)
        return matrix

    def upload(self, device: int = 0) -> DeviceStack:
        """All experts in the memory of GPU ``device``, where they stay.

        Raises ``QMoEError``: ``dependency`` without CuPy, ``device``, ``memory``.
        """
        stack = self._on_gpu.get(device)
        if stack is None:
            from qmoe_format import gpu

            every = [self._file.encoded(self.name, expert) for expert in range(self.shape[0])]
            stack = self._on_gpu[device] = gpu.upload(every, device=device)
        return stack
