"""Rows of numbers on disk: a layer's hidden states, and what its experts are given.

They are far larger than memory, written once from the first row to the last, and appear under their
name only when they are whole and durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qmoe_format.atomic_file import atomic_write
from qmoe_format.errors import QMoEError, os_errors

SUFFIX = ".rows"
_ZEROS = 1 << 16  # rows written at a time


class Rows:
    """A file of ``rows`` × ``columns`` numbers. All methods raise ``QMoEError("io")``."""

    def __init__(
        self, path: Path, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.path = path
        self.rows = rows
        self.columns = columns
        self.dtype = dtype

    @contextmanager
    def writing(self) -> Iterator[Callable[[Tensor], None]]:
        """Gives a function that appends rows; the file is there when the block has ended well."""
        with atomic_write(self.path) as file:

            def append(rows: Tensor) -> None:
                data = rows.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
                file.write(data.numpy().data)

            yield append

    def read(self, counts: Iterable[int]) -> Iterator[Tensor]:
        """The first ``counts[0]`` rows, the next ``counts[1]`` rows, and so on, each a copy."""
        with os_errors(f"cannot read {self.path}"), self.path.open("rb") as file:
            for count in counts:
                piece = torch.empty(count, self.columns, dtype=self.dtype)
                data = piece.view(-1).view(torch.uint8).numpy().data
                if file.readinto(data) != len(data):
                    raise _not_whole(self.path)
                yield piece

    def mapped(self) -> Tensor:
        """[rows, columns]; what is written into it is written into the file."""
        self.check()
        size = self.rows * self.columns
        flat = torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype)
        return flat.view(self.rows, self.columns)

    def check(self) -> None:
        """``not-found`` unless the file is there, with as many bytes as it should have."""
        bytes_expected = self.rows * self.columns * self.dtype.itemsize
        if not self.path.is_file() or self.path.stat().st_size != bytes_expected:
            raise _not_whole(self.path)


def _not_whole(path: Path) -> QMoEError:
    return QMoEError(
        "not-found",
        f"{path}: is missing or is of another model or text; begin the conversion again",
    )


def sweep(folder: Path, keep: Sequence[Rows] = ()) -> None:
    """Delete every file of rows in ``folder`` but ``keep``, also those begun by a killed process.

    Raises ``QMoEError("io")``.
    """
    with os_errors(f"cannot delete files in {folder}"):
        for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob(f".*{SUFFIX}.*.partial")]:
            if path not in [rows.path for rows in keep]:
                path.unlink(missing_ok=True)


class Routed:
    """What the experts of one block are given, in the order of batches, sequences and positions.

    Padding is left out. Tensors on disk are memory maps: index them, do not copy them whole.

    Attributes:
        inputs: float32 [tokens, d], what router and experts see; on disk.
        experts: int64 [tokens, k], the experts a token goes to, -1 for none; on disk.
        weights: float32 [tokens, k], the factors of their outputs; on disk.
        counted: bool [tokens], whether a token counts for the quantizer.
    """

    def __init__(
        self, inputs: Rows, experts: Rows, weights: Rows, counted: Tensor, number: int
    ) -> None:
        self.inputs = inputs.mapped()
        self.experts = experts.mapped()
        self.weights = weights.mapped()
        self.counted = counted
        self._outputs = Rows(inputs.path.with_name(f"outputs{SUFFIX}"), inputs.rows, inputs.columns)
        flat = self.experts.view(-1)
        self._order = flat.argsort(stable=True)
        # Entry e is where expert e begins in that order, after the -1; entry e + 1 where it ends.
        self._begin = torch.bincount(flat + 1, minlength=number + 1).cumsum(0)

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go to an expert: int64 [m] in ascending order; float32 [m] weights."""
        begin, end = self._begin[expert].item(), self._begin[expert + 1].item()
        chosen = self._order[int(begin) : int(end)]
        return chosen // self.experts.shape[1], self.weights.view(-1)[chosen]

    def outputs(self) -> Tensor:
        """New zeros float32 [tokens, d] on disk, for what the experts return."""
        with self._outputs.writing() as append:
            for first in range(0, self._outputs.rows, _ZEROS):
                count = min(_ZEROS, self._outputs.rows - first)
                append(torch.zeros(count, self._outputs.columns))
        return self._outputs.mapped()
