"""Activations on disk: a layer's hidden states, and what its experts are given.

They are far larger than memory, written once from the first row to the last, and appear under their
name only when they are complete and durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmoe_format.atomic_file import atomic_write
from qmoe_format.errors import QMoEError, os_errors

SUFFIX = ".rows"
_ZEROS = 1 << 16  # rows written at a time


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file that holds a matrix [rows, columns], row by row.

    Methods raise ``QMoEError``: ``not-found`` if it is missing or of another size, and ``io``.
    """

    path: Path
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32

    @contextmanager
    def writing(self) -> Iterator[Callable[[Tensor], None]]:
        """A function that appends rows; the file appears when the block ends without an error."""
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
                    raise self._incomplete()
                yield piece

    def mapped(self) -> Tensor:
        """The matrix as a memory map: what is written into it is written into the file."""
        self.check()
        size = self.rows * self.columns
        flat = torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype)
        return flat.view(self.rows, self.columns)

    def check(self) -> None:
        """Refuse a file that is missing or of another size."""
        bytes_expected = self.rows * self.columns * self.dtype.itemsize
        if not self.path.is_file() or self.path.stat().st_size != bytes_expected:
            raise self._incomplete()

    def _incomplete(self) -> QMoEError:
        return QMoEError(
            "not-found",
            f"{self.path}: is missing or belongs to another model or text",
            "start the conversion again",
        )


def delete_row_files(folder: Path, keep: Sequence[RowFile] = ()) -> None:
    """Delete every row file in ``folder`` but ``keep``, also those begun by a killed process.

    Raises:
        QMoEError: ``io``.
    """
    with os_errors(f"cannot delete files in {folder}"):
        for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob(f".*{SUFFIX}.*.partial")]:
            if path not in [file.path for file in keep]:
                path.unlink(missing_ok=True)


class RoutedTokens:
    """What the experts of one block are given, in the order of batches, sequences and positions.

    Padding is left out. Tensors on disk are memory maps: index them, do not copy them whole.

    Attributes:
        inputs: float32 [tokens, d], what router and experts see; on disk.
        experts: int64 [tokens, k], the experts a token goes to, -1 for none; on disk.
        weights: float32 [tokens, k], the factors of their outputs; on disk.
        counted: bool [tokens], whether a token counts for the quantizer.
    """

    def __init__(
        self, inputs: RowFile, experts: RowFile, weights: RowFile, counted: Tensor, number: int
    ) -> None:
        """The three files hold the attributes of their names; ``number`` counts the experts."""
        self.inputs = inputs.mapped()
        self.experts = experts.mapped()
        self.weights = weights.mapped()
        self.counted = counted
        path = inputs.path.with_name(f"outputs{SUFFIX}")
        self._outputs = RowFile(path, inputs.rows, inputs.columns)
        flat = self.experts.view(-1)
        self._order = flat.argsort(stable=True)
        # Expert e begins in that order, after all -1, at entry e; it ends at entry e + 1.
        self._begin = torch.bincount(flat + 1, minlength=number + 1).cumsum(0)

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go to an expert: int64 [m], ascending; and their weights float32 [m]."""
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
