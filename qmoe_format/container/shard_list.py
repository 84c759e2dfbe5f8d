"""The text file that names the shards of a model (SPEC.md section 9)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from qmoe_format.container import canonical_json, limits
from qmoe_format.container.index import check_file_name, fields
from qmoe_format.container.preamble import VERSION
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError
from qmoe_format.remote import Location

FORMAT = "qmoe-shards"
BEGINNING = b'{"format":"qmoe-shards"'
_TOP = {"format": str, "shards": list, "version": list}
_SHARD = {"bytes": int, "file": str, "preamble_crc32": int}


@dataclass(frozen=True, slots=True)
class ListedShard:
    """What the text file says about a shard.

    Attributes:
        file: its name, in the same folder.
        bytes: its length.
        preamble_crc32: its preamble's checksum.
    """

    file: str
    bytes: int
    preamble_crc32: int


def file_stem(path: Location) -> str:
    """What the names of the files beside ``path`` begin with: its own name without suffix."""
    return path.name.removesuffix(".json").removesuffix(".qmoe")


def shard_name(path: Location, number: int, count: int) -> str:
    """The name of shard ``number``, from 1, of the set whose text file is ``path``."""
    return f"{file_stem(path)}-{number:05}-of-{count:05}.qmoe"


def dump_shard_list(shards: Sequence[ListedShard]) -> bytes:
    """The text file of these shards. [S-1]"""
    listed = [asdict(each) for each in shards]
    return canonical_json.dumps({"format": FORMAT, "shards": listed, "version": list(VERSION)})


def parse_shard_list(text: Bytes) -> list[ListedShard]:
    """Check a text file.

    Raises:
        QMoEError: ``malformed``, ``version``, ``limit``, ``duplicate``.
    """
    top = canonical_json.loads(text)
    version = top.get("version") if type(top) is dict else None
    if type(version) is not list or [type(number) for number in version] != [int, int]:  # [S-1]
        raise QMoEError("malformed", "the version is not a major and a minor number")
    if tuple(version) != VERSION:  # [P-4]
        raise QMoEError("version", f"the shards have format version {version[0]}.{version[1]}")
    fields(top, "the list of shards", _TOP)
    if top["format"] != FORMAT:  # [S-1]
        raise QMoEError("malformed", f"the format is {top['format'][:80]!r}, not {FORMAT!r}")
    limits.check("number of shards", len(top["shards"]), 0, limits.ENTRIES)
    shards = [ListedShard(**fields(record, "a shard", _SHARD)) for record in top["shards"]]
    for each in shards:
        check_file_name(each.file)  # [S-2]
    check_unique([each.file for each in shards], "shards")
    return shards


def check_unique(names: Iterable[str], what: str) -> None:
    """Refuse names that are there twice. [S-3]

    Raises:
        QMoEError: ``duplicate``.
    """
    for before, after in pairwise(sorted(names)):
        if before == after:
            raise QMoEError("duplicate", f"two {what} have the name {after!r}")
