"""The vectors of SPEC.md sections 2, 3, 8, 9 and 12: the file around the tensors.

Each rejected vector has one defect, and everything else in it, checksums too, is right. Where one
has two (those named ``order-...``, a few of [N-2] and [S-2]), a rule says which comes first.
"""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.conformance_vectors.file_builder import (
    SIGNATURE,
    Content,
    Matrix,
    canonical,
    frame,
    pack,
    patched,
    shuffled,
)
from tools.conformance_vectors.table import (
    COMPRESSED_TEXT,
    ONE,
    PLANE8,
    TINY,
    accept,
    add,
    bf16,
    mixed,
    reject,
    small,
    ternary,
    unknown,
    with_text,
)

# -- Section 2 -------------------------------------------------------------------------------------


def section_2() -> None:
    accept(
        "empty", "N-1 F-1 F-3 P-8", "A file without tensors, 64 bytes before its index", Content(),
    )
    accept("one-raw", "N-1 F-1 F-2 R-1", "One raw tensor of three bytes", small())
    accept(
        "features-optional", "P-5", "All optional feature bits are set: a reader ignores them",
        small(), small().pack(optional_features=0xFFFFFFFF),
    )
    content = Content()
    for name, length in (("a", 0), ("b", 64), ("c", 0), ("d", 65), ("e", 128), ("f", 1)):
        content.tensor(name, "U8", [length], bytes(range(1, length + 1)))
    accept("extents", "F-1 F-2 F-4", "Extents of 0, 64, 65, 128 and 1 bytes in turn", content)
    for rest in (0, 1, 7):
        content = small()
        while len(canonical(content.index)) % 8 != rest:
            content.index["generator"] += "."
        accept(
            f"index-length-{rest}", "F-2 P-8", f"index_length is {rest} more than a multiple of 8",
            content,
        )

    # 2.1, the beginning of the file
    good = small().pack()
    reject("zero-bytes", "P-1", "truncated", "A file of 0 bytes", b"")
    reject("signature-part", "P-1", "truncated", "The first 7 bytes of the signature", good[:7])
    reject(
        "signature-part-wrong", "P-1", "signature", "Seven bytes of something else", b"\x8fQMOE\r ",
    )
    for place in range(8):
        wrong = (
            SIGNATURE[:place]
            + bytes([SIGNATURE[place] & 0x7F ^ (place > 0)])
            + SIGNATURE[place + 1 :]
        )
        description = f"Byte {place} of the signature is another one"
        reject(f"signature-{place}", "P-1", "signature", description, small().pack(signature=wrong))
    as_text = good.replace(b"\r\n", b"\n")
    reject("signature-lf", "P-1", "signature", "Sent as text: CR LF has become LF", as_text)
    as_text = good.replace(b"\n", b"\r\n")
    reject("signature-crlf", "P-1", "signature", "Sent as text: LF has become CR LF", as_text)
    reject("preamble-8", "P-2", "truncated", "The signature and nothing else", good[:8])
    reject("preamble-63", "P-2", "truncated", "The preamble without its last byte", good[:63])
    reject(
        "preamble-crc", "P-3", "checksum", "preamble_crc32 is wrong",
        patched(good, {60: good[60] ^ 1}),
    )
    reject(
        "preamble-flipped", "P-3", "checksum",
        "A bit that readers ignore has changed without the checksum", patched(good, {19: 0x80}),
    )
    for major, minor in ((0, 0), (0, 2), (0, 0x101), (1, 1), (0x100, 1)):
        reject(
            f"version-{major}.{minor}", "P-4", "version", f"Version {major}.{minor}",
            small().pack(major=major, minor=minor),
        )
    for bit in (0, 8, 31):
        reject(
            f"feature-{bit}", "P-5", "feature", f"Bit {bit} of required_features is set",
            small().pack(required_features=1 << bit),
        )
    for place in (0, 7):
        reject(
            f"reserved-{place}", "P-6", "padding", f"Byte {place} of reserved is not zero",
            small().pack(reserved=patched(bytes(8), {place: 1})),
        )
    reject("cut-1", "P-7", "truncated", "The last byte of the file is missing", good[:-1])
    reject("cut-64", "P-7", "truncated", "Nothing but the preamble is there", good[:64])
    reject("longer-1", "P-7", "trailing", "One more byte than file_length", good + b"\0")
    reject("longer-64", "P-7", "trailing", "64 more bytes than file_length", good + bytes(64))
    reject(
        "file-length-greater", "P-7", "truncated",
        "file_length is beyond its limit, and so beyond the file", small().pack(file_length=2**53),
    )
    reject(
        "file-length-0", "P-7", "trailing", "file_length is 0, less than a file can have",
        small().pack(file_length=0),
    )
    for length in (0, 1):
        reject(
            f"index-length-least-{length}", "P-8 L-1", "limit",
            f"index_length is {length}: the least is 2", pack(b"{}"[:length], []),
        )
    reject(
        "index-length-2", "P-8 J-4", "malformed", "index_length is 2, the least; the text is {}",
        pack(b"{}", []),
    )
    reject(
        "index-length-most", "P-8 L-1 N-3", "limit", "index_length is 2^28 + 1",
        small().pack(index_length=2**28 + 1),
    )
    reject(
        "index-length-in-limit", "P-8 N-3", "malformed",
        "index_length is 2^28, within the limit but not within the file",
        small().pack(index_length=2**28),
    )
    reject(
        "extent-count-most", "P-8 L-1 N-3", "limit", "extent_count is 2^24 + 1",
        small().pack(extent_count=2**24 + 1),
    )
    reject(
        "extent-count-in-limit", "P-8 N-3", "malformed",
        "extent_count is 2^24, within the limit but not within the file",
        small().pack(extent_count=2**24),
    )
    reject(
        "extent-count-less", "P-8", "malformed", "extent_count is 0, but there is one",
        small().pack(extent_count=0),
    )
    reject(
        "index-length-8-less", "P-8", "malformed",
        "index_length is 8 too small: the parts do not end at file_length",
        small().pack(index_length=len(canonical(small().index)) - 8),
    )
    reject("index-offset-0", "P-8", "malformed", "index_offset is 0", small().pack(index_offset=0))
    reject(
        "index-offset-72", "P-8 F-1", "malformed",
        "The index begins at byte 72, no multiple of 64, after 8 zero bytes",
        Content().pack(hole=8),
    )
    reject(
        "index-offset-overflow", "N-2", "limit",
        "index_offset is 2^64 - 64: the sum of P-8 would wrap around",
        small().pack(index_offset=2**64 - 64),
    )
    reject(
        "index-offset-overflow-odd", "N-2", "limit",
        "index_offset is 2^63 + 1: no multiple of 64, but first of all too great",
        small().pack(index_offset=2**63 + 1),
    )
    reject(
        "after-the-table", "F-3 P-8", "malformed",
        "16 zero bytes after the extent table, within file_length",
        small().pack(file_length=len(good) + 16) + bytes(16),
    )
    reject("index-crc", "P-9", "checksum", "index_crc32 is wrong", small().pack(index_crc32=0))
    for place, what in ((128, "the first byte of the JSON text"), (-16, "the extent table")):
        data = patched(good, {place: good[place] ^ 1})
        description = f"A bit of {what} has changed without the checksum"
        reject(
            f"index-flipped{'-table' if place < 0 else ''}", "P-9", "checksum", description, data,
        )

    # Two defects each: the order of section 2.1 decides.
    for name, needed, code, fields, tail in (
        ("crc-version", "P-3", "checksum", {"preamble_crc32": 0, "major": 9}, b""),
        ("version-feature", "P-4", "version", {"major": 9, "required_features": 1}, b""),
        (
            "feature-reserved", "P-5", "feature", {"required_features": 1, "reserved": b"\1" * 8},
            b"",
        ),
        ("reserved-trailing", "P-6", "padding", {"reserved": b"\1" * 8}, b"\0"),
        ("trailing-limit", "P-7", "trailing", {"index_length": 1}, b"\0"),
        ("limit-crc", "P-8", "limit", {"index_length": 1, "index_crc32": 0}, b""),
        ("malformed-crc", "P-8", "malformed", {"extent_count": 0, "index_crc32": 0}, b""),
    ):
        description = f"Two defects, {name.replace('-', ' and ')}: the first is reported"
        reject(f"order-{name}", f"{needed} C-4", code, description, small().pack(**fields) + tail)

    # 2.2 and the padding
    for name, place, what in (
        ("first", 64 + 3, "The first byte after an extent"),
        ("last", 127, "The last byte before the index"),
    ):
        data = small().pack(patches={place: 1})
        reject(f"gap-{name}", "F-2 C-3", "padding*", f"{what} is not zero", data)
    content = mixed()
    data = content.pack(patches={64 + 2 + 20: 1})
    reject("gap-between", "F-2 C-3", "padding*", "A byte between two extents is not zero", data)
    content = small()
    while len(canonical(content.index)) % 8 != 1:
        content.index["generator"] += "."
    for name, place in (("first", -16 - 7), ("last", -16 - 1)):
        reject(
            f"index-gap-{name}", "F-2 C-1", "padding",
            f"The {name} byte between the JSON text and the extent table is not zero",
            content.pack(patches={place: 1}),
        )
    reject(
        "extent-length-overflow", "N-2 F-4", "limit",
        "An extent's length is 2^64 - 1: its end would wrap around",
        small().pack(records={0: {"length": 2**64 - 1}}),
    )
    for name, length in (("greater", 65), ("huge", 2**62), ("less", 0)):
        reject(
            f"extent-length-{name}", "F-1 F-4 N-3", "malformed",
            f"The extent's length is {length} and leads elsewhere than to the index",
            small().pack(records={0: {"length": length}}),
        )
    reject(
        "hole", "F-1 F-4", "malformed", "64 zero bytes that belong to nothing before the index",
        small().pack(hole=64),
    )
    reject(
        "hole-empty", "F-1 F-4", "malformed", "No extents, but the index begins at byte 128",
        Content().pack(hole=64),
    )
    content = small()
    content.extents.append(b"abc")
    reject("extent-unowned", "F-5", "malformed", "An extent that nothing owns", content)
    content = small()
    content.extents.insert(0, b"abc")
    content.index["tensors"][0]["extent"] = 1
    reject("extent-unowned-first", "F-5", "malformed", "Extent 0 is one that nothing owns", content)
    content = small()
    content.tensor("b", "U8", [3], b"abc", stored=[])
    content.index["tensors"][1]["extent"] = 0
    reject("extent-shared", "F-5", "malformed", "An extent that two tensors own", content)
    content = mixed()
    content.index["attachments"][1]["extent"] = 0
    content.index["attachments"][1]["bytes"] = 2
    del content.extents[1]
    for entry in content.index["dictionaries"] + content.index["tensors"]:
        entry["extent"] -= 1
    reject("extent-shared-attached", "F-5", "malformed", "One that two attachments own", content)
    content = Content()
    content.tensor("a", "U8", [2, 1], b"a", b"b", stack=True)
    content.tensor("b", "U8", [1], b"b", stored=[])
    content.index["tensors"][1]["extent"] = 1
    reject("extent-shared-stack", "F-5", "malformed", "A stack's extent is a tensor's too", content)
    for name, part, number in (
        ("tensor", "tensors", 5),
        ("dictionary", "dictionaries", 2**53 - 1),
        ("attachment", "attachments", 5),
    ):
        content = mixed()
        content.index[part][-1]["extent"] = number
        description = f"The extent of the last {name} is {number} of 5"
        reject(f"extent-beyond-{name}", "F-5", "malformed", description, content)
    content = Content()
    content.tensor("a", "U8", [3, 1], b"a", b"b", stack=True)
    reject("stack-beyond", "F-5 T-1", "malformed", "A stack of three experts, two extents", content)
    content = Content()
    content.tensor("a", "U8", [2**40, 1], b"a", b"b", stack=True)
    reject(
        "stack-far-beyond", "F-5 T-1 N-3", "malformed", "A stack of 2^40 experts, two extents",
        content,
    )
    content = Content()
    content.tensor("a", "U8", [1, 1], b"a", b"b", stack=True)
    reject("stack-short", "F-5 T-1", "malformed", "A stack of one expert, two extents", content)
    for name, number in (("attachment", 0), ("dictionary", 2), ("raw", 3), ("ternary", 4)):
        reject(
            f"extent-crc-{name}", "F-6 C-2", "checksum*",
            f"The stored checksum of the extent of the {name} is wrong",
            mixed().pack(records={number: {"crc32": 0}}),
        )
    content = Content()
    content.tensor("a", "U8", [2, 1], b"a", b"b", stack=True)
    reject(
        "extent-crc-expert", "F-6 C-2", "checksum*",
        "The stored checksum of a stack's second expert is wrong",
        content.pack(records={1: {"crc32": 0}}),
    )
    for name, value in (("first", 1), ("last", 1 << 31)):
        reject(
            f"record-zero-{name}", "F-7", "padding", f"The {name} bit of a record's zero is set",
            small().pack(records={0: {"zero": value}}),
        )


