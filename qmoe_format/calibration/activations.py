"""Activations on disk: a layer's hidden states, what its experts are given, and what they return.

They are far larger than memory, written once, and appear under their name only when they are
complete and durable. Of several ranks, each writes the rows of its own tokens or experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qmoe_format.atomic_file import atomic_write
from qmoe_format.calibration.ranks import ALONE, Ranks
from qmoe_format.calibration.shared_file import Write, shared_write
from qmoe_format.errors import QMoEError, os_errors

SUFFIX = ".rows"
_ZEROS = 1 << 16  # rows written at a time
_SUMS = 1 << 12  # rows added at a time


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
    def writing(self, ranks: Ranks = ALONE, first: int = 0) -> Iterator[Callable[[Tensor], None]]:
        """A function that appends rows; the file appears when the block ends without an error.

        Args:
            ranks: that write it together.
            first: the number of the first row that this one appends.
        """
        if ranks.count == 1:
            with atomic_write(self.path) as file:
                yield lambda rows: file.write(self.bytes_of(rows))
            return
        with self.sharing(ranks) as write:
            offset = first * self.row_bytes

            def append(rows: Tensor) -> None:
                nonlocal offset
                data = self.bytes_of(rows)
                write(offset, data)
                offset += len(data)

            yield append

    @contextmanager
    def sharing(self, ranks: Ranks) -> Iterator[Write]:
        """See ``shared_write``."""
        with shared_write(self.path, self.rows * self.row_bytes, ranks) as write:
            yield write

    def bytes_of(self, rows: Tensor) -> memoryview:
        """Rows as they are in the file."""
        data = rows.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
        return data.numpy().data

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.columns * self.dtype.itemsize

    def read(self, counts: Iterable[int], first: int = 0) -> Iterator[Tensor]:
        """From row ``first``, ``counts[0]`` rows, then ``counts[1]`` rows, and so on: copies."""
        with os_errors(f"cannot read {self.path}"), self.path.open("rb") as file:
            file.seek(first * self.row_bytes)
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
        pairs = len(flat) - int(self._begin[0])
        self._pairs = RowFile(inputs.path.with_name(f"pairs{SUFFIX}"), pairs, inputs.columns)

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go to an expert: int64 [m], ascending; and their weights float32 [m]."""
        begin, end = self._begin[expert].item(), self._begin[expert + 1].item()
        chosen = self._order[int(begin) : int(end)]
        return chosen // self.experts.shape[1], self.weights.view(-1)[chosen]

    @property
    def counts(self) -> list[int]:
        """How many tokens go to each expert."""
        counts: list[int] = self._begin.diff().tolist()
        return counts

    def outputs(self) -> Tensor:
        """New zeros float32 [tokens, d] on disk, for what the experts return."""
        return self._zeros(self._outputs)

    def _zeros(self, file: RowFile) -> Tensor:
        with file.writing() as append:
            for first in range(0, file.rows, _ZEROS):
                append(torch.zeros(min(_ZEROS, file.rows - first), file.columns))
        return file.mapped()

    @contextmanager
    def pairs(self, ranks: Ranks) -> Iterator[PairOutputs]:
        """For what the experts of several ranks return, until it is complete; see ``summed``."""
        with self._pairs.sharing(ranks) as write:
            yield PairOutputs(write, self._begin, self._pairs)

    def summed(self, ranks: Ranks, tokens: slice) -> Tensor:
        """What the experts return for some tokens, summed as if one rank had all experts.

        Returns:
            float32 [tokens, d], on disk, for this rank only.
        """
        path = self._outputs.path.with_name(f"outputs-{ranks.rank:04}{SUFFIX}")
        outputs = self._zeros(replace(self._outputs, path=path, rows=tokens.stop - tokens.start))
        pairs, k = self._pairs.mapped(), self.experts.shape[1]
        places = torch.empty_like(self._order)
        places[self._order] = torch.arange(len(places)) - int(self._begin[0])
        places = places.view(-1, k)[tokens].sort(1).values  # ascending, so the experts are, too
        for first in range(0, len(outputs), _SUMS):
            part = slice(first, first + _SUMS)
            for slot in range(k):
                own = places[part, slot]
                found = (own >= 0).nonzero().flatten()
                outputs[part][found] += pairs[own[found]]
        del pairs
        ranks.gather(None)  # all have read them
        if ranks.leads:
            self._pairs.path.unlink()
        return outputs


class PairOutputs:
    """What experts return, one row for each of their tokens: an expert's rows lie together.

    Rounding depends on the order in which a token's rows are added. They wait here for each other,
    so that it does not depend on which rank has which expert.
    """

    def __init__(self, write: Write, begin: Tensor, file: RowFile) -> None:
        """``begin``: of each expert's rows among all pairs, those without an expert first."""
        self._write = write
        self._begin = begin
        self._file = file

    def put(self, expert: int, first: int, rows: Tensor) -> None:
        """Write an expert's rows for its tokens from number ``first`` on."""
        place = int(self._begin[expert] - self._begin[0]) + first
        self._write(place * self._file.row_bytes, self._file.bytes_of(rows))
