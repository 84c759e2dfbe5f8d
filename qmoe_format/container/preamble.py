"""The fixed parts of a file: preamble, extent table, alignment (SPEC.md section 2).

Bytes to dataclasses and back; nothing here opens a file.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qmoe_format.container import limits
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError

# 0x8F exposes a 7-bit channel, CR LF a change of line ends, control-Z stops a listing.
SIGNATURE = b"\x8fQMOE\r\n\x1a"
VERSION = (0, 1)
KNOWN_FEATURES = 0
ALIGNMENT = 64  # of extents and of the index
PREAMBLE_LENGTH = 64
RECORD_LENGTH = 16

# signature, major, minor, required, optional, extents, file length, index offset, index length,
# index CRC; then 8 reserved bytes and the preamble's CRC
_PREAMBLE = struct.Struct("<8sHHIIIQQQI8sI")
_RECORD = np.dtype([("length", "<u8"), ("crc32", "<u4"), ("zero", "<u4")])
assert _PREAMBLE.size == PREAMBLE_LENGTH
assert _RECORD.itemsize == RECORD_LENGTH


def align(number: int, to: int) -> int:
    """The smallest multiple of ``to`` that is not below ``number``."""
    return -(-number // to) * to


@dataclass(frozen=True, slots=True)
class Preamble:
    """The first 64 bytes, without what is the same in every file of this version."""

    extent_count: int
    file_length: int
    index_offset: int
    index_length: int
    index_crc32: int
    version: tuple[int, int] = VERSION
    required_features: int = 0
    optional_features: int = 0

    @property
    def table_offset(self) -> int:
        """Where the extent table begins."""
        return self.index_offset + align(self.index_length, 8)

    def to_bytes(self) -> bytes:
        """The 64 bytes."""
        head = _PREAMBLE.pack(
            SIGNATURE,
            *self.version,
            self.required_features,
            self.optional_features,
            self.extent_count,
            self.file_length,
            self.index_offset,
            self.index_length,
            self.index_crc32,
            bytes(8),
            0,
        )[:-4]
        return head + zlib.crc32(head).to_bytes(4, "little")

    @classmethod
    def parse(cls, head: bytes, real_length: int) -> Preamble:
        """Check the first 64 bytes (fewer if there are not so many) of a file of this length.

        Raises ``QMoEError``: ``signature``, ``truncated``, ``checksum``, ``version``, ``feature``,
        ``padding``, ``trailing``, ``limit``, ``malformed``, in the order of section 2.1.
        """
        if head[:8] != SIGNATURE:  # [P-1]
            if SIGNATURE.startswith(head):
                raise QMoEError("truncated", f"the file has only {len(head)} bytes")
            raise QMoEError("signature", "this is not a .qmoe file: the signature is missing")
        if len(head) < PREAMBLE_LENGTH:  # [P-2]
            raise QMoEError("truncated", f"the file has only {len(head)} bytes")
        (
            _, major, minor, required, optional, extent_count, file_length,
            index_offset, index_length, index_crc32, reserved, crc32,
        ) = _PREAMBLE.unpack(head)  # fmt: skip
        if zlib.crc32(head[:-4]) != crc32:  # [P-3]
            raise QMoEError("checksum", "the preamble does not have its checksum")
        if (major, minor) != VERSION:  # [P-4]
            ours = ".".join(map(str, VERSION))
            raise QMoEError("version", f"the file is of version {major}.{minor}, not {ours}")
        if required & ~KNOWN_FEATURES:  # [P-5]
            raise QMoEError("feature", f"the file needs the unknown features {required:#x}")
        if any(reserved):  # [P-6]
            raise QMoEError("padding", "reserved bytes of the preamble are not zero")
        if real_length != file_length:  # [P-7]
            raise QMoEError(
                "truncated" if real_length < file_length else "trailing",
                f"the file has {real_length} bytes, its preamble says {file_length}",
            )
        limits.check("file_length", file_length, PREAMBLE_LENGTH, limits.INTEGER)
        limits.check("index_length", index_length, *limits.INDEX_LENGTH)  # [P-8]
        limits.check("extent_count", extent_count, 0, limits.EXTENTS)
        end = index_offset + align(index_length, 8) + RECORD_LENGTH * extent_count
        limits.check("end of the index", end, 0, limits.ARITHMETIC)  # [N-2]
        if index_offset % ALIGNMENT or index_offset < PREAMBLE_LENGTH or end != file_length:
            raise QMoEError(
                "malformed", f"an index from byte {index_offset} to {end} does not fit the file"
            )
        return cls(
            extent_count, file_length, index_offset, index_length, index_crc32,
            (major, minor), required, optional,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExtentTable:
    """Where each extent begins, how long it is and what its CRC-32 is.

    ``offsets`` int64 [n], ``lengths`` int64 [n], ``crc32`` uint32 [n].
    """

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return self.lengths.size

    @classmethod
    def parse(cls, table: Bytes, index_offset: int) -> ExtentTable:
        """Check the table's bytes; raise ``QMoEError``: ``padding``, ``limit``, ``malformed``."""
        records = table.view(_RECORD)
        if records["zero"].any():  # [F-7]
            raise QMoEError("padding", "the extent table has spare bytes that are not zero")
        stored = records["length"]
        # The exact sum in 32-bit halves: 2^24 lengths of 64 bits wrap around in one integer. [N-2]
        low = int((stored & 0xFFFFFFFF).sum(dtype=np.uint64))
        high = int((stored >> np.uint64(32)).sum(dtype=np.uint64))
        slack = len(stored) * (ALIGNMENT - 1) + PREAMBLE_LENGTH
        if (high << 32) + low + slack > limits.ARITHMETIC:
            _exact_end(stored.tolist())
        lengths = stored.astype(np.int64)
        ends = np.cumsum((lengths + (ALIGNMENT - 1)) & -ALIGNMENT) + PREAMBLE_LENGTH
        if (int(ends[-1]) if len(ends) else PREAMBLE_LENGTH) != index_offset:  # [F-1] [F-4]
            raise QMoEError("malformed", "the extents do not lead from byte 64 to the index")
        offsets = np.empty_like(ends)
        offsets[:1] = PREAMBLE_LENGTH
        offsets[1:] = ends[:-1]
        return cls(offsets, lengths, records["crc32"].astype(np.uint32))

    @staticmethod
    def to_bytes(lengths: npt.NDArray[np.uint64], crc32: npt.NDArray[np.uint32]) -> bytes:
        """The table of these extents: ``lengths`` uint64 [n], ``crc32`` uint32 [n]."""
        records = np.zeros(lengths.size, _RECORD)
        records["length"] = lengths
        records["crc32"] = crc32
        return records.tobytes()


def _exact_end(lengths: list[int]) -> None:
    """The rare case near 2^63: the rule of [N-2] in whole numbers, then too long in any case."""
    end = PREAMBLE_LENGTH
    for length in lengths:
        end = align(end + length, ALIGNMENT)
        limits.check("end of an extent", end, 0, limits.ARITHMETIC)
    raise QMoEError("malformed", "the extents do not lead from byte 64 to the index")  # [F-4]
