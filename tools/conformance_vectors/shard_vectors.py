"""The vectors of SPEC.md sections 9 and 13: sets of shards, and the file that it shows."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from tools.conformance_vectors.exact_numbers import bf16
from tools.conformance_vectors.file_builder import SIGNATURE, Content, canonical
from tools.conformance_vectors.int_dict_builder import Matrix, patched
from tools.conformance_vectors.samples import BOOK, symmetric
from tools.conformance_vectors.vector import Vector, accept

NAMES = ("model-1-of-2.qmoe", "model-2-of-2.qmoe")


def shard(first: str, second: str, attached: str = "") -> Content:
    content = Content()
    if attached:
        content.attach(attached, b"{}")
    content.dictionary(BOOK).tensor(first, "U8", [1], b"1")
    return content.int_dict(second, "F32", symmetric([1, 0, -1]))


def entry(name: str, data: bytes, **keys: Any) -> dict[str, Any]:
    """A shard's line in the text; ``keys`` replace what is right."""
    crc32 = int.from_bytes(data[60:64], "little")
    return {"bytes": len(data), "file": name, "preamble_crc32": crc32} | keys


def of(*entries: dict[str, Any], **keys: Any) -> bytes:
    """The text of a set."""
    return canonical({"format": "qmoe-shards", "shards": entries, "version": [0, 2]} | keys)


