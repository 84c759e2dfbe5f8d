"""The Numba kernel that decodes QMoE's codewords."""

from __future__ import annotations

from typing import Any

from qmoe_format.codec.kernels.jit import kernel

OK = -1
REASONS = 3
TOO_LONG, TOO_SHORT, PADDING = range(REASONS)


@kernel
def decode_rows(
    first: Any, last: Any, codewords: Any, offsets: Any, entries: Any, pairs: Any, scales: Any,
    out: Any,
) -> Any:  # fmt: skip
    """Decode rows ``first`` to ``last``. A level whose value is 0 becomes 0.

    Args:
        codewords: uint16 [n].
        offsets: int32 [rows + 1], ascending from 0 to n.
        entries, pairs: of the dictionary, int8 [65536, 28] and uint8 [65536].
        scales: bf16 bits of each row's lower and upper value, uint16 [rows, 2].
        out: int8 [rows, columns].

    Returns:
        ``OK`` or ``row * REASONS + reason``.
    """
    columns = out.shape[1]
    needed = (columns + 1) // 2
    for row in range(first, last):
        levels = out[row]
        done = 0
        for i in range(offsets[row], offsets[row + 1]):
            code = codewords[i]
            entry, column = entries[code], 2 * done
            done += pairs[code]
            if done > needed:
                return row * REASONS + TOO_LONG
            end = min(2 * done, columns)
            for j in range(end - column):
                levels[column + j] = entry[j]
            if end < 2 * done and entry[end - column] != 0:  # half a pair, beyond an odd width
                return row * REASONS + PADDING
        if done < needed:
            return row * REASONS + TOO_SHORT
        for level, scale in ((-1, scales[row, 0]), (1, scales[row, 1])):
            if scale & 0x7FFF == 0:  # such as the minimum of a row without negative weights
                for column in range(columns):
                    if levels[column] == level:
                        levels[column] = 0
    return OK
