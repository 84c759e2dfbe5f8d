"""The index: canonical JSON to entries, with every check of SPEC.md section 3, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from operator import itemgetter
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qmoe_format.container import canonical_json, limits
from qmoe_format.container.encodings import ENCODINGS, Encoding
from qmoe_format.container.entries import (
    NO_PARAMETERS,
    AttachmentEntry,
    DictionaryEntry,
    Entry,
    Item,
    TensorEntry,
)
from qmoe_format.dtypes import STORAGE, Bytes
from qmoe_format.errors import QMoEError, located

_TOP = {"attachments": list, "dictionaries": list, "generator": str, "tensors": list}
_ATTACHMENT = {"bytes": int, "encoding": str, "extent": int, "name": str}
_DICTIONARY = {
    "bytes": int,
    "encoding": str,
    "extent": int,
    "max_length": int,
    "max_ones": int,
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
    "transposed": bool,
}
_NAME = re.compile(rf"[\x21\x23-\x5b\x5d-\x7e]{{1,{limits.NAME}}}")
_FILE_NAME = re.compile(rf"(?!\.)[A-Za-z0-9._-]{{1,{limits.FILE_NAME}}}")

Named = TypeVar("Named", TensorEntry, AttachmentEntry)
Record = dict[str, Any]
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Index:
    """A whole index, in the order of the file; ``owners``: all entries in that of their extents."""

    generator: str
    tensors: Mapping[str, TensorEntry]
    attachments: Mapping[str, AttachmentEntry]
    dictionaries: Sequence[DictionaryEntry]
    owners: Sequence[Entry]


def parse_index(text: Bytes, lengths: Lengths) -> Index:
    """Parse the JSON text, given the ``lengths`` int64 [extents] of the extent table.

    Raises:
        QMoEError: ``malformed``, ``limit``, ``duplicate``.
    """
    top = fields(canonical_json.loads(text), "the index", _TOP)
    for what in ("tensors", "attachments", "dictionaries"):
        limits.check(f"number of {what}", len(top[what]), 0, limits.ENTRIES)
    dictionaries = [_dictionary(number, each) for number, each in enumerate(top["dictionaries"])]
    attachments = [_attachment(record, lengths) for record in top["attachments"]]
    tensors = [parse_tensor(record, lengths) for record in top["tensors"]]
    owners: list[Entry] = [*dictionaries, *attachments, *tensors]
    owners.sort(key=lambda each: each.extent)
    _check_owners(owners, len(lengths))
    return Index(
        top["generator"], _by_name(tensors, "tensors"), _by_name(attachments, "attachments"),
        dictionaries, owners,
    )  # fmt: skip


def dump_index(
    generator: str, tensors: list[Record], attachments: list[Record], dictionaries: list[Record]
) -> bytes:
    """The canonical text of an index; the records are those of section 3."""
    top: Record = {
        "attachments": sorted(attachments, key=itemgetter("name")),
        "dictionaries": dictionaries,
        "generator": generator,
        "tensors": sorted(tensors, key=itemgetter("name")),
    }
    return canonical_json.dumps(top)


def fields(
    record: Any, what: str, kinds: Mapping[str, type], further: bool = False
) -> dict[str, Any]:
    """Check that an object has these keys with values of these very types, and return it. [J-4]

    Args:
        what: what an error message calls the object.
        further: whether it may have other keys.

    Raises:
        QMoEError: ``malformed``.
    """
    if type(record) is not dict:
        raise QMoEError("malformed", f"{what} is not an object")
    if record.keys() != kinds.keys() and not (further and record.keys() >= kinds.keys()):
        wrong = sorted(record.keys() ^ kinds.keys())
        raise QMoEError("malformed", f"{what} has missing or unknown keys: {wrong[:8]}")
    for key, kind in kinds.items():
        if type(record[key]) is not kind:
            raise QMoEError("malformed", f"{key!r} of {what} is not of type {kind.__name__}")
    return record


def check_file_name(name: str) -> None:
    """Refuse what is not a plain file name. [J-6]

    Raises:
        QMoEError: ``malformed``.
    """
    if not _FILE_NAME.fullmatch(name):
        raise QMoEError("malformed", f"{name[:80]!r} is not a plain file name")


def parse_tensor(record: Any, lengths: Lengths | None = None) -> TensorEntry:
    """Check one tensor's object.

    Args:
        lengths: int64 [extents], those of the file; None if it is still being written.

    Raises:
        QMoEError: ``malformed``, ``limit``.
    """
    try:
        return _tensor(record, lengths)
    except QMoEError as error:
        name = record.get("name") if type(record) is dict else None
        where = f"tensor {name[:80]!r}" if type(name) is str else "a tensor"
        raise error.at(where) from error


def _tensor(record: Any, lengths: Lengths | None) -> TensorEntry:
    named = type(record) is dict and type(record.get("encoding")) is str
    encoding = ENCODINGS.get(record["encoding"]) if named else None
    fields(record, "its entry", _keys(encoding) if encoding else _TENSOR, not encoding)
    if not encoding and any(_has_null(value) for value in record.values()):
        raise QMoEError("malformed", "its entry contains a null")  # [J-2]
    name, dtype, members = record["name"], record["dtype"], record["members"]
    stack, transposed = record["stack"], record["transposed"]
    if not _NAME.fullmatch(name):  # [J-6]
        raise QMoEError("malformed", "the name does not have 1 to 512 characters without spaces")
    shape = _shape(record["shape"], dtype)
    if stack and not shape:  # [T-1]
        raise QMoEError("malformed", "a stack without dimensions")
    if members and not (stack and members.count("{}") == 1):  # [T-2]
        raise QMoEError("malformed", f"{members[:80]!r} cannot be its members")
    if transposed and not (stack and len(shape) >= 3):  # [T-3]
        raise QMoEError("malformed", "transposed, but not a stack of at least three dimensions")
    first, count = record["extent"], shape[0] if stack else 1
    stored = 0
    if count == 0 and first != 0:  # [T-1]
        raise QMoEError("malformed", "a stack without experts must have extent 0")
    if lengths is not None:
        if first + count > len(lengths):  # [F-6]
            raise QMoEError("malformed", "its extents are not in the file")
        stored = int(lengths[first : first + count].sum()) if stack else int(lengths[first])
    further = {key: record[key] for key in record if key not in _TENSOR}
    parameters = MappingProxyType(further) if further else NO_PARAMETERS
    if encoding:
        encoding.check_entry(Item(dtype, shape[1:] if stack else shape, parameters))
    return TensorEntry(
        name, dtype, shape, record["encoding"], stack, members, transposed, first, count, stored,
        parameters,
    )  # fmt: skip


@cache
def _keys(encoding: Encoding) -> Mapping[str, type]:
    """The keys of a tensor's entry with this encoding, and the kinds of their values."""
    return _TENSOR | {key: type(value) for key, value in encoding.defaults.items()}