def set_of(text: bytes, shards: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    files = {"model.qmoe.json": text, **shards}
    return {f"shards-{name}/{file}": data for file, data in files.items()}


def accept_set(
    name: str, needed: str, what: str, shards: Mapping[str, Content], *, backwards: bool = False
) -> Vector:
    data = {file: content.pack() for file, content in shards.items()}
    entries = [entry(file, each) for file, each in data.items()][:: -1 if backwards else 1]
    contents = {
        part: sorted((item for each in shards.values() for item in each.expected[part]),
                     key=lambda item: str(item["name"]))
        for part in ("attachments", "tensors")
    }
    files = set_of(of(*entries), data, name)
    return Vector(f"shards-{name}", needed, what, files, "accept", contents=contents)


def reject_set(
    name: str, needed: str, code: str, what: str, text: bytes, shards: Mapping[str, bytes],
    stage: str = "open",
) -> Vector:
    files = set_of(text, shards, name)
    return Vector(f"shards-{name}", needed, what, files, f"reject:{code}", stage)


def pair() -> dict[str, Content]:
    return dict(zip(NAMES, (shard("a", "d", "config.json"), shard("b", "c")), strict=True))


def section_9_accepted() -> Iterator[Vector]:
    yield accept_set("two", "S-1 S-2 S-3", "A set of two shards", pair())
    yield accept_set("one", "S-1", "A set of one shard", {NAMES[0]: pair()[NAMES[0]]})
    yield accept_set("none", "S-1", "A set of no shards", {})
    yield accept_set("reversed", "S-1", "Shards may be in any order", pair(), backwards=True)


def section_9_text() -> Iterator[Vector]:
    data, other = (content.pack() for content in pair().values())
    e, f = entry(NAMES[0], data), entry(NAMES[1], other)
    for name, needed, code, what, text in (
        ("space", "J-1", "malformed", "A space in the text", of(e).replace(b',"v', b', "v')),
        ("newline", "J-1", "malformed", "A line feed after the text", of(e) + b"\n"),
        ("after", "J-2", "malformed", "Something after the text", of(e) + b"{}"),
        ("fraction", "J-2", "malformed", "A version of 0.2", of(e).replace(b"[0,2]", b"0.2")),
        ("number", "J-2", "malformed", "A number beyond 2^53 - 1", of(e, version=[0, 2**53])),
        ("order", "J-3", "malformed", "Keys of the text not in order",
         of(e).replace(b'"shards"', b'"x":0,"shards"')),
        ("key-more", "J-4", "malformed", "A key more", of(e, x=0)),
        ("key-kind", "J-4", "malformed", "shards is an object", of(shards={})),
        ("key-missing", "J-4", "malformed", "No version", of(e).replace(b',"version":[0,2]', b"")),
        ("shard-more", "J-4", "malformed", "A shard with a key more", of(e | {"x": 0})),
        ("shard-kind", "J-4", "malformed", "bytes is a string", of(e | {"bytes": "5"})),
        ("shard-missing", "J-4", "malformed", "A shard without bytes",
         of({key: value for key, value in e.items() if key != "bytes"})),
        ("nesting", "L-1", "limit", "The version nested 9 deep", of(e, version=[[[[[[[[]]]]]]]])),
        ("version-short", "J-4", "malformed", "A version of one number", of(e, version=[0])),
        ("version-long", "J-4", "malformed", "Three numbers", of(e, version=[0, 2, 0])),
        ("version-kind", "J-4", "malformed", "A version of false", of(e, version=[False, 2])),
        ("version-minor", "P-4", "version", "Version 0.3", of(e, version=[0, 3])),
        ("version-key-more", "P-4 C-4", "version", "Version 0.3, with a key more",
         of(e, version=[0, 3], x=0)),
        ("version-shards", "P-4 C-4", "version", "Version 0.3, shards is an object",
         of(shards={}, version=[0, 3])),
        ("version-name", "P-4 C-4", "version", "Version 0.3, a file name that is not allowed",
         of(e | {"file": "../a"}, version=[0, 3])),
        ("version-older", "P-4", "version", "Version 0.1", of(e, version=[0, 1])),
        ("version-major", "P-4", "version", "Version 1.2", of(e, version=[1, 2])),
        ("format", "P-1", "signature", "Another format's name", of(e, format="qmoe-shard")),
        ("before", "P-1", "signature", "A space before the text", b" " + of(e)),
    ):
        yield reject_set(name, f"S-1 {needed}", code, what, text, {NAMES[0]: data})
    for name, needed, code, what, text in (
        ("path", "S-2 J-6", "malformed", "A shard in another folder", of(e | {"file": "../a"})),
        ("dot", "S-2 J-6", "malformed", "A hidden file", of(e | {"file": ".a"})),
        ("long", "S-2 J-6", "malformed", "A file name of 256 bytes", of(e | {"file": "n" * 256})),
        ("longest", "S-2 J-6", "truncated", "A file name of 255 bytes, the most, which is missing",
         of(e | {"file": "n" * 255})),
        ("bytes", "S-2", "checksum", "bytes is one too great", of(e | {"bytes": e["bytes"] + 1})),
        ("bytes-modulo", "S-2", "checksum", "bytes is 2^32 too great",
         of(e | {"bytes": e["bytes"] + 2**32})),
        ("crc-modulo", "S-2", "checksum", "preamble_crc32 is 2^32 too great",
         of(e | {"preamble_crc32": e["preamble_crc32"] + 2**32})),
        ("crc", "S-2", "checksum", "Another file's preamble_crc32",
         of(e | {"preamble_crc32": f["preamble_crc32"]})),
        ("missing", "S-2", "truncated", "The second shard is missing", of(e, f)),
        ("twice", "S-3", "duplicate", "A shard named twice", of(e, e)),
    ):
        yield reject_set(name, needed, code, what, text, {NAMES[0]: data})


def section_9_shards() -> Iterator[Vector]:
    one, two = pair().values()
    data = {NAMES[0]: one.pack(), NAMES[1]: two.pack()}
    entries = [entry(*item) for item in data.items()]
    empty = Content().pack()
    text = of(entry("a.qmoe", empty), entry("a.qmoe", empty))
    what = "A shard without tensors named twice"
    yield reject_set("twice-empty", "S-3", "duplicate", what, text, {"a.qmoe": empty})
    names = ("a.qmoe", "b.qmoe", "c.qmoe")
    parts = (shard("a", "d"), shard("b", "c"), shard("a", "e"))
    three = {file: content.pack() for file, content in zip(names, parts, strict=True)}
    text = of(*[entry(*item) for item in three.items()])
    what = "A tensor is in the first and the third shard"
    yield reject_set("tensor-twice-far", "S-3", "duplicate", what, text, three)
    text = of(entry("a.qmoe", empty), entries[0], entry("a.qmoe", empty))
    what = "A shard without tensors is named again as the third"
    yield reject_set("twice-far", "S-3", "duplicate", what, text, data | {"a.qmoe": empty})
    inner = of(entries[0])
    text = of(entries[0], entry("inner.json", inner))
    what = "A shard that is itself the text of a set"
    yield reject_set(
        "nested", "S-2 P-1", "signature", what, text, data | {"inner.json": inner})
    text = of(*entries)
    what = "A folder has the name of the second shard"
    inside = {NAMES[0]: data[NAMES[0]], f"{NAMES[1]}/file": b"x"}
    yield reject_set("folder", "S-2", "truncated", what, text, inside)
    wrong = patched(data[NAMES[1]], {60: data[NAMES[1]][60] ^ 1})
    text = of(entries[0], entry(NAMES[1], wrong))
    what = "The preamble of the second shard is damaged, but the text agrees with it"
    yield reject_set(
        "crc-agrees", "P-3 S-2", "checksum", what, text, data | {NAMES[1]: wrong})
    what = "A shard has lost its last byte: its length is not the one named"
    cut = data | {NAMES[0]: data[NAMES[0]][:-1]}
    yield reject_set("cut", "S-2", "checksum", what, of(*entries), cut)
    for name, needed, length, number, code, what in (
        ("62", "S-2", 62, 0x4241, "checksum",
         "the bytes that it has of a preamble_crc32 are named"),
        ("62-zero", "S-2 P-2", 62, 0, "truncated", "its preamble_crc32 counts as 0"),
        ("0-zero", "S-2 P-1", 0, 0, "truncated", "its preamble_crc32 counts as 0"),
    ):
        short = (SIGNATURE + bytes(52) + b"AB")[:length]
        text = of(entry(NAMES[0], short, preamble_crc32=number))
        what = f"A shard of {length} bytes: {what}"
        yield reject_set(f"short-{name}", needed, code, what, text, {NAMES[0]: short})
    for name, what, contents in (
        ("tensor", "A tensor", (two, shard("b", "d"))),
        ("attachment", "An attachment", (one, shard("e", "f", "config.json"))),
    ):
        both = {file: content.pack() for file, content in zip(NAMES, contents, strict=True)}
        text = of(*[entry(*item) for item in both.items()])
        what = f"{what} is in two shards"
        yield reject_set(f"{name}-twice", "S-3", "duplicate", what, text, both)
    for name, needed, code, what, stage, wrong in (
        ("damaged", "F-7 S-2", "checksum", "An extent of the second shard is damaged", "verify",
         two.pack(records={1: {"crc32": 0}})),
        ("version-shard", "P-4 S-1 C-1", "version", "The second shard is of version 0.1", "open",
         two.pack(minor=1)),
    ):
        text = of(entries[0], entry(NAMES[1], wrong))
        yield reject_set(name, needed, code, what, text, data | {NAMES[1]: wrong}, stage)
    what = "Two shards with dictionaries of their own"
    yield accept_set("other", "S-3", what, {NAMES[0]: one, NAMES[1]: shard("x", "y")})


def section_13() -> Iterator[Vector]:
    content = Content().attach("config.json", b'{"experts":2}').dictionary(BOOK)
    content.index["generator"] = "example"
    content.tensor("bias", "F32", [2], struct.pack("<2f", 0.5, -2))
    experts = [
        Matrix([[0, 0, 1, 0, -1, 0], [0, 0, 0, 0, 0, 0]], bf16(-0.25, 0.5, -1, 1)),
        Matrix([[-1, 0, 0, 0, 0, 0], [3, 1, 0, 0, 0, -2]], bf16(-0.75, 0.125, -2, 3)),
    ]
    content.int_dict("experts", "BF16", *experts, members="experts.{}.w")
    what = "The file of SPEC.md section 13: an attachment, a raw tensor, a stack of two experts"
    yield accept("whole-file", "N-1 F-1 T-1 E-10 D-4 V-1", what, content)
