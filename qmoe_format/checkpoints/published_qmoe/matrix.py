"""One expert's matrix as QMoE stores it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qmoe_format.checkpoints.published_qmoe.dictionary import entries
from qmoe_format.codec.threads import in_parts
from qmoe_format.errors import QMoEError

DOWNLOAD = "download it again"


@dataclass(frozen=True, slots=True)
class PublishedMatrix:
    """Codewords and scales, of which only the sizes have been checked.

    Attributes:
        where: file and name, for messages.
        codewords: uint16 [n].
        offsets: int32 [rows + 1]: where each row's codewords begin.
        scales: bf16 bits of each row's lower and upper value, uint16 [rows, 2].
        columns: weights in a row.
    """

    where: str
    codewords: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.int32]
    scales: npt.NDArray[np.uint16]
    columns: int

    def levels(self, threads: int = 1) -> npt.NDArray[np.int8]:
        """The level of each weight, -1, 0 or 1: always 0 if the weight is; int8 [rows, columns].

        Raises:
            QMoEError: ``checkpoint`` if offsets and codewords do not make rows of this width.
        """
        from qmoe_format.checkpoints.published_qmoe import kernels

        self._check_offsets()
        levels = np.empty((len(self.scales), self.columns), np.int8)
        arguments = (self.codewords, self.offsets, *entries(), self.scales, levels)
        statuses = in_parts(
            len(levels), threads, lambda first, last: kernels.decode_rows(first, last, *arguments)
        )
        for status in statuses:
            if status != kernels.OK:
                row, reason = divmod(int(status), kernels.REASONS)
                problem = {
                    kernels.TOO_LONG: "hold more than",
                    kernels.TOO_SHORT: "hold fewer than",
                    kernels.PADDING: "hold a non-zero weight after",
                }[reason]
                raise self._wrong(f"the codewords of row {row} {problem} {self.columns} weights")
        return levels

    def _check_offsets(self) -> None:
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if first != 0:
            raise self._wrong(f"row_off begins with {first}, not with 0")
        (falls,) = np.nonzero(self.offsets[1:] < self.offsets[:-1])
        if falls.size:
            raise self._wrong(f"row_off falls after row {falls[0]}")
        if last != self.codewords.size:
            raise self._wrong(
                f"row_off ends with {last}, but there are {self.codewords.size} codewords"
            )

    def _wrong(self, problem: str) -> QMoEError:
        return QMoEError("checkpoint", f"{self.where}: {problem}", DOWNLOAD)
