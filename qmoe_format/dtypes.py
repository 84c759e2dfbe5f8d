"""Element types: their names in a file, their sizes, and exact conversion of scales.

NumPy has no bfloat16 or fp8: their elements are kept as bit patterns, in ``uint16`` and ``uint8``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""Read-only uint8 [n]: a stretch of a file."""

# SPEC.md section 3.3. The numpy type holds an element's bits; only BF16 and F8_* are not numbers.
STORAGE: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?",
        "U8": "u1",
        "I8": "i1",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "F8_E8M0": "u1",
        "U16": "<u2",
        "I16": "<i2",
        "F16": "<f2",
        "BF16": "<u2",
        "U32": "<u4",
        "I32": "<i4",
        "F32": "<f4",
        "U64": "<u8",
        "I64": "<i8",
        "F64": "<f8",
    }.items()
}


def to_float32(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Widen stored ``BF16``, ``F16`` or ``F32`` elements to float32, exactly."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Round float32 to ``BF16`` (as uint16 bits), ``F16``, ``F32`` or ``F64``, ties to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(STORAGE[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    # The carry of a NaN's payload could make it infinite; keep it a (quiet) NaN.
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = bits[nan] >> 16 | 0x40
    return rounded.astype(np.uint16)
