"""The preamble: the first 64 bytes of a file (SPEC.md section 2.1)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from qmoe_format.container import limits
from qmoe_format.container.extent_table import ALIGNMENT, RECORD_LENGTH, align
from qmoe_format.errors import QMoEError

# 0x8F exposes a 7-bit channel, CR LF a conversion of line ends, control-Z stops a listing.
SIGNATURE = b"\x8fQMOE\r\n\x1a"
VERSION = (0, 2)
KNOWN_FEATURES = 0

# signature, major, minor, required, optional, extents, file length, index offset, index length,
# index CRC; then 8 reserved bytes and the preamble's CRC
_PREAMBLE = struct.Struct("<8sHHIIIQQQI8sI")
PREAMBLE_LENGTH = _PREAMBLE.size


@dataclass(frozen=True, slots=True)
class Preamble:
    """The first 64 bytes, except what is the same in every file of this version."""

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
        """The stored form."""
        head = _PREAMBLE.pack(
            SIGNATURE, *self.version, self.required_features, self.optional_features,
            self.extent_count, self.file_length, self.index_offset, self.index_length,
            self.index_crc32, bytes(8), 0,
        )[:-4]  # fmt: skip
        return head + zlib.crc32(head).to_bytes(4, "little")

    @classmethod
    def parse(cls, head: bytes, real_length: int) -> Preamble:
        """Check a stored preamble.

        Args:
            head: the first 64 bytes of the file, or all of a shorter one.
            real_length: bytes of the file.

        Raises:
            QMoEError: ``signature``, ``truncated``, ``checksum``, ``version``, ``feature``,
                ``padding``, ``trailing``, ``limit``, ``malformed``, in the order of section 2.1.
        """
        if head[:8] != SIGNATURE:  # [P-1]
            if SIGNATURE.startswith(head):
                raise QMoEError("truncated", f"the file has only {len(head)} bytes")
            raise QMoEError("signature", "not a .qmoe file (the signature is missing)")
        if len(head) < PREAMBLE_LENGTH:  # [P-2]
            raise QMoEError("truncated", f"the file has only {len(head)} bytes")
        (
            _, major, minor, required, optional, extent_count, file_length,
            index_offset, index_length, index_crc32, reserved, crc32,
        ) = _PREAMBLE.unpack(head)  # fmt: skip
        if zlib.crc32(head[:-4]) != crc32:  # [P-3]
            raise QMoEError("checksum", "the preamble does not match its checksum")
        if (major, minor) != VERSION:  # [P-4]
            ours = ".".join(map(str, VERSION))
            raise QMoEError("version", f"the file has format version {major}.{minor}, not {ours}")
        if required & ~KNOWN_FEATURES:  # [P-5]
            raise QMoEError("feature", f"the file requires unknown features ({required:#x})")
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
                "malformed", f"an index at bytes {index_offset} to {end} does not fit the file"
            )
        return cls(
            extent_count, file_length, index_offset, index_length, index_crc32,
            (major, minor), required, optional,
        )  # fmt: skip
