"""The table of limits (SPEC.md section 10)."""

from __future__ import annotations

from qmoe_format.codec.dictionary import MAX_LENGTH, MAX_ONES, MAX_WIDTH, MIN_WIDTH
from qmoe_format.errors import QMoEError

INTEGER = 2**53 - 1  # any integer of the index ([J-2]); length of a file; bytes of a tensor
ARITHMETIC = 2**63 - 1  # [N-2]
INDEX_LENGTH = (2, 2**28)
EXTENTS = 2**24
TREE_BYTES = (1, 2**14)  # of a dictionary: 2^17 - 1 nodes
ENTRIES = 2**20  # tensors, attachments, dictionaries, shards: each
NESTING = 8
DIMENSIONS = 8
DIMENSION = 2**40
MATRIX_SIDE = 2**31 - 1
SEGMENT_BYTES = 2**32 - 1
WIDTH = (MIN_WIDTH, MAX_WIDTH)
ENTRY_LENGTH = (1, MAX_LENGTH)
ENTRY_ONES = MAX_ONES
ROWS_PER_SEGMENT = (1, 2**31 - 1)
ZSTD_WINDOW = 2**27
NAME = 512  # [J-6]; a longer name is malformed, not beyond a limit
FILE_NAME = 255  # [J-6]; likewise


def zstd_content(frame: int) -> int:
    """The most content, in bytes, of a Zstandard frame of ``frame`` bytes ([Z-3])."""
    return 1024 * frame + 2**20


def check(what: str, value: int, least: int, most: int) -> None:
    """Refuse a value outside ``least`` to ``most``. [L-1]

    Raises:
        QMoEError: ``limit``.
    """
    if not least <= value <= most:
        raise QMoEError("limit", f"{what} is {value}, not from {least} to {most}")
