"""The index: canonical JSON to entries, with every check of SPEC.md section 3, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qmoe_format.codec.dictionary import SIGN_MODES
from qmoe_format.container import canonical_json, limits
from qmoe_format.container.encodings import ENCODINGS
from qmoe_format.container.entries import (
    NO_PARAMETERS,
    AttachmentEntry,
    DictionaryEntry,
    Item,
    TensorEntry,
)
from qmoe_format.dtypes import STORAGE, Bytes
from qmoe_format.errors import QMoEError

_TOP = {"attachments": list, "dictionaries": list, "generator": str, "tensors": list}
_ATTACHMENT = {"bytes": int, "encoding": str, "extent": int, "name": str}
_DICTIONARY = {
    "bytes": int,
    "encoding": str,
    "extent": int,
    "max_length": int,
    "max_nonzeros": int,
    "signs": str,
    "width": int,
}
_TENSOR = {
    "dtype": str,
    "encoding": str,
    "extent": int,
    "members": str,
    "name": str,
    "shape": list,
    "stack": bool,
}
_NAME = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,512}")
_FILE_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,512}")

Entry = TypeVar("Entry", TensorEntry, AttachmentEntry)
Record = dict[str, Any]
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Index:
    """A whole index; ``tensors`` and ``attachments`` in the order of their names."""

    generator: str
    tensors: Mapping[str, TensorEntry]
    attachments: Mapping[str, AttachmentEntry]
    dictionaries: Sequence[DictionaryEntry]


def parse_index(text: Bytes, lengths: Lengths) -> Index:
    """Parse the JSON text; ``lengths`` int64 [extents] are those of the extent table.

    Raises ``QMoEError``: ``malformed``, ``limit``, ``duplicate``.
    """
    top = fields(canonical_json.loads(text), "the index", _TOP)
    for what in ("tensors", "attachments", "dictionaries"):
        limits.check(f"number of {what}", len(top[what]), 0, limits.ENTRIES)
    dictionaries = [_dictionary(record) for record in top["dictionaries"]]
    attachments = [_attachment(record, lengths) for record in top["attachments"]]
    tensors = [parse_tensor(record, lengths) for record in top["tensors"]]
    owned = [(each.extent, 1) for each in dictionaries]
    owned += [(each.extent, 1) for each in attachments]
    owned += [(each.extent, each.extent_count) for each in tensors]
    _check_owners(owned, len(lengths))
    return Index(
        top["generator"], _by_name(tensors, "tensors"), _by_name(attachments, "attachments"),
        dictionaries,
    )  # fmt: skip


def dump_index(
    generator: str, tensors: list[Record], attachments: list[Record], dictionaries: list[Record]
) -> bytes:
    """The canonical text of an index; the records are those of section 3."""

    top: Record = {
        "attachments": sorted(attachments, key=_name),
        "dictionaries": dictionaries,
        "generator": generator,
        "tensors": sorted(tensors, key=_name),
    }
    return canonical_json.dumps(top)


def _name(record: Record) -> str:
    return str(record["name"])


def fields(
    record: Any, what: str, kinds: Mapping[str, type], further: bool = False
) -> dict[str, Any]:
    """Check that ``record`` is an object of these keys and kinds ([J-4]), and return it.

    The kinds are exact: ``True`` is no integer. With ``further`` there may be other keys.
    """
    if type(record) is not dict:
        raise QMoEError("malformed", f"{what} is not an object")
    if record.keys() != kinds.keys() and not (further and record.keys() >= kinds.keys()):
        wrong = sorted(record.keys() ^ kinds.keys())
        raise QMoEError("malformed", f"{what} lacks or has keys it should not: {wrong[:8]}")
    for key, kind in kinds.items():
        if type(record[key]) is not kind:
            raise QMoEError("malformed", f"{key!r} of {what} is not of the kind {kind.__name__}")
    return record


def check_file_name(name: str) -> None:
    """Raise ``QMoEError("malformed")`` unless this is a plain file name. [J-6]"""
    if not _FILE_NAME.fullmatch(name):
        raise QMoEError("malformed", f"{name[:80]!r} is not a plain file name")


def parse_tensor(record: Any, lengths: Lengths | None = None) -> TensorEntry:
    """Check one tensor's object; without ``lengths`` nothing is asked of its extents.

    Raises ``QMoEError``: ``malformed``, ``limit``.
    """
    # What makes up a message costs nothing unless there is one.
    encoding = ENCODINGS.get(record.get("encoding", "")) if _is_named(record) else None
    what = f"tensor {record['name'][:80]!r}" if _is_named(record) else "a tensor"
    kinds = _TENSOR if encoding is None else _KINDS[encoding.name]
    unknown = encoding is None
    fields(record, what, kinds, further=unknown)
    if unknown and any(_has_null(value) for value in record.values()):
        raise QMoEError("malformed", f"{what} has a null")  # [J-2]
    name, dtype, members, stack = (record[key] for key in ("name", "dtype", "members", "stack"))
    if not _NAME.fullmatch(name):  # [J-6]
        raise QMoEError("malformed", f"{what}: a name has 1 to 512 bytes, none of them a space")
    shape = _shape(record["shape"], dtype, what)
    if stack and not shape:  # [T-1]
        raise QMoEError("malformed", f"{what} is a stack without a dimension")
    if members and not (stack and members.count("{}") == 1):  # [T-2]
        raise QMoEError("malformed", f"{what}: members are {members[:80]!r}")
    first, count = record["extent"], shape[0] if stack else 1
    stored = 0
    if count == 0 and first != 0:  # [T-1]
        raise QMoEError("malformed", f"{what} has no expert, its extent has to be 0")
    if lengths is not None:
        if first + count > len(lengths):  # [F-5]
            raise QMoEError("malformed", f"{what} has extents that the file does not have")
        stored = int(lengths[first : first + count].sum()) if stack else int(lengths[first])
    further = {key: record[key] for key in record if key not in _TENSOR}
    parameters = MappingProxyType(further) if further else NO_PARAMETERS
    if encoding is not None:
        try:
            encoding.check_entry(Item(dtype, shape[1:] if stack else shape, parameters))
        except QMoEError as error:
            raise QMoEError(error.code, f"{what}: {error}") from error
    return TensorEntry(
        name, dtype, shape, record["encoding"], stack, members, first, count, stored, parameters
    )


_KINDS = {
    name: _TENSOR | {key: type(value) for key, value in encoding.defaults.items()}
    for name, encoding in ENCODINGS.items()
}


def _is_named(record: Any) -> bool:
    return (
        type(record) is dict
        and type(record.get("name")) is str
        and type(record.get("encoding")) is str
    )


def _has_null(value: Any) -> bool:
    """Whether there is a null anywhere in it; the nesting is limited."""
    if type(value) is dict:
        return any(_has_null(each) for each in value.values())
    if type(value) is list:
        return any(_has_null(each) for each in value)
    return value is None


def _shape(values: list[Any], dtype: str, what: str) -> tuple[int, ...]:
    limits.check(f"number of dimensions of {what}", len(values), 0, limits.DIMENSIONS)
    for value in values:
        if type(value) is not int:
            raise QMoEError("malformed", f"a dimension of {what} is not an integer")
        limits.check(f"a dimension of {what}", value, 0, limits.DIMENSION)
    size = STORAGE[dtype].itemsize if dtype in STORAGE else 1
    total = math.prod(value for value in values if value) * size
    limits.check(f"size of {what}", total, 0, limits.INTEGER)
    return tuple(values)


def _attachment(record: Any, lengths: Lengths) -> AttachmentEntry:
    fields(record, "an attachment", _ATTACHMENT)
    check_file_name(record["name"])
    what = f"attachment {record['name']!r}"
    if record["extent"] >= len(lengths):  # [F-5]
        raise QMoEError("malformed", f"{what} has an extent that the file does not have")
    stored = int(lengths[record["extent"]])
    if record["encoding"] == "raw" and stored != record["bytes"]:
        raise QMoEError("malformed", f"{what} has {record['bytes']} bytes, {stored} are stored")
    return AttachmentEntry(
        record["name"], record["bytes"], record["encoding"], record["extent"], stored
    )


def _dictionary(record: Any) -> DictionaryEntry:
    fields(record, "a dictionary", _DICTIONARY)
    limits.check("bytes of a dictionary", record["bytes"], *limits.TREE_BYTES)
    limits.check("width of a dictionary", record["width"], *limits.WIDTH)  # [D-1]
    limits.check("max_length of a dictionary", record["max_length"], *limits.ENTRY_LENGTH)
    limits.check("max_nonzeros of a dictionary", record["max_nonzeros"], 0, limits.ENTRY_NONZEROS)
    if record["signs"] not in SIGN_MODES:  # [D-1]
        raise QMoEError("malformed", f"signs of a dictionary are {record['signs'][:80]!r}")
    return DictionaryEntry(
        size=record["bytes"], **{key: value for key, value in record.items() if key != "bytes"}
    )


def _by_name(entries: list[Entry], what: str) -> Mapping[str, Entry]:
    """By name, in the order of the file, which has to be strictly ascending. [J-5]"""
    for before, after in pairwise(entries):
        if before.name == after.name:
            raise QMoEError("duplicate", f"two {what} are called {after.name!r}")
        if before.name > after.name:
            raise QMoEError("malformed", f"{what} are not in order at {after.name!r}")
    return MappingProxyType({each.name: each for each in entries})


def _check_owners(owned: list[tuple[int, int]], extent_count: int) -> None:
    """Each extent has one owner: sorted, the ranges follow each other without a gap. [F-5]"""
    end = 0
    for first, count in sorted(owned):
        if not count:
            continue
        if first != end:
            raise QMoEError("malformed", f"extent {min(first, end)} has two owners or none")
        end += count
    if end != extent_count:
        raise QMoEError("malformed", f"extent {end} has no owner")
