"""The extent table: where each extent begins, its length and checksum (SPEC.md section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qmoe_format.container import limits
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError

ALIGNMENT = 64  # of extents and of the index
FIRST_EXTENT = 64  # its offset, right after the preamble
_RECORD = np.dtype([("length", "<u8"), ("crc32", "<u4"), ("zero", "<u4")])
RECORD_LENGTH = _RECORD.itemsize


def align(number: int, to: int) -> int:
    """The smallest multiple of ``to`` that is not below ``number``."""
    return -(-number // to) * to


@dataclass(frozen=True, slots=True)
class ExtentTable:
    """Where each extent begins, how long it is and what its CRC-32 is.

    Attributes:
        offsets: int64 [n], bytes.
        lengths: int64 [n], bytes.
        crc32: uint32 [n].
    """

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return self.lengths.size

    @classmethod
    def parse(cls, table: Bytes, index_offset: int) -> ExtentTable:
        """Check the stored table.

        Raises:
            QMoEError: ``padding``, ``limit``, ``malformed``.
        """
        records = table.view(_RECORD)
        if records["zero"].any():  # [F-4]
            raise QMoEError("padding", "the extent table has spare bytes that are not zero")
        stored = records["length"]
        # The exact sum in 32-bit halves: 2^24 lengths of 64 bits wrap around in one integer. [N-2]
        low = int((stored & 0xFFFFFFFF).sum(dtype=np.uint64))
        high = int((stored >> np.uint64(32)).sum(dtype=np.uint64))
        slack = len(stored) * (ALIGNMENT - 1) + FIRST_EXTENT
        if (high << 32) + low + slack > limits.ARITHMETIC:
            _check_exactly(stored.tolist())
        lengths = stored.astype(np.int64)
        ends = np.cumsum((lengths + (ALIGNMENT - 1)) & -ALIGNMENT) + FIRST_EXTENT
        offsets = np.append(np.int64(FIRST_EXTENT), ends)
        if offsets[-1] != index_offset:  # [F-1] [F-5]
            raise _not_contiguous()
        return cls(offsets[:-1], lengths, records["crc32"].astype(np.uint32))

    @staticmethod
    def to_bytes(lengths: npt.NDArray[np.uint64], crc32: npt.NDArray[np.uint32]) -> bytes:
        """The stored table of these extents: ``lengths`` uint64 [n], ``crc32`` uint32 [n]."""
        records = np.zeros(lengths.size, _RECORD)
        records["length"] = lengths
        records["crc32"] = crc32
        return records.tobytes()


def _check_exactly(lengths: list[int]) -> None:
    """The rare case near 2^63: apply [N-2] in Python's integers; too long in any case."""
    end = FIRST_EXTENT
    for length in lengths:
        end = align(end + length, ALIGNMENT)
        limits.check("end of an extent", end, 0, limits.ARITHMETIC)
    raise _not_contiguous()


def _not_contiguous() -> QMoEError:
    return QMoEError("malformed", "the extents do not lead from byte 64 to the index")