# -- Section 3 -------------------------------------------------------------------------------------


def section_3() -> None:
    for name, old, new, what in (
        ("newline", '"tensors"', '\n"tensors"', "A line feed between tokens"),
        ("control", "vectors", "vec\ttors", "A tab within a string"),
        ("delete", "vectors", "vec\x7ftors", "Byte 0x7F within a string"),
        ("utf8", "vectors", "vecteurs é", "UTF-8 within a string"),
        ("escape", "vectors", "\\u0076ectors", "An escape within a string"),
        ("escape-slash", "vectors", "vectors\\/", "Another escape"),
        ("space-colon", '"generator":', '"generator": ', "A space after a colon"),
        ("space-comma", ',"tensors"', ', "tensors"', "A space after a comma"),
        ("space-array", "[3]", "[3 ]", "A space within an array"),
    ):
        data = with_text(small(), old, new)
        reject(f"json-{name}", "J-1", "malformed", what, data)
    text = canonical(small().index)
    for name, other, what in (
        ("space-before", b" " + text, "A space before the JSON text"),
        ("space-after", text + b" ", "A space after the JSON text"),
        ("bom", b"\xef\xbb\xbf" + text, "A byte order mark before the JSON text"),
        ("zero-after", text + b"\0", "A zero byte after the JSON text, within index_length"),
    ):
        reject(f"json-{name}", "J-1", "malformed", what, pack(other, [b"abc"]))

    for name, old, new, what in (
        ("null", '"qmoe vectors"', "null", "null instead of a string"),
        ("fraction", '"extent":0', '"extent":0.0', "A number with a fraction"),
        ("exponent", '"extent":0', '"extent":0e0', "A number with an exponent"),
        ("negative", '"extent":0', '"extent":-1', "A negative number"),
        ("minus-zero", '"extent":0', '"extent":-0', "Minus zero"),
        ("plus", '"extent":0', '"extent":+0', "A plus sign"),
        ("leading-zero", "[3]", "[03]", "A leading zero"),
        ("nan", '"extent":0', '"extent":NaN', "NaN, which is no JSON"),
        ("hexadecimal", "[3]", "[0x3]", "A hexadecimal number"),
        ("true-capital", '"stack":false', '"stack":False', "False instead of false"),
        ("comma-array", "[3]", "[3,]", "A comma before the end of an array"),
        ("comma-array-first", "[3]", "[,3]", "A comma at the beginning of an array"),
        (
            "comma-object", '"stack":false}', '"stack":false,}',
            "A comma before the end of an object",
        ),
        ("comma-missing", '"generator":"qmoe vectors",', '"generator":"qmoe vectors"', "No comma"),
        ("colon-missing", '"generator":', '"generator"', "A colon is missing"),
        ("apostrophes", '"qmoe vectors"', "'qmoe vectors'", "Apostrophes around a string"),
        ("empty-value", '"extent":0', '"extent":', "A value is missing"),
    ):
        reject(f"json-{name}", "J-2", "malformed", what, with_text(small(), old, new))
    for name, other, what in (
        ("unfinished", text[:-1], "The last bracket is missing"),
        ("unfinished-string", text[: text.index(b"vectors")], "The text ends within a string"),
        ("twice", text + text, "The text is there twice"),
        ("bracket-after", text + b"}", "A bracket too many"),
    ):
        reject(f"json-{name}", "J-2", "malformed", what, pack(other, [b"abc"]))
    reject(
        "json-number-most", "J-2 T-4", "unsupported*",
        "The greatest number, 2^53 - 1, as a key of an unknown encoding: the file can be opened",
        unknown(x=2**53 - 1),
    )
    for number in (2**53, 2**64, 10**400):
        digits = len(str(number))
        description = f"A number of {digits} digits, beyond 2^53 - 1"
        reject(f"json-number-{digits}", "J-2", "malformed", description, unknown(x=number))

    reversed_text = json.dumps(
        dict(sorted(small().index.items(), reverse=True)), separators=(",", ":")
    ).encode()
    for name, other, what in (
        ("order", reversed_text, "The keys of the top-level object are in descending order"),
        (
            "order-tensor",
            text.replace(b'"dtype":"U8","encoding":"raw"', b'"encoding":"raw","dtype":"U8"'),
            "Two keys of a tensor are exchanged",
        ),
        (
            "key-twice", text.replace(b'"stack":false', b'"stack":false,"stack":false'),
            "A key of a tensor is there twice, with the same value",
        ),
        (
            "key-twice-top", text.replace(b'"tensors"', b'"tensors":[],"tensors"'),
            "A key of the top-level object is there twice",
        ),
    ):
        reject(f"json-{name}", "J-3", "malformed", what, pack(other, [b"abc"]))
    nested = canonical(unknown(x={}).index).replace(b'"x":{}', b'"x":{"b":0,"a":0}')
    what = "Keys in descending order within a key of an unknown encoding"
    reject("json-order-unknown", "J-3", "malformed", what, pack(nested, [b"abc"]))

    section_3_kinds()

    content = Content()
    for name in ("!", "A", "Z", "a", "a.10", "a.2", "a.2.0", "~"):
        content.tensor(name, "U8", [1], name[:1].encode())
    accept("name-order", "J-5", "Names in the order of their bytes", content)
    for name, (first, second), code in (
        ("twice", ("a", "a"), "duplicate"),
        ("order", ("b", "a"), "malformed"),
        ("order-number", ("a.2", "a.10"), "malformed"),
        ("order-case", ("a", "B"), "malformed"),
    ):
        content = Content()
        content.tensor(first, "U8", [1], b"1")
        content.tensor(second, "U8", [1], b"2")
        reject(f"tensor-{name}", "J-5", code, f"Tensors {first}, {second} in this order", content)
    for name, (first, second), code in (
        ("twice", ("a", "a"), "duplicate"),
        ("order", ("b", "a"), "malformed"),
    ):
        content = Content()
        content.attach(first, b"1")
        content.attach(second, b"2")
        what = f"Attachments {first}, {second} in this order"
        reject(f"attachment-{name}", "J-5", code, what, content)
    content = Content()
    content.attach("a", b"1")
    content.tensor("a", "U8", [1], b"1")
    accept("name-shared", "J-5", "A tensor and an attachment of the same name", content)

    content = Content()
    content.tensor("n" * 512, "U8", [1], b"1")
    content.attach("-" * 512, b"1")
    accept("name-512", "J-6", "Names of 512 bytes, the most", content)
    content = Content()
    for name in ("-", "0", "A.B", "_.", "a..b", "z-"):
        content.attach(name, name.encode())
    content.tensor("../odd/{}/name~'", "U8", [1], b"1")
    accept("name-odd", "J-6", "Odd names that are allowed", content)
    for kind, name, value in (
        ("tensor", "empty", ""),
        ("tensor", "513", "n" * 513),
        ("tensor", "space", "a b"),
        ("attachment", "empty", ""),
        ("attachment", "513", "n" * 513),
        ("attachment", "space", "a b"),
        ("attachment", "slash", "a/b"),
        ("attachment", "parent", "../a"),
        ("attachment", "dot", ".a"),
        ("attachment", "tilde", "~a"),
        ("attachment", "colon", "c:a"),
    ):
        content = Content()
        if kind == "tensor":
            content.tensor(value, "U8", [1], b"1")
        else:
            content.attach(value, b"1")
        shown = repr(value) if len(value) < 10 else f"of {len(value)} bytes"
        what = f"The name of the {kind} is {shown}"
        reject(f"{kind}-name-{name}", "J-6", "malformed", what, content)

    # 3.1
    content = Content()
    text_file = b"the quick brown fox jumps over the lazy dog; " * 8
    content.attach("a.txt", b"raw")
    content.attach("b.txt", text_file, COMPRESSED_TEXT, "zstd")
    content.attach("c.txt", b"")
    content.attach("d.txt", b"", frame(b""), "zstd")
    accept(
        "attachments", "A-2 Z-1 J-6", "Attachments, raw and compressed, two of them empty", content,
    )
    for size in (3, 5):
        content = mixed()
        content.index["attachments"][1]["bytes"] = size
        what = f"A raw attachment of 4 bytes is said to have {size}"
        reject(f"attachment-bytes-{size}", "A-2", "malformed", what, content)
    content = mixed()
    content.index["attachments"][1]["encoding"] = "future"
    what = "An attachment of an encoding that no reader knows"
    reject("attachment-unknown", "T-4", "unsupported*", what, content)
    content = Content()
    content.attach("a", b"text", frame(b"texts"), "zstd")
    what = "A compressed attachment is longer than it is said to be"
    reject("attachment-zstd-bytes", "Z-1", "malformed*", what, content)

    # 3.2
    keys: list[tuple[str, Any, str]] = [
        ("width", 7, "limit"),
        ("width", 17, "limit"),
        ("signs", "none", "malformed"),
        ("max_length", 0, "limit"),
        ("max_length", 256, "limit"),
        ("max_nonzeros", 17, "limit"),
    ]
    for key, value, code in keys:
        content = Content()
        content.dictionary(TINY)
        content.index["dictionaries"][0][key] = value
        what = f"A dictionary's {key} is {value}"
        reject(f"dictionary-{key}-{value}", "D-1 L-1", code, what, content)

    # 3.3
    content = Content()
    content.tensor("a", "I32", [], struct.pack("<i", -2))
    content.tensor("b", "F16", [0], b"")
    content.tensor("c", "F64", [3, 0, 2], b"")
    content.tensor("d", "BF16", [1] * 8, b"\x80\x3f")
    content.tensor("e", "U8", [], b"\0", stored=[frame(b"\0")], encoding="zstd")
    content.tensor("f", "U32", [0, 7], b"", stored=[frame(b"")], encoding="zstd")
    accept("shapes", "R-1 T-1 T-3", "No dimension, eight of them, zero elements", content)
    content = Content()
    parts = [bytes([i] * 6) for i in range(3)]
    content.tensor("a.{}", "U16", [3, 3], *parts, stack=True, members="a.{}.weight")
    stored = [frame(shuffled(part, 2)) for part in parts]
    content.tensor("b", "U16", [3, 3], *parts, stored=stored, encoding="zstd", stack=True)
    content.tensor("c", "F32", [0, 5], stack=True)
    content.tensor("d", "U8", [4], b"1", b"2", b"3", b"4", stack=True, members="{}")
    accept("stacks", "T-1 T-2 Z-4", "Stacks: raw, compressed, without experts, of numbers", content)
    content = Content()
    content.tensor("a", "U8", [], b"1", stack=True)
    reject("stack-without-dimension", "T-1", "malformed", "A stack of shape []", content)
    content = small()
    content.tensor("b", "U8", [0, 5], stack=True)
    content.index["tensors"][1]["extent"] = 1
    what = "The extent of a stack without experts is 1, not 0"
    reject("stack-empty-extent", "T-1", "malformed", what, content)
    for name, stack, members in (
        ("single", False, "a.{}"),
        ("none", True, "a.weight"),
        ("twice", True, "a.{}.{}"),
        ("open", True, "a.{0}"),
    ):
        content = Content()
        content.tensor("a", "U8", [1, 1], b"1", stack=stack, members=members)
        what = f"members is {members} of {'a stack' if stack else 'a tensor that is no stack'}"
        reject(f"members-{name}", "T-2", "malformed", what, content)
    content = Content()
    content.tensor("0", "U8", [1, 1], b"0", stack=True, members="{}")
    content.tensor("1", "U8", [1, 1], b"1", stack=True, members="{}")
    content.tensor("a", "U8", [1, 1], b"a", stack=True, members=f"a {'b' * 600}{{}}{{")
    what = "members with a space, of more than 512 bytes, and twice of the same names"
    accept("members-odd", "T-2", what, content)
    content = Content()
    content.tensor("a", "F16", [2, 3], bytes(range(12)))
    content.tensor("b", "F16", [2, 3], bytes(range(12)), encoding="zstd",
                   stored=[frame(shuffled(bytes(range(12)), 2))])
    accept("row-major", "T-3 Z-4", "The same 2 x 3 numbers, raw and shuffled", content)

    content = Content()
    content.tensor("a", "BOOL", [4], b"\x00\x01\x02\xff")
    accept("bool-bytes", "T-3", "Bytes of BOOL other than 0 and 1", content)

    what = "An encoding that no reader knows, with keys of its own: the file can be opened"
    content = unknown(bits=4, nested={"a": [1, {"b": True}]})
    reject("encoding-unknown", "T-4 J-4", "unsupported*", what, content)
    for name, encoding in (("int-group", "int-group"), ("empty", "")):
        content = small()
        content.index["tensors"][0]["encoding"] = encoding
        what = f"The encoding is {encoding!r}"
        reject(f"encoding-{name}", "T-4 T-5", "unsupported*", what, content)
    content = small()
    content.tensor("b", "U8", [0, 5], encoding="future", stack=True, bits=4)
    content.tensor("c", "F4", [0, 5], stack=True)
    content.tensor("d", "U8", [0, 5], encoding="int-group", stack=True)
    what = "What no reader knows, in stacks without experts only: there is nothing to read"
    accept("unknown-no-experts", "T-4 T-5 T-1 J-4", what, content)
    for encoding in ("raw", "zstd"):
        content = Content()
        data = b"abc" if encoding == "raw" else frame(b"abc")
        content.tensor("a", "F4", [3], b"abc", stored=[data], encoding=encoding)
        what = f"A {encoding} tensor of an element type that no reader knows"
        reject(f"dtype-unknown-{encoding}", "T-4", "unsupported*", what, content)
    content = ternary(Matrix([[1]], [ONE], symmetric=True), TINY)
    content.index["tensors"][0]["dtype"] = "F8_E8M0"
    what = "A ternary tensor of an element type that no reader knows"
    reject("dtype-unknown-ternary", "T-4 E-3", "unsupported*", what, content)

    section_9()


