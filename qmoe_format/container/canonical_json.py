"""The one canonical form of JSON that a file may contain (SPEC.md section 3, [J-1] to [J-3]).

A hostile text must not cost more than its length: nesting is measured before Python's parser, which
recurses, sees the text, and long integers are refused before they are converted.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import numpy as np

from qmoe_format.container import limits
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError

_FORBIDDEN = re.compile(rb"[^\x20-\x5b\x5d-\x7e]")
_CHUNK = 1 << 20
_DEPTH = np.zeros(256, np.int8)
_DEPTH[list(b"[{")] = 1
_DEPTH[list(b"]}")] = -1


def dumps(value: object) -> bytes:
    """The canonical text of ``value``: objects, arrays, strings, booleans, integers.

    Raises:
        QMoEError: ``argument`` for a string with a character outside [J-1].
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if _FORBIDDEN.search(text):
        raise QMoEError(
            "argument",
            "a string contains a quote, a backslash or a character that is not printable ASCII",
            "use other characters",
        )
    return text


def loads(text: Bytes) -> Any:
    """Parse a canonical text.

    Raises:
        QMoEError: ``malformed``, ``limit``.
    """
    _check_nesting(text)
    data = text.tobytes()
    if found := _FORBIDDEN.search(data):  # [J-1]
        raise QMoEError("malformed", f"byte {found.start()} of the JSON text is not allowed")
    try:
        value = json.loads(
            data.decode("ascii"),
            parse_int=_integer,
            parse_float=_no_float,
            parse_constant=_no_constant,
        )
        canonical = dumps(value) == data
    except QMoEError:
        raise
    except (ValueError, RecursionError) as error:
        raise QMoEError("malformed", f"the text is not JSON ({error})") from error
    if not canonical:  # [J-1] [J-2] [J-3]
        raise QMoEError(
            "malformed", "the JSON text is not canonical (order of keys, spaces, numbers)"
        )
    return value


def _check_nesting(text: Bytes) -> None:
    """Count brackets outside strings, where quotes cannot be escaped ([J-1])."""
    depth = 0
    inside = False
    for start in range(0, text.size, _CHUNK):
        part = text[start : start + _CHUNK]
        in_string = np.logical_xor.accumulate(part == ord('"')) ^ inside
        depths = np.cumsum(np.where(in_string, 0, _DEPTH[part]), dtype=np.int64) + depth
        if depths.max() > limits.NESTING:
            raise QMoEError("limit", f"the JSON text is nested more than {limits.NESTING} deep")
        depth = int(depths[-1])
        inside = bool(in_string[-1])


def _integer(digits: str) -> int:
    if len(digits) > 16 or not 0 <= (number := int(digits)) <= limits.INTEGER:  # [J-2]
        raise QMoEError("malformed", f"the number {digits[:20]} is not from 0 to 2^53 - 1")
    return number


def _no_float(text: str) -> NoReturn:
    raise QMoEError("malformed", f"the number {text[:20]} is not an integer")  # [J-2]


def _no_constant(text: str) -> NoReturn:
    raise QMoEError("malformed", f"{text} is not an allowed value")  # [J-2]
