"""The vectors of SPEC.md section 2: preamble, extent table and padding."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tools.conformance_vectors.file_builder import SIGNATURE, Content, canonical, pack
from tools.conformance_vectors.int_dict_builder import patched
from tools.conformance_vectors.samples import mixed, small, unknown
from tools.conformance_vectors.vector import Vector, accept, reject


def section_2() -> Iterator[Vector]:
    what = "A file without tensors, 64 bytes before its index"
    yield accept("empty", "N-1 F-1 F-3 P-8", what, Content())
    yield accept("one-raw", "N-1 F-1 F-2 R-1", "One raw tensor of three bytes", small())
    what = "All optional feature bits are set: a reader ignores them"
    data = small().pack(optional_features=0xFFFFFFFF)
    yield accept("features-optional", "P-5", what, small(), data)
    content = Content()
    for name, length in (("a", 0), ("b", 64), ("c", 0), ("d", 65), ("e", 128), ("f", 1)):
        content.tensor(name, "U8", [length], bytes(range(1, length + 1)))
    yield accept("extents", "F-1 F-2 F-5", "Extents of 0, 64, 65, 128 and 1 bytes in turn", content)
    for rest in (0, 1, 7):
        what = f"index_length is {rest} more than a multiple of 8"
        yield accept(f"index-length-{rest}", "F-2 P-8", what, small_with_rest(rest))


def small_with_rest(rest: int) -> Content:
    """With an index of ``rest`` bytes more than a multiple of 8."""
    content = small()
    while len(canonical(content.index)) % 8 != rest:
        content.index["generator"] += "."
    return content


def section_2_1_signature() -> Iterator[Vector]:
    good = small().pack()
    yield reject("zero-bytes", "P-1", "truncated", "A file of 0 bytes", b"")
    what = "The first 7 bytes of the signature"
    yield reject("signature-part", "P-1", "truncated", what, good[:7])
    what = "Seven bytes of something else"
    yield reject("signature-part-wrong", "P-1", "signature", what, b"\x8fQMOE\r ")
    for place, byte in enumerate(SIGNATURE):
        data = small().pack(signature=patched(SIGNATURE, {place: byte & 0x7F ^ (place > 0)}))
        what = f"Byte {place} of the signature is another one"
        yield reject(f"signature-{place}", "P-1", "signature", what, data)
    for name, what, before, after in (
        ("lf", "CR LF has become LF", b"\r\n", b"\n"),
        ("crlf", "LF has become CR LF", b"\n", b"\r\n"),
    ):
        data = good.replace(before, after)
        yield reject(f"signature-{name}", "P-1", "signature", f"Sent as text: {what}", data)


def section_2_1_preamble() -> Iterator[Vector]:
    def bad(id: str, needed: str, code: str, what: str, **fields: Any) -> Vector:
        return reject(id, needed, code, what, small().pack(**fields))

    good = small().pack()
    yield reject("preamble-8", "P-2", "truncated", "The signature and nothing else", good[:8])
    yield reject("preamble-63", "P-2", "truncated", "The preamble without its last byte", good[:63])
    data = patched(good, {60: good[60] ^ 1})
    yield reject("preamble-crc", "P-3", "checksum", "preamble_crc32 is wrong", data)
    what = "A bit that readers ignore has changed without the checksum"
    yield reject("preamble-flipped", "P-3", "checksum", what, patched(good, {19: 0x80}))
    for major, minor in ((0, 0), (0, 1), (0, 3), (0, 0x102), (1, 2), (0x100, 2)):
        what = f"Version {major}.{minor}"
        yield bad(f"version-{major}.{minor}", "P-4", "version", what, major=major, minor=minor)
    for bit in (0, 8, 31):
        what = f"Bit {bit} of required_features is set"
        yield bad(f"feature-{bit}", "P-5", "feature", what, required_features=1 << bit)
    for place in range(8):
        what = f"Byte {place} of reserved is not zero"
        wrong = patched(bytes(8), {place: 1 << place})
        yield bad(f"reserved-{place}", "P-6", "padding", what, reserved=wrong)
    yield reject("cut-1", "P-7", "truncated", "The last byte of the file is missing", good[:-1])
    yield reject("cut-64", "P-7", "truncated", "Nothing but the preamble is there", good[:64])
    yield reject("longer-1", "P-7", "trailing", "One more byte than file_length", good + b"\0")
    yield reject("longer-64", "P-7", "trailing", "64 more bytes than file_length", good + bytes(64))
    what = "file_length is beyond its limit, and so beyond the file"
    yield bad("file-length-greater", "P-7", "truncated", what, file_length=2**53)
    what = "file_length is 0, less than a file can have"
    yield bad("file-length-0", "P-7", "trailing", what, file_length=0)
    for length in (0, 1):
        what = f"index_length is {length}: the least is 2"
        data = pack(b"{}"[:length], [])
        yield reject(f"index-length-least-{length}", "P-8 L-1", "limit", what, data)
    what = "index_length is 2, the least; the text is {}"
    yield reject("index-length-2", "P-8 J-4", "malformed", what, pack(b"{}", []))
    for field, most in (("index_length", 28), ("extent_count", 24)):
        name = field.replace("_", "-")
        what = f"{field} is 2^{most} + 1"
        yield bad(f"{name}-most", "P-8 L-1 N-3", "limit", what, **{field: 2**most + 1})
        what = f"{field} is 2^{most}, within the limit but not within the file"
        yield bad(f"{name}-in-limit", "P-8 N-3", "malformed", what, **{field: 2**most})
    what = "extent_count is 0, but there is one"
    yield bad("extent-count-less", "P-8", "malformed", what, extent_count=0)
    what = "index_length is 8 too small: the parts do not end at file_length"
    length = len(canonical(small().index)) - 8
    yield bad("index-length-8-less", "P-8", "malformed", what, index_length=length)
    yield bad("index-offset-0", "P-8", "malformed", "index_offset is 0", index_offset=0)
    what = "The index begins at byte 72, no multiple of 64, after 8 zero bytes"
    yield reject("index-offset-72", "P-8 F-1", "malformed", what, Content().pack(hole=8))
    what = "index_offset is 2^64 - 64: the sum of P-8 would wrap around"
    yield bad("index-offset-overflow", "N-2", "limit", what, index_offset=2**64 - 64)
    what = "index_offset is 2^63 + 1: no multiple of 64, but first of all too great"
    yield bad("index-offset-overflow-odd", "N-2", "limit", what, index_offset=2**63 + 1)
    what = "16 zero bytes after the extent table, within file_length"
    data = small().pack(file_length=len(good) + 16) + bytes(16)
    yield reject("after-the-table", "F-3 P-8", "malformed", what, data)
    yield bad("index-crc", "P-9", "checksum", "index_crc32 is wrong", index_crc32=0)
    for id, place, what in (
        ("index-flipped", 128, "the first byte of the JSON text"),
        ("index-flipped-table", -16, "the extent table"),
    ):
        what = f"A bit of {what} has changed without the checksum"
        yield reject(id, "P-9", "checksum", what, patched(good, {place: good[place] ^ 1}))


def section_2_1_order() -> Iterator[Vector]:
    """Two defects each: the order of section 2.1 decides."""
    fields: dict[str, Any]
    for name, needed, code, fields, tail in (
        ("crc-version", "P-3", "checksum", {"preamble_crc32": 0, "major": 9}, b""),
        ("version-feature", "P-4", "version", {"major": 9, "required_features": 1}, b""),
        ("feature-reserved", "P-5", "feature",
         {"required_features": 1, "reserved": b"\1" * 8}, b""),
        ("reserved-trailing", "P-6", "padding", {"reserved": b"\1" * 8}, b"\0"),
        ("trailing-limit", "P-7", "trailing", {"index_length": 1}, b"\0"),
        ("limit-crc", "P-8", "limit", {"index_length": 1, "index_crc32": 0}, b""),
        ("malformed-crc", "P-8", "malformed", {"extent_count": 0, "index_crc32": 0}, b""),
    ):
        what = f"Two defects, {name.replace('-', ' and ')}: the first is reported"
        yield reject(f"order-{name}", f"{needed} C-4", code, what, small().pack(**fields) + tail)


def section_2_2_layout() -> Iterator[Vector]:
    for name, place, what in (
        ("first", 64 + 3, "The first byte after an extent"),
        ("last", 127, "The last byte before the index"),
    ):
        data = small().pack(patches={place: 1})
        what = f"{what} is not zero"
        yield reject(f"gap-{name}", "F-2 C-3", "padding", what, data, stage="verify")
    data = mixed().pack(patches={64 + 2 + 20: 1})
    what = "A byte between two extents is not zero"
    yield reject("gap-between", "F-2 C-3", "padding", what, data, stage="verify")
    for name, place in (("first", -16 - 7), ("last", -16 - 1)):
        what = f"The {name} byte between the JSON text and the extent table is not zero"
        data = small_with_rest(1).pack(patches={place: 1})
        yield reject(f"index-gap-{name}", "F-2 C-1", "padding", what, data)
    for name, length, what in (
        ("overflow", 2**64 - 1, "2^64 - 1: its end would wrap around"),
        ("sum", 2**63 - 64, "2^63 - 64: its end is 2^63"),
        ("align", 2**63 - 65, "2^63 - 65: aligned, its end is 2^63"),
    ):
        data = small().pack(records={0: {"length": length}})
        what = f"An extent's length is {what}"
        yield reject(f"extent-table-{name}", "N-2 F-5", "limit", what, data)
    for name, length in (("greater", 65), ("huge", 2**62), ("less", 0)):
        what = f"The extent's length is {length} and leads elsewhere than to the index"
        data = small().pack(records={0: {"length": length}})
        yield reject(f"extent-table-{name}", "F-1 F-5 N-3", "malformed", what, data)
    what = "64 zero bytes that belong to nothing before the index"
    yield reject("hole", "F-1 F-5", "malformed", what, small().pack(hole=64))
    what = "No extents, but the index begins at byte 128"
    yield reject("hole-empty", "F-1 F-5", "malformed", what, Content().pack(hole=64))


def section_2_2_owners() -> Iterator[Vector]:
    def bad(name: str, what: str, content: Content, needed: str = "F-6") -> Vector:
        return reject(name, needed, "malformed", what, content)

    yield bad("extent-unowned", "An extent that nothing owns", small().extent(b"abc"))
    content = Content().extent(b"abc").tensor("a", "U8", [3], b"abc")
    yield bad("extent-unowned-first", "Extent 0 is one that nothing owns", content)
    content = small().tensor("b", "U8", [3], b"abc", stored=[], extent=0)
    yield bad("extent-shared", "An extent that two tensors own", content)
    content = mixed().change("attachments", 1, extent=0, bytes=2)
    del content.extents[1]
    for entry in content.index["dictionaries"] + content.index["tensors"]:
        entry["extent"] -= 1
    yield bad("extent-shared-attached", "One that two attachments own", content)
    content = stack(2).tensor("b", "U8", [1], b"b", stored=[], extent=1)
    yield bad("extent-shared-stack", "A stack's extent is a tensor's too", content)
    for name, part, number in (
        ("tensor", "tensors", 6), ("dictionary", "dictionaries", 2**53 - 1),
        ("attachment", "attachments", 6),
    ):
        what = f"The extent of the last {name} is {number} of 6"
        yield bad(f"extent-beyond-{name}", what, mixed().change(part, extent=number))
    yield bad("stack-beyond", "A stack of three experts, two extents", stack(3), "F-6 T-1")
    what = "A stack of 2^40 experts, two extents"
    yield bad("stack-far-beyond", what, stack(2**40), "F-6 T-1 N-3")
    yield bad("stack-short", "A stack of one expert, two extents", stack(1), "F-6 T-1")
    content = unknown().change(extent=1)
    yield bad("extent-beyond-unknown", "The same of a tensor of an unknown encoding", content)
    content = unknown().extent(b"abc")
    what = "An extent that nothing owns beside a tensor of an unknown encoding"
    yield bad("extent-unowned-unknown", what, content)
    content = stack(2).change(encoding="future", shape=[1, 1])
    what = "A stack of one expert, two extents, of an unknown encoding"
    yield bad("stack-short-unknown", what, content, "F-6 T-1")


def stack(experts: int) -> Content:
    """A stack of two extents."""
    return Content().tensor("a", "U8", [experts, 1], b"a", b"b", stack=True)


def section_2_2_checksums() -> Iterator[Vector]:
    for name, content, number, what in (
        ("attachment", mixed(), 0, "the extent of the attachment"),
        ("dictionary", mixed(), 2, "the extent of the dictionary"),
        ("raw", mixed(), 3, "the extent of the raw tensor"),
        ("int-dict", mixed(), 4, "the extent of the int-dict tensor"),
        ("int-group", mixed(), 5, "the extent of the int-group tensor"),
        ("expert", stack(2), 1, "a stack's second expert"),
    ):
        data = content.pack(records={number: {"crc32": 0}})
        what = f"The stored checksum of {what} is wrong"
        yield reject(f"extent-crc-{name}", "F-7 C-2", "checksum", what, data, stage="verify")
    for name, value in (("first", 1), ("last", 1 << 31)):
        what = f"The {name} bit of a record's zero is set"
        for kind, number in (("", 0), ("-second", 1)):
            data = stack(2).pack(records={number: {"zero": value}})
            yield reject(f"record-zero-{name}{kind}", "F-4", "padding", what, data)