def section_3_kinds() -> None:
    """[J-4]: each key of each kind of object missing, and of another kind; one key too many."""
    wrong: dict[type, list[Any]] = {
        bool: [0, "false"],
        int: [True, "1"],
        str: [1, ["raw"]],
        list: [{}, "x"],
    }
    common = set(small().index["tensors"][0])
    places: dict[str, Callable[[Any], dict[str, Any]]] = {
        "top": lambda index: index,
        "attachment": lambda index: index["attachments"][0],
        "dictionary": lambda index: index["dictionaries"][0],
        "tensor": lambda index: index["tensors"][0],
        "ternary": lambda index: index["tensors"][1],
    }
    for name, find in places.items():

        def with_key(
            id: str, what: str, key: str, value: Any = None, find: Callable[..., Any] = find
        ) -> None:
            content = mixed()
            place = find(content.index)
            place.pop(key, None)
            if value is not None:
                place[key] = value
            reject(id, "J-4", "malformed", what, content)

        keys = find(mixed().index)
        for key in sorted(set(keys) - (common if name == "ternary" else set())):
            with_key(f"key-{name}-{key}-missing", f"{name}: the key {key} is missing", key)
            for number, value in enumerate(wrong[type(keys[key])]):
                what = f"{name}: {key} is {json.dumps(value)}"
                with_key(f"key-{name}-{key}-kind-{number}", what, key, value)
        with_key(f"key-{name}-more", f"{name}: there is a key zzz", "zzz", 0)
    for key in sorted(common - {"encoding"}):
        content = unknown()
        del content.index["tensors"][0][key]
        what = f"A tensor of an unknown encoding without the common key {key}"
        reject(f"key-unknown-{key}-missing", "J-4", "malformed", what, content)
    for name, make, key, value, what in (
        ("unknown-kind", unknown, "stack", 0, "A common key of another kind, unknown encoding"),
        ("shape-true", small, "shape", [True], "An item of shape is true"),
        ("shape-string", small, "shape", ["3"], "An item of shape is a string"),
        ("shape-array", small, "shape", [[3]], "An item of shape is an array"),
        ("raw-width", small, "width", 8, "A raw tensor with a key of a ternary one"),
    ):
        content = make()
        content.index["tensors"][0][key] = value
        reject(f"key-{name}", "J-4", "malformed", what, content)
    for name, text in (("array", b"[]"), ("string", b'""'), ("number", b"10")):
        what = f"The JSON text is {text.decode()}, no object"
        reject(f"key-top-is-{name}", "J-4", "malformed", what, pack(text, []))
    for part in ("attachments", "dictionaries", "tensors"):
        content = Content()
        content.index[part] = [0]
        what = f"An item of {part} is a number"
        reject(f"key-{part}-item", "J-4", "malformed", what, content)


