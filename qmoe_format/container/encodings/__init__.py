"""The registry of encodings (SPEC.md sections 4, 5, 7 and 8).

An encoding is one class in one module: it turns what one extent holds (a tensor, or one expert of a
stack) into bytes and back. To add one, write the class and list it in ``ENCODINGS``.
"""

from __future__ import annotations

from qmoe_format.container.encodings.base import Encoding, GetDictionary, Payload, Sink
from qmoe_format.container.encodings.int_dict import IntDict
from qmoe_format.container.encodings.int_group import IntGroup
from qmoe_format.container.encodings.raw import Raw
from qmoe_format.container.encodings.zstd import Zstd
from qmoe_format.errors import QMoEError

RAW = Raw()
ZSTD = Zstd()
INT_DICT = IntDict()
INT_GROUP = IntGroup()
ENCODINGS: dict[str, Encoding] = {each.name: each for each in (RAW, ZSTD, INT_DICT, INT_GROUP)}

__all__ = [
    "ENCODINGS",
    "INT_DICT",
    "INT_GROUP",
    "RAW",
    "ZSTD",
    "Encoding",
    "GetDictionary",
    "Payload",
    "Sink",
    "encoding_of",
]


def encoding_of(name: str) -> Encoding:
    """The encoding of this name. [T-5]

    Raises:
        QMoEError: ``unsupported`` if it is unknown.
    """
    try:
        return ENCODINGS[name]
    except KeyError:
        raise QMoEError("unsupported", f"encoding {name!r} is unknown") from None
