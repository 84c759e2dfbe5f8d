"""The experts of one stack in an open file, compressed until they are multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmoe_format.container.encodings import encoding_of
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec import Matrix
    from qmoe_format.container import QMoEFile
    from qmoe_format.gpu import DeviceStack
    from qmoe_format.runtime.expert_cache import CachedLayer
    from qmoe_format.runtime.hot_experts import HotExperts


class LazyStack:
    """Stack ``name`` of ``file``, which stays open while the stack is used.

    Attributes:
        file: the file.
        shape: experts, rows (out), columns (in).
        cached: where the matrices come from, if memory for them is limited.
        hot: what keeps packed matrices for products on a CPU, of activations rounded to 8 bits;
            None: products are exact, of matrices as they are stored.

    Raises:
        QMoEError: ``not-found`` if there is no such tensor; ``argument`` if it is not a stack of
            matrices that can be multiplied as they are stored. Methods: the codes of reading, and
            on a GPU ``dependency``, ``device`` and ``memory``.
    """

    def __init__(self, file: QMoEFile, name: str) -> None:
        entry = file.tensors.get(name)
        if entry is None:
            problem = f"{file.path}: there is no stack {name!r}"
            raise QMoEError("not-found", problem, "convert the checkpoint again")
        multipliable = encoding_of(entry.encoding).multipliable
        if not (entry.stack and multipliable and len(entry.shape) == 3):
            raise QMoEError(
                "argument",
                f"{file.path}: {name!r} ({entry.encoding}, {list(entry.shape)}) is not a stack of "
                "matrices that can be multiplied as they are stored",
                "unpack the file and load the folder",
            )
        self.name = name
        self.shape: tuple[int, int, int] = (entry.shape[0], entry.shape[1], entry.shape[2])
        self.file = file
        self.cached: CachedLayer | None = None
        self.hot: HotExperts | None = None
        self._matrices: dict[int, Matrix] = {}
        self._uploaded: dict[int, DeviceStack] = {}

    def __repr__(self) -> str:
        return f"<LazyStack {self.name}: {list(self.shape)}>"

    def matrix(self, expert: int) -> Matrix:
        """One expert, as views of the file or from the cache; checked when first asked for."""
        if self.cached:
            return self.cached.matrix(self.name, expert)
        matrix = self._matrices.get(expert)
        if matrix is None:
            matrix = self._matrices[expert] = self.file.encoded(self.name, expert)
        return matrix

    def upload(self, device: int = 0, *, runs: bool = True) -> DeviceStack:
        """All experts in the memory of GPU number ``device``, where they stay.

        Args:
            runs: make products fast if memory for the file's other stacks is left then. Without
                effect on a stack that is there.
        """
        stack = self._uploaded.get(device)
        if stack is None:
            from qmoe_format import gpu

            matrices = [self.file.encoded(self.name, expert) for expert in range(self.shape[0])]
            stack = gpu.upload(matrices, device=device, runs=False)
            if runs:
                entries = (entry for name, entry in self.file.tensors.items() if name != self.name)
                gpu.add_runs(stack, spare=sum(each.stored_bytes for each in entries if each.stack))
            self._uploaded[device] = stack
        return stack

    def add_runs(self, device: int = 0) -> None:
        """See ``gpu.add_runs``."""
        from qmoe_format import gpu

        gpu.add_runs(self.upload(device, runs=False))