# -- Section 9: limits of the index, from both sides --------------------------------------------


def section_9() -> None:
    def nested(depth: int) -> Content:  # the key x is at depth 3
        value: list[Any] = []
        for _ in range(depth - 4):
            value = [value]
        return unknown(x=value)

    what = "Arrays and objects nested {} deep, in a key of an unknown encoding"
    reject("limit-nesting-8", "L-1 T-4", "unsupported*", what.format(8), nested(8))
    reject("limit-nesting-9", "L-1", "limit", what.format(9), nested(9))
    reject("limit-nesting-500", "L-1 N-3", "limit", what.format(500), nested(500))
    content = unknown()
    content.index["tensors"][0]["x"] = {"a": {"a": {"a": {"a": {"a": {}}}}}}
    reject("limit-nesting-objects", "L-1", "limit", what.format(9), content)

    def zero_size(shape: Sequence[int], dtype: str = "U8") -> Content:
        content = Content()
        content.tensor("a", dtype, shape, b"")
        return content

    accept("limit-dimensions-8", "L-1", "Eight dimensions", zero_size([0] * 8))
    reject("limit-dimensions-9", "L-1", "limit", "Nine dimensions", zero_size([0] * 9))
    accept("limit-dimension", "L-1", "A dimension of 2^40", zero_size([2**40, 0]))
    what = "A dimension of 2^40 + 1"
    reject("limit-dimension-more", "L-1", "limit", what, zero_size([2**40 + 1, 0]))
    # 2^53 - 1 = 6361 x 69431 x 20394401; the 0 makes a tensor of that many elements empty.
    most = [6361, 69431, 20394401, 0]
    accept("limit-size", "L-1", "Dimensions other than 0 multiply to 2^53 - 1", zero_size(most))
    what = "Dimensions other than 0 multiply to 2^53"
    reject("limit-size-more", "L-1", "limit", what, zero_size([2**27, 2**26, 0]))
    what = "2^50 elements of 8 bytes"
    reject("limit-size-bytes", "L-1", "limit", what, zero_size([2**40, 2**10], "F64"))
    what = "Seven dimensions of 2^40, whose product wraps around in 64 bits"
    reject("limit-size-overflow", "L-1 N-2", "limit", what, zero_size([2**40] * 7 + [0]))
    what = "An unknown element type counts as one byte: {}"
    reject(
        "limit-size-unknown", "L-1 T-4", "unsupported*", what.format("2^53 - 1"),
        zero_size(most, "F4"),
    )
    content = zero_size([2**27, 2**26, 0], "F4")
    reject("limit-size-unknown-more", "L-1", "limit", what.format("2^53"), content)

    def empty(shape: Sequence[int], **keys: int) -> Content:
        content = Content()
        content.dictionary(TINY)
        stack = len(shape) == 3
        matrices = [] if stack else [Matrix([], [], columns=shape[1])]
        content.ternary("w", "F32", *matrices, shape=shape, stack=stack).update(keys)
        return content

    for key, value in (("width", 7), ("width", 17), ("group_size", 2**31)):
        what = f"A ternary tensor's {key} is {value}"
        content = empty([0, 1], **{key: value})
        reject(f"limit-{key}-{value}", "L-1", "limit", what, content)
    accept(
        "limit-group-size", "L-1 E-2", "group_size is 2^31 - 1",
        empty([0, 1], group_size=2**31 - 1),
    )
    accept(
        "limit-columns", "L-1 N-3", "A matrix of 0 rows, 2^31 - 1 columns", empty([0, 2**31 - 1]),
    )
    reject("limit-columns-more", "L-1", "limit", "0 rows, 2^31 columns", empty([0, 2**31]))
    accept("limit-rows", "L-1", "0 experts of 2^31 - 1 rows", empty([0, 2**31 - 1, 0]))
    reject("limit-rows-more", "L-1", "limit", "0 experts of 2^31 rows", empty([0, 2**31, 0]))