def _has_null(value: Any) -> bool:
    """Whether a null is anywhere inside; the depth of nesting has been checked."""
    if type(value) is dict:
        return any(_has_null(each) for each in value.values())
    if type(value) is list:
        return any(_has_null(each) for each in value)
    return value is None


def _shape(values: list[Any], dtype: str) -> tuple[int, ...]:
    limits.check("number of dimensions", len(values), 0, limits.DIMENSIONS)
    for value in values:
        if type(value) is not int:
            raise QMoEError("malformed", "a dimension is not an integer")
        limits.check("a dimension", value, 0, limits.DIMENSION)
    size = STORAGE[dtype].itemsize if dtype in STORAGE else 1
    total = math.prod(value for value in values if value) * size
    limits.check("size in bytes", total, 0, limits.INTEGER)
    return tuple(values)


def _attachment(record: Any, lengths: Lengths) -> AttachmentEntry:
    fields(record, "an attachment", _ATTACHMENT)
    check_file_name(record["name"])
    name, size, extent = record["name"], record["bytes"], record["extent"]
    if extent >= len(lengths):  # [F-6]
        raise QMoEError("malformed", f"attachment {name!r}: its extent is not in the file")
    entry = AttachmentEntry(name, size, record["encoding"], extent, int(lengths[extent]))
    if encoding := ENCODINGS.get(entry.encoding):
        with located(entry.label()):
            encoding.check_length(entry.stored_bytes, entry.item)
    return entry


def _dictionary(number: int, record: Any) -> DictionaryEntry:
    fields(record, "a dictionary", _DICTIONARY)
    limits.check("bytes of a dictionary", record["bytes"], *limits.TREE_BYTES)
    limits.check("width of a dictionary", record["width"], *limits.WIDTH)  # [D-1]
    limits.check("max_length of a dictionary", record["max_length"], *limits.ENTRY_LENGTH)
    limits.check("max_ones of a dictionary", record["max_ones"], 0, limits.ENTRY_ONES)
    further = {key: value for key, value in record.items() if key != "bytes"}
    return DictionaryEntry(number=number, size=record["bytes"], **further)


def _by_name(entries: list[Named], what: str) -> Mapping[str, Named]:
    """By name, in the order of the file, which must be strictly ascending. [J-5]"""
    for before, after in pairwise(entries):
        if before.name == after.name:
            raise QMoEError("duplicate", f"two {what} have the name {after.name!r}")
        if before.name > after.name:
            raise QMoEError("malformed", f"{what} are out of order at {after.name!r}")
    return MappingProxyType({each.name: each for each in entries})


def _check_owners(owners: Sequence[Entry], extent_count: int) -> None:
    """Each extent has one owner: their ranges follow each other without a gap. [F-6]"""
    end = 0
    for each in owners:
        if each.extent_count and each.extent != end:
            raise QMoEError("malformed", f"extent {min(each.extent, end)} has two owners or none")
        end += each.extent_count
    if end != extent_count:
        raise QMoEError("malformed", f"extent {end} has no owner")
