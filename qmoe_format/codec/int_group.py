"""A matrix of small integers in groups of columns (SPEC.md section 8): packed, and its products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.arrays import check_array, output
from qmoe_format.codec.threads import in_parts
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.codec.segments import Call

BITS = (2, 3, 4, 8)
GRIDS = ("linear", "log")
GROUP_SIZES = (0, 32, 64, 128)  # columns; 0: a row
_LANES = 8  # codes of at most 4 bits that a word of 32 bits holds
_TOKENS = 4  # of ``dot_four``


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """Unsigned integers u of ``bits`` bits, packed, and what makes weights of them.

    A weight is (u - z) x scale, z being ``2 ** (bits - 1)`` without zero points ([G-6]); on the
    grid ``log`` it is the scale over a power of two ([G-7]).

    Attributes:
        columns: C.
        bits: of ``BITS``.
        grid: of ``GRIDS``.
        group_size: of ``GROUP_SIZES``: columns that share a scale; 0 for the whole row.
        scales: bf16 bit patterns, uint16 [rows, groups], contiguous.
        zero_points: z, uint8 [rows, groups], contiguous, below ``2 ** bits``; or None.
        packed: uint8 [rows, ``row_bytes``], contiguous; bits after the last weight of a row are 0.

    Raises:
        QMoEError: ``argument`` if these do not fit each other; ``value`` if a scale is not finite.
    """

    columns: int
    bits: int
    grid: str
    group_size: int
    scales: npt.NDArray[np.uint16]
    zero_points: npt.NDArray[np.uint8] | None
    packed: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        _choose("bits", self.bits, BITS)
        _choose("grid", self.grid, GRIDS)
        _choose("group_size", self.group_size, GROUP_SIZES)
        shape = (self.rows, groups_of(self.columns, self.group_size))
        check_array("scales (BF16)", self.scales, np.uint16, shape, contiguous=True)
        shape_of_rows = (self.rows, row_bytes(self.columns, self.bits))
        check_array("packed", self.packed, np.uint8, shape_of_rows, contiguous=True)
        if self.zero_points is not None:
            check_array("zero_points", self.zero_points, np.uint8, shape, contiguous=True)
            if self.grid == "log":
                raise QMoEError("argument", "the grid log has no zero points", "pass None")
            check_range("a zero point", self.zero_points, self.bits)
        if (self.scales & 0x7F80 == 0x7F80).any():  # [G-5] [W-3]
            raise QMoEError("value", "a scale is infinite or NaN")

    @property
    def rows(self) -> int:
        """R."""
        return len(self.packed)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns


def _choose(name: str, value: int | str, known: tuple[int | str, ...]) -> None:
    if value not in known:
        advice = f"choose one of {', '.join(map(str, known))}"
        raise QMoEError("argument", f"{name} is {value!r}", advice)


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return -(-columns * bits // 128) * 16


def groups_of(columns: int, group_size: int) -> int:
    """G, the groups of a row. [G-2]"""
    return -(-columns // group_size) if group_size else 1


def check_range(what: str, values: npt.NDArray[np.uint8], bits: int) -> None:
    """Refuse integers that ``bits`` bits cannot hold: ``argument``."""
    if bits < 8 and values.size and (largest := int(values.max())) >> bits:
        raise QMoEError("argument", f"{what} is {largest}, beyond {bits} bits")


def pack_groups(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint16],
    bits: int,
    *,
    grid: str = "linear",
    group_size: int = 0,
    zero_points: npt.NDArray[np.uint8] | None = None,
) -> GroupedMatrix:
    """Pack integers and attach their scales.

    Args:
        codes: u, uint8 [rows, columns].
        scales, bits, grid, group_size, zero_points: as in ``GroupedMatrix``.

    Raises:
        QMoEError: as ``GroupedMatrix``; ``argument`` for a code that ``bits`` bits cannot hold.

    Example:
        >>> from qmoe_format.codec import dequantize
        >>> codes = np.array([[0, 1, 2, 3]], np.uint8)
        >>> dequantize(pack_groups(codes, np.array([[0x3F00]], np.uint16), 2))
        array([[-1. , -0.5,  0. ,  0.5]], dtype=float32)
    """
    check_array("codes", codes, np.uint8, (None, None))
    rows, columns = codes.shape
    _choose("bits", bits, BITS)
    check_range("a code", codes, bits)
    packed = np.zeros((rows, row_bytes(columns, bits)), np.uint8)
    if bits == 8:
        packed[:, :columns] = codes
    else:
        words = np.zeros((rows, -(-columns // _LANES)), np.uint32)
        for lane in range(_LANES):
            part = codes[:, lane::_LANES]
            words[:, : part.shape[1]] |= part.astype(np.uint32) << np.uint32(bits * lane)
        for byte in range(bits):
            part = packed[:, byte : bits * words.shape[1] : bits]
            part[:] = words[:, : part.shape[1]] >> np.uint32(8 * byte)
    return GroupedMatrix(columns, bits, grid, group_size, scales, zero_points, packed)


def unpack_groups(matrix: GroupedMatrix) -> npt.NDArray[np.uint8]:
    """The codes u of a matrix, uint8 [rows, columns]."""
    rows, columns = matrix.shape
    bits, packed = matrix.bits, matrix.packed
    if bits == 8:
        return packed[:, :columns].copy()
    words = np.zeros((rows, -(-columns // _LANES)), np.uint32)
    for byte in range(bits):
        part = packed[:, byte : bits * words.shape[1] : bits]
        words[:, : part.shape[1]] |= part.astype(np.uint32) << np.uint32(8 * byte)
    codes = np.empty((rows, columns), np.uint8)
    for lane in range(_LANES):
        part = codes[:, lane::_LANES]
        part[:] = (words[:, : part.shape[1]] >> np.uint32(bits * lane)) & np.uint32((1 << bits) - 1)
    return codes


def dequantize_rows(
    matrix: GroupedMatrix, first: int, out: npt.NDArray[np.float32], threads: int = 1
) -> None:
    """``codec.dequantize_rows`` of a grouped matrix, with checked arguments."""
    from qmoe_format.codec.kernels.int_group import weights_of_rows

    grouped = _grouped(matrix)

    def work(start: int, stop: int) -> None:
        weights_of_rows(first + start, first + stop, grouped, first, out)

    if out.size:  # there may be 2^31 rows of nothing
        in_parts(len(out), threads, work)


def matvec_call(
    matrix: GroupedMatrix, x: npt.NDArray[np.float32], out: npt.NDArray[np.float32]
) -> Call:
    """``codec.multiply.matvec_call`` of a grouped matrix."""
    from qmoe_format.codec.kernels.int_group import dot_token

    check_array("x", x, np.float32, (matrix.columns,))
    check_array("out", out, np.float32, (matrix.rows,))
    return dot_token, 0, matrix.rows, (_grouped(matrix), np.ascontiguousarray(x), out)


def matmul(
    matrix: GroupedMatrix,
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> npt.NDArray[np.float32]:
    """``codec.matmul`` of a grouped matrix: every vector of weights is decoded for four tokens."""
    from qmoe_format.codec.kernels.int_group import dot_four

    check_array("x", x, np.float32, (None, matrix.columns))
    tokens = len(x)
    out = output(out, np.float32, (tokens, matrix.rows), contiguous=False)
    four = np.zeros((_TOKENS, matrix.columns), np.float32)
    products = np.empty((_TOKENS, matrix.rows), np.float32)
    grouped = _grouped(matrix)
    for start in range(0, tokens, _TOKENS):
        part = slice(start, min(start + _TOKENS, tokens))
        count = part.stop - start
        four[:count] = x[part]
        in_parts(matrix.rows, threads, lambda a, b: dot_four(a, b, grouped, four, products))
        out[part] = products[:count]
    return out


_NO_ZERO_POINTS = np.empty((0, 0), np.uint8)


def _grouped(matrix: GroupedMatrix) -> tuple[Any, ...]:
    """What ``kernels.int_group`` calls so."""
    zero_points = _NO_ZERO_POINTS if matrix.zero_points is None else matrix.zero_points
    size = np.uint64(matrix.group_size or max(matrix.columns, 1))
    bits, log, columns = np.uint64(matrix.bits), matrix.grid == "log", np.uint64(matrix.columns)
    return matrix.packed, matrix.scales, zero_points, bits, log, columns, size