# -- Section 8 -------------------------------------------------------------------------------------


def section_8() -> None:
    def shard(first: str, second: str, attached: str | None = None) -> Content:
        content = Content()
        if attached:
            content.attach(attached, b"{}")
        content.dictionary(TINY)
        content.tensor(first, "U8", [1], b"1")
        content.ternary(second, "F32", Matrix([[1, 0, -1]], [ONE], symmetric=True))
        return content

    def entry(name: str, data: bytes, **keys: Any) -> dict[str, Any]:
        crc32 = int.from_bytes(data[60:64], "little")
        return {"bytes": len(data), "file": name, "preamble_crc32": crc32} | keys

    def index(*entries: dict[str, Any], **keys: Any) -> bytes:
        return canonical({"format": "qmoe-shards", "shards": entries, "version": [0, 1]} | keys)

    def put(
        name: str, needed: str, outcome: str, what: str, text: bytes, shards: Mapping[str, bytes],
        contents: dict[str, Any] | None = None,
    ) -> None:
        files = {f"shards-{name}/model.qmoe.json": text}
        files |= {f"shards-{name}/{file}": data for file, data in shards.items()}
        stage = "verify" if outcome.endswith("*") else "open"
        outcome = outcome.rstrip("*")
        result = outcome if outcome == "accept" else f"reject:{outcome}"
        stage = "" if outcome == "accept" else stage
        add(f"shards-{name}", needed, what, files, result, stage, contents)

    one, two = shard("a", "d", "config.json"), shard("b", "c")
    names = ("model-1-of-2.qmoe", "model-2-of-2.qmoe")
    data = dict(zip(names, (one.pack(), two.pack()), strict=True))
    entries = [entry(name, data[name]) for name in names]
    contents = {
        part: sorted(one.expected[part] + two.expected[part], key=lambda item: str(item["name"]))
        for part in ("attachments", "tensors")
    }
    text = index(*entries)
    put("two", "S-1 S-2 S-3", "accept", "A set of two shards", text, data, contents)
    text = index(entries[0])
    put(
        "one", "S-1", "accept", "A set of one shard", text, {names[0]: data[names[0]]},
        one.expected,
    )
    put("none", "S-1", "accept", "A set of no shards", index(), {}, Content().expected)
    text = index(*reversed(entries))
    put("reversed", "S-1", "accept", "Shards may be in any order", text, data, contents)

    first = {names[0]: data[names[0]]}
    e = entries[0]
    for name, needed, code, what, text in (
        ("space", "S-1 J-1", "malformed", "A space in the text", index(e).replace(b',"v', b', "v')),
        ("newline", "S-1 J-1", "malformed", "A line feed after the text", index(e) + b"\n"),
        ("after", "S-1 J-2", "malformed", "Something after the text", index(e) + b"{}"),
        ("fraction", "S-1 J-2", "malformed", "A version of 0.1",
         index(e).replace(b"[0,1]", b"0.1")),
        (
            "order", "S-1 J-3", "malformed", "Keys of the text not in order",
            index(e).replace(b'"shards"', b'"x":0,"shards"'),
        ),
        ("key-more", "S-1 J-4", "malformed", "A key more", index(e, x=0)),
        ("key-kind", "S-1 J-4", "malformed", "shards is an object", index(shards={})),
        ("key-missing", "S-1 J-4", "malformed", "No version",
         index(e).replace(b',"version":[0,1]', b"")),
        ("shard-more", "S-1 J-4", "malformed", "A shard with a key more", index(e | {"x": 0})),
        ("shard-kind", "S-1 J-4", "malformed", "bytes is a string", index(e | {"bytes": "5"})),
        (
            "shard-missing", "S-1 J-4", "malformed", "A shard without bytes",
            index({key: value for key, value in e.items() if key != "bytes"}),
        ),
        (
            "nesting", "S-1 L-1", "limit", "The version nested 9 deep",
            index(e, version=[[[[[[[[]]]]]]]]),
        ),
        ("version-short", "S-1 J-4", "malformed", "A version of one number", index(e, version=[0])),
        ("version-long", "S-1 J-4", "malformed", "Three numbers", index(e, version=[0, 1, 0])),
        ("version-kind", "S-1 J-4", "malformed", "A version of true", index(e, version=[0, True])),
        ("version-minor", "S-1 P-4", "version", "Version 0.2", index(e, version=[0, 2])),
        ("version-major", "S-1 P-4", "version", "Version 1.1", index(e, version=[1, 1])),
        ("format", "S-1 P-1", "signature", "Another format's name", index(e, format="qmoe-shard")),
        ("before", "S-1 P-1", "signature", "A space before the text", b" " + index(e)),
        ("path", "S-2 J-6", "malformed", "A shard in another folder", index(e | {"file": "../a"})),
        ("dot", "S-2 J-6", "malformed", "A hidden file", index(e | {"file": ".a"})),
        ("bytes", "S-2", "checksum", "bytes is one too great",
         index(e | {"bytes": e["bytes"] + 1})),
        (
            "crc", "S-2", "checksum", "Another file's preamble_crc32",
            index(e | {"preamble_crc32": entries[1]["preamble_crc32"]}),
        ),
        ("missing", "S-2", "truncated", "The second shard is missing", index(*entries)),
        ("twice", "S-3", "duplicate", "A shard named twice", index(e, e)),
    ):
        put(name, needed, code, what, text, first)
    empty = Content().pack()
    what = "A shard without tensors named twice"
    text = index(entry("a.qmoe", empty), entry("a.qmoe", empty))
    put("twice-empty", "S-3", "duplicate", what, text, {"a.qmoe": empty})
    cut = data[names[0]][:-1]
    text = index(*entries)
    what = "A shard has lost its last byte: its length is not the one named"
    put("cut", "S-2", "checksum", what, text, data | {names[0]: cut})
    for name, length, number, code, what in (
        ("62", 62, 0x4241, "checksum", "the bytes that it has of a preamble_crc32 are named"),
        ("62-zero", 62, 0, "truncated", "its preamble_crc32 counts as 0"),
        ("0-zero", 0, 0, "truncated", "its preamble_crc32 counts as 0"),
    ):
        short = (SIGNATURE + bytes(52) + b"AB")[:length]
        text = index(entry(names[0], short, preamble_crc32=number))
        needed = "S-2" if number else f"S-2 P-{2 if length else 1}"
        what = f"A shard of {length} bytes: {what}"
        put(f"short-{name}", needed, code, what, text, {names[0]: short})
    for name, other, what in (
        ("tensor", shard("b", "d"), "A tensor is in two shards"),
        ("attachment", shard("e", "f", "config.json"), "An attachment is in two shards"),
    ):
        both = dict(zip(names, (one.pack(), other.pack()), strict=True))
        if name == "tensor":
            both = dict(zip(names, (two.pack(), other.pack()), strict=True))
        text = index(*[entry(file, both[file]) for file in names])
        put(f"{name}-twice", "S-3", "duplicate", what, text, both)
    damaged = two.pack(records={1: {"crc32": 0}})
    text = index(entries[0], entry(names[1], damaged))
    what = "An extent of the second shard is damaged"
    put("damaged", "F-6 S-2", "checksum*", what, text, data | {names[1]: damaged})
    newer = two.pack(minor=2)
    text = index(entries[0], entry(names[1], newer))
    what = "The second shard is of version 0.2"
    put("version-shard", "P-4 S-1 C-1", "version", what, text, data | {names[1]: newer})
    other_data = {names[0]: data[names[0]], names[1]: shard("x", "y").pack()}
    text = index(*[entry(file, other_data[file]) for file in names])
    merged = {
        part: sorted(
            one.expected[part] + shard("x", "y").expected[part], key=lambda i: str(i["name"])
        )
        for part in ("attachments", "tensors")
    }
    put(
        "other", "S-3", "accept", "Two shards with dictionaries of their own", text, other_data,
        merged,
    )


# -- Section 12 ------------------------------------------------------------------------------------


def section_12() -> None:
    content = Content()
    content.index["generator"] = "example"
    content.attach("config.json", b'{"experts":2}')
    content.dictionary(PLANE8)
    content.tensor("bias", "F32", [2], struct.pack("<2f", 0.5, -2))
    experts = [
        Matrix([[0, 0, 1, 0, -1, 0], [0, 0, 0, 0, 0, 0]], bf16(-0.25, 0.5, -1, 1)),
        Matrix([[-1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, -1]], bf16(-0.75, 0.125, -2, 3)),
    ]
    content.ternary("experts", "BF16", *experts, members="experts.{}.w")
    what = "The file of SPEC.md section 12: an attachment, a raw tensor, a stack of two experts"
    accept("whole-file", "N-1 F-1 T-1 E-9 D-4 V-1", what, content)
