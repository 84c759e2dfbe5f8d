"""The vectors of SPEC.md sections 3 and 10: the index and its limits."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tools.conformance_vectors.file_builder import Content, canonical, frame, pack, shuffled
from tools.conformance_vectors.int_dict_builder import Matrix
from tools.conformance_vectors.int_group_builder import Groups
from tools.conformance_vectors.samples import (
    BOOK,
    ONE,
    coded,
    mixed,
    small,
    symmetric,
    unknown,
    with_text,
)
from tools.conformance_vectors.vector import Vector, accept, reject

# Made by Zstandard 1.5.7 from "the quick brown fox jumps over the lazy dog; " * 8.
COMPRESSED_TEXT = bytes.fromhex(
    "28b52ffd606800bd0100c40274686520717569636b2062726f776e20666f7820"
    "6a756d7073206f76657220746865206c617a7920646f673b0200345029c01066"
    "19"
)


def changed_text(needed: str, changes: Sequence[tuple[str, str, str, str]]) -> Iterator[Vector]:
    """``changes`` are (name, part of the index's text, what replaces it, description)."""
    for name, old, new, what in changes:
        yield reject(f"json-{name}", needed, "malformed", what, with_text(small(), old, new))


def whole_text(needed: str, texts: Sequence[tuple[str, bytes, str]]) -> Iterator[Vector]:
    """``texts`` are (name, the index's text, description)."""
    for name, text, what in texts:
        yield reject(f"json-{name}", needed, "malformed", what, pack(text, [b"abc"]))


def section_3_json() -> Iterator[Vector]:
    text = canonical(small().index)
    yield from changed_text("J-1", (
        ("newline", '"tensors"', '\n"tensors"', "A line feed between tokens"),
        ("control", "vectors", "vec\ttors", "A tab within a string"),
        ("delete", "vectors", "vec\x7ftors", "Byte 0x7F within a string"),
        ("utf8", "vectors", "vecteurs é", "UTF-8 within a string"),
        ("escape", "vectors", "\\u0076ectors", "An escape within a string"),
        ("escape-slash", "vectors", "vectors\\/", "Another escape"),
        ("space-colon", '"generator":', '"generator": ', "A space after a colon"),
        ("space-comma", ',"tensors"', ', "tensors"', "A space after a comma"),
        ("space-array", "[3]", "[3 ]", "A space within an array"),
    ))
    yield from whole_text("J-1", (
        ("space-before", b" " + text, "A space before the JSON text"),
        ("space-after", text + b" ", "A space after the JSON text"),
        ("bom", b"\xef\xbb\xbf" + text, "A byte order mark before the JSON text"),
        ("zero-after", text + b"\0", "A zero byte after the JSON text, within index_length"),
    ))
    yield from changed_text("J-2", (
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
        ("comma-object", '"transposed":false}', '"transposed":false,}',
         "A comma before the end of an object"),
        ("comma-missing", '"generator":"qmoe vectors",', '"generator":"qmoe vectors"', "No comma"),
        ("colon-missing", '"generator":', '"generator"', "A colon is missing"),
        ("apostrophes", '"qmoe vectors"', "'qmoe vectors'", "Apostrophes around a string"),
        ("empty-value", '"extent":0', '"extent":', "A value is missing"),
    ))
    yield from whole_text("J-2", (
        ("unfinished", text[:-1], "The last bracket is missing"),
        ("unfinished-string", text[: text.index(b"vectors")], "The text ends within a string"),
        ("twice", text + text, "The text is there twice"),
        ("bracket-after", text + b"}", "A bracket too many"),
    ))
    what = "The greatest number, 2^53 - 1, as a key of an unknown encoding: the file can be opened"
    content = unknown(x=2**53 - 1)
    yield reject("json-number-most", "J-2 T-5", "unsupported", what, content, stage="verify")
    what = "Keys of which one begins the other, in order: the file can be opened"
    content = unknown(x={"a": 0, "a b": 0, "a!": 0, "aa": 0, "": 0})
    yield reject("json-key-prefix", "J-3 T-5", "unsupported", what, content, stage="verify")
    what = "An empty generator"
    content = small()
    content.index["generator"] = ""
    yield accept("generator-empty", "J-4", what, content)
    content.index["generator"] = "".join(chr(i) for i in range(0x20, 0x7F) if chr(i) not in '"\\')
    what = "A generator of all characters that are allowed"
    yield accept("generator-characters", "J-1", what, content)
    for number in (2**53, 2**64, 10**400):
        digits = len(str(number))
        what = f"A number of {digits} digits, beyond 2^53 - 1"
        yield reject(f"json-number-{digits}", "J-2", "malformed", what, unknown(x=number))
    backwards = dict(sorted(json.loads(text).items(), reverse=True))
    yield from whole_text("J-3", (
        ("order", json.dumps(backwards, separators=(",", ":")).encode(),
         "The keys of the top-level object are in descending order"),
        ("order-tensor",
         text.replace(b'"dtype":"U8","encoding":"raw"', b'"encoding":"raw","dtype":"U8"'),
         "Two keys of a tensor are exchanged"),
        ("key-twice", text.replace(b'"stack":false', b'"stack":false,"stack":false'),
         "A key of a tensor is there twice, with the same value"),
        ("key-twice-top", text.replace(b'"tensors"', b'"tensors":[],"tensors"'),
         "A key of the top-level object is there twice"),
        ("order-unknown",
         canonical(unknown(x={}).index).replace(b'"x":{}', b'"x":{"b":0,"a":0}'),
         "Keys in descending order within a key of an unknown encoding"),
        ("order-length",
         canonical(unknown(x={}).index).replace(b'"x":{}', b'"x":{"b":0,"aa":0}'),
         "Keys in the order of their lengths"),
        ("order-prefix",
         canonical(unknown(x={}).index).replace(b'"x":{}', b'"x":{"ab":0,"a":0}'),
         "A key that begins the key before it"),
        ("order-quote",
         canonical(unknown(x={}).index).replace(b'"x":{}', b'"x":{"a!":0,"a":0}'),
         "The same with a character below the quotation mark"),
    ))


def section_3_keys() -> Iterator[Vector]:
    """[J-4]: each key of each kind of object missing, and of another kind; one key too many."""
    wrong: dict[type, list[Any]] = {
        bool: [0, "false"], int: [True, "1"], str: [1, ["raw"]], list: [{}, "x"],
    }
    common = set(small().index["tensors"][0])
    places: dict[str, Callable[[Any], dict[str, Any]]] = {
        "top": lambda index: index,
        "attachment": lambda index: index["attachments"][0],
        "dictionary": lambda index: index["dictionaries"][0],
        "tensor": lambda index: index["tensors"][0],
        "int-dict": lambda index: index["tensors"][1],
        "int-group": lambda index: index["tensors"][2],
    }
    for name, find in places.items():
        keys = find(mixed().index)
        for key in sorted(set(keys) - (common if name.startswith("int") else set())):
            content = mixed()
            del find(content.index)[key]
            what = f"{name}: the key {key} is missing"
            yield reject(f"key-{name}-{key}-missing", "J-4", "malformed", what, content)
            for number, value in enumerate(wrong[type(keys[key])]):
                content = mixed()
                find(content.index)[key] = value
                what = f"{name}: {key} is {json.dumps(value)}"
                yield reject(f"key-{name}-{key}-kind-{number}", "J-4", "malformed", what, content)
        content = mixed()
        find(content.index)["zzz"] = 0
        yield reject(f"key-{name}-more", "J-4", "malformed", f"{name}: there is a key zzz", content)
    for key in sorted(common - {"encoding"}):
        content = unknown()
        del content.index["tensors"][0][key]
        what = f"A tensor of an unknown encoding without the common key {key}"
        yield reject(f"key-unknown-{key}-missing", "J-4", "malformed", what, content)
    content = unknown().change(stack=0)
    what = "A common key of another kind, unknown encoding"
    yield reject("key-unknown-kind", "J-4", "malformed", what, content)
    for name, data, what in (
        ("shape-true", small().change(shape=[True]).pack(), "An item of shape is true"),
        ("shape-string", small().change(shape=["3"]).pack(), "An item of shape is a string"),
        ("shape-array", small().change(shape=[[3]]).pack(), "An item of shape is an array"),
        ("raw-symmetric", small().change(symmetric=True).pack(),
         "A raw tensor with a key of int-dict"),
        ("int-dict-bits", coded(symmetric([1])).change(bits=4).pack(),
         "An int-dict tensor with a key of int-group"),
        ("int-dict-empty", Content().int_dict("a", "F32", shape=[0, 1, 1]).change(bits=4).pack(),
         "The same of a stack without experts"),
        ("top-is-array", pack(b"[]", []), "The JSON text is [], no object"),
        ("top-is-string", pack(b'""', []), 'The JSON text is "", no object'),
        ("top-is-number", pack(b"10", []), "The JSON text is 10, no object"),
    ):
        yield reject(f"key-{name}", "J-4", "malformed", what, data)
    for part in ("attachments", "dictionaries", "tensors"):
        content = Content()
        content.index[part] = [0]
        what = f"An item of {part} is a number"
        yield reject(f"key-{part}-item", "J-4", "malformed", what, content)


def named(kind: str, *names: str) -> Content:
    """Tensors or attachments in this order."""
    content = Content()
    for number, name in enumerate(names):
        data = str(number + 1).encode()
        content.tensor(name, "U8", [1], data) if kind == "tensor" else content.attach(name, data)
    return content


def section_3_names() -> Iterator[Vector]:
    content = Content()
    for name in ("!", "A", "Z", "a", "a.10", "a.2", "a.2.0", "~"):
        content.tensor(name, "U8", [1], name[:1].encode())
    yield accept("name-order", "J-5", "Names in the order of their bytes", content)
    for kind, name, first, second, code in (
        ("tensor", "twice", "a", "a", "duplicate"),
        ("tensor", "order", "b", "a", "malformed"),
        ("tensor", "order-number", "a.2", "a.10", "malformed"),
        ("tensor", "order-case", "a", "B", "malformed"),
        ("tensor", "order-length", "b", "aa", "malformed"),
        ("tensor", "order-prefix", "ab", "a", "malformed"),
        ("attachment", "twice", "a", "a", "duplicate"),
        ("attachment", "order", "b", "a", "malformed"),
    ):
        what = f"{kind.capitalize()}s {first}, {second} in this order"
        yield reject(f"{kind}-{name}", "J-5", code, what, named(kind, first, second))
    content = Content().attach("a", b"1").tensor("a", "U8", [1], b"1")
    yield accept("name-shared", "J-5", "A tensor and an attachment of the same name", content)
    content = Content().tensor("n" * 512, "U8", [1], b"1").attach("-" * 255, b"1")
    yield accept("name-512", "J-6", "Names of 512 and 255 bytes, the most", content)
    content = Content()
    for name in ("-", "0", "A.B", "_.", "a..b", "z-"):
        content.attach(name, name.encode())
    content.tensor("!#$%&'()*+,-./:;<=>?@[]^_`{|}~", "U8", [1], b"1")
    content.tensor("../odd/{}/name~'", "U8", [1], b"1")
    yield accept("name-odd", "J-6", "Odd names that are allowed", content)
    for kind, name, value in (
        ("tensor", "empty", ""), ("tensor", "513", "n" * 513), ("tensor", "space", "a b"),
        ("attachment", "empty", ""), ("attachment", "256", "n" * 256),
        ("attachment", "513", "n" * 513),
        ("attachment", "space", "a b"), ("attachment", "parent", "../a"),
        ("attachment", "dot", ".a"), ("attachment", "dot-only", "."),
        *(("attachment", f"{ord(byte):02x}", f"ab{byte}c") for byte in "+,/:@[^`{~"),
        *(("attachment", f"{ord(byte):02x}-last", f"a{byte}") for byte in "/~"),
    ):
        shown = repr(value) if len(value) < 10 else f"of {len(value)} bytes"
        what = f"The name of the {kind} is {shown}"
        yield reject(f"{kind}-name-{name}", "J-6", "malformed", what, named(kind, value))


def section_3_1() -> Iterator[Vector]:
    text = b"the quick brown fox jumps over the lazy dog; " * 8
    content = Content().attach("a.txt", b"raw").attach("b.txt", text, COMPRESSED_TEXT, "zstd")
    content.attach("c.txt", b"").attach("d.txt", b"", frame(b""), "zstd")
    what = "Attachments, raw and compressed, two of them empty"
    yield accept("attachments", "A-1 Z-2 J-6", what, content)
    for size in (3, 5):
        content = mixed().change("attachments", bytes=size)
        what = f"A raw attachment of 4 bytes is said to have {size}"
        yield reject(f"attachment-bytes-{size}", "A-1", "malformed", what, content)
    for encoding in ("future", "int-dict", "int-group", ""):
        content = mixed().change("attachments", encoding=encoding)
        what = f"An attachment of the encoding {encoding!r}, which is none for attachments"
        name = f"attachment-encoding-{encoding or 'empty'}"
        yield reject(name, "T-5", "unsupported", what, content, stage="verify")
    content = mixed().change("attachments", encoding="future", bytes=77)
    what = "An attachment of an unknown encoding, whose bytes are not those of the extent"
    yield reject("attachment-unknown-bytes", "T-5", "unsupported", what, content, stage="verify")
    content = Content().attach("a", b"text", frame(b"texts"), "zstd")
    what = "A compressed attachment is longer than it is said to be"
    yield reject("attachment-zstd-bytes", "Z-2", "malformed", what, content, stage="verify")


def section_3_2() -> Iterator[Vector]:
    for key, value in (
        ("bytes", 0), ("bytes", 2**14 + 1), ("width", 7), ("width", 17),
        ("width", 8 + 2**8), ("width", 8 + 2**32), ("max_length", 0), ("max_length", 256),
        ("max_ones", 17), ("max_ones", 2**53 - 1),
    ):
        for encoding in ("raw", "future"):
            content = Content().dictionary(BOOK)
            content.change("dictionaries", encoding=encoding, **{key: value})
            what = f"A dictionary's {key} is {value}, its encoding {encoding}"
            name = f"dictionary-{key}-{value}{'' if encoding == 'raw' else '-unknown'}"
            if encoding == "raw" or value in (17, 256):
                yield reject(name, "D-1 L-1", "limit", what, content)


def section_3_3_shapes() -> Iterator[Vector]:
    content = Content().tensor("a", "I32", [], struct.pack("<i", -2)).tensor("b", "F16", [0], b"")
    content.tensor("c", "F64", [3, 0, 2], b"").tensor("d", "BF16", [1] * 8, b"\x80\x3f")
    content.tensor("e", "U8", [], b"\0", stored=[frame(b"\0")], encoding="zstd")
    content.tensor("f", "U32", [0, 7], b"", stored=[frame(b"")], encoding="zstd")
    yield accept("shapes", "R-1 T-1 T-4", "No dimension, eight of them, zero elements", content)
    parts = [bytes([i] * 6) for i in range(3)]
    stored = [frame(shuffled(part, 2)) for part in parts]
    content = Content()
    content.tensor("a.{}", "U16", [3, 3], *parts, stack=True, members="a.{}.weight")
    content.tensor("b", "U16", [3, 3], *parts, stored=stored, encoding="zstd", stack=True)
    content.tensor("c", "F32", [0, 5], stack=True)
    content.tensor("d", "U8", [4], b"1", b"2", b"3", b"4", stack=True, members="{}")
    what = "Stacks: raw, compressed, without experts, of numbers"
    yield accept("stacks", "T-1 T-2 Z-1", what, content)
    content = Content().tensor("a", "U8", [], b"1", stack=True)
    yield reject("stack-without-dimension", "T-1", "malformed", "A stack of shape []", content)
    content = small().tensor("b", "U8", [0, 5], stack=True, extent=1)
    what = "The extent of a stack without experts is 1, not 0"
    yield reject("stack-empty-extent", "T-1", "malformed", what, content)
    for name, stack, members in (
        ("single", False, "a.{}"), ("none", True, "a.weight"), ("twice", True, "a.{}.{}"),
        ("open", True, "a.{0}"),
    ):
        content = Content().tensor("a", "U8", [1, 1], b"1", stack=stack, members=members)
        what = f"members is {members} of {'a stack' if stack else 'a tensor that is no stack'}"
        yield reject(f"members-{name}", "T-2", "malformed", what, content)
    content = Content()
    for name, members in (("0", "{}"), ("1", "{}"), ("a", f"a {'b' * 600}{{}}{{")):
        content.tensor(name, "U8", [1, 1], name.encode(), stack=True, members=members)
    what = "members with a space, of more than 512 bytes, and twice of the same names"
    yield accept("members-odd", "T-2", what, content)
    data = bytes(range(12))
    content = Content().tensor("a", "F16", [2, 3], data)
    content.tensor("b", "F16", [2, 3], data, stored=[frame(shuffled(data, 2))], encoding="zstd")
    yield accept("row-major", "T-4 Z-1", "The same 2 x 3 numbers, raw and shuffled", content)
    content = Content().tensor("a", "BOOL", [4], b"\x00\x01\x02\xff")
    yield accept("bool-bytes", "T-4", "Bytes of BOOL other than 0 and 1", content)


def section_3_3_transposed() -> Iterator[Vector]:
    parts = [struct.pack("<6H", *range(6 * i, 6 * i + 6)) for i in range(2)]
    content = Content().dictionary(BOOK)
    content.tensor("a", "U16", [2, 2, 3], *parts, stack=True, transposed=True)
    stored = [frame(shuffled(part, 2)) for part in parts]
    content.tensor("b", "U16", [2, 3, 2], *parts, stored=stored, encoding="zstd", stack=True,
                   members="b.{}.w", transposed=True)
    matrices = [symmetric([1, 0, -1], [0, 0, 1]), symmetric([0, 1, 0], [-1, -1, 0])]
    content.int_dict("c", "BF16", *matrices, transposed=True)
    content.tensor("d", "U16", [2, 1, 2, 3], *parts, stack=True, transposed=True)
    content.tensor("e", "F32", [0, 2, 3], stack=True, transposed=True)
    groups = [Groups([[1, 2, 3], [9, 8, 7]], [ONE, 0x4040], 4), Groups([[4] * 3] * 2, [ONE] * 2, 4)]
    content.int_group("f", "BF16", *groups, transposed=True)
    what = "Stacks whose experts the checkpoint had transposed, in one tensor and in many"
    yield accept("stack-transposed", "T-3 T-1 T-2 T-4", what, content)
    for name, shape, stack, encoding in (
        ("tensor", [2, 1], False, "raw"), ("tensor-3", [2, 1, 1], False, "raw"),
        ("stack-1", [2], True, "raw"), ("stack-2", [2, 1], True, "raw"),
        ("unknown", [2, 1, 1], False, "future"),
    ):
        data = [b"1", b"2"] if stack else [b"12"]
        content = Content().tensor(
            "a", "U8", shape, *data, stack=stack, encoding=encoding, transposed=True)
        kind = "a stack" if stack else "a tensor that is no stack"
        what = f"transposed is true of {kind}, shape {shape}"
        yield reject(f"transposed-{name}", "T-3", "malformed", what, content)


def section_3_3_unknown() -> Iterator[Vector]:
    def unsupported(id: str, needed: str, what: str, content: Content) -> Vector:
        return reject(id, needed, "unsupported", what, content, stage="verify")

    what = "An encoding that no reader knows, with keys of its own: the file can be opened"
    content = unknown(bits=4, nested={"a": [1, {"b": True}]})
    yield unsupported("encoding-unknown", "T-5 J-4", what, content)
    for encoding in ("", "ternary-dict", "Raw", "int-group2"):
        content = small().change(encoding=encoding)
        name = encoding.lower() or "empty"
        yield unsupported(f"encoding-{name}", "T-5", f"The encoding is {encoding!r}", content)
    content = small().tensor("b", "U8", [0, 5], encoding="future", stack=True, bits=4)
    content.tensor("c", "F4", [0, 5], stack=True)
    content.int_dict("d", "F4", shape=[0, 5, 1]).int_group("e", "F4", shape=[0, 5, 1])
    what = "What no reader knows, in stacks without experts only: there is nothing to read"
    yield accept("unknown-no-experts", "T-5 T-1 J-4", what, content)
    for name, content in (("encoding", unknown()), ("dtype", small().change(dtype="F4"))):
        what = f"An unknown {name}, zero elements: there is an extent all the same"
        content.change(shape=[0])
        content.extents[0] = b""
        yield unsupported(f"{name}-unknown-empty", "T-5 T-1", what, content)
    yield unsupported("dtype-empty", "T-5", "The dtype is empty", small().change(dtype=""))
    what = "The dtype is that of another case"
    yield unsupported("dtype-case", "T-5", what, small().change(dtype="u8"))
    for encoding, data in (("raw", b"abc"), ("zstd", frame(b"abc"))):
        content = Content().tensor("a", "F4", [3], b"abc", stored=[data], encoding=encoding)
        what = f"A {encoding} tensor of an element type that no reader knows"
        yield unsupported(f"dtype-unknown-{encoding}", "T-5", what, content)
    content = coded(symmetric([1])).change(dtype="F4")
    what = "An int-dict tensor of an element type that no reader knows"
    yield unsupported("dtype-unknown-int-dict", "T-5 E-2", what, content)
    content = Content().int_group("w", "F32", Groups([[1]], [ONE], 4)).change(dtype="F4")
    what = "An int-group tensor of an element type that no reader knows"
    yield unsupported("dtype-unknown-int-group", "T-5 E-2", what, content)


def section_3_3_unknown_index() -> Iterator[Vector]:
    """What a reader checks of a tensor whose encoding or element type it does not know."""
    for kind, change in (("encoding", {"encoding": "future"}), ("dtype", {"dtype": "F4"})):
        keys: dict[str, Any]
        for name, needed, code, what, keys in (
            ("space", "J-6", "malformed", "has a space in its name", {"name": "a b"}),
            ("long", "J-6", "malformed", "has a name of 513 bytes", {"name": "n" * 513}),
            ("members", "T-2", "malformed", "has members and is no stack", {"members": "a.{}"}),
            ("members-none", "T-2", "malformed", "has no place in its members",
             {"members": "a", "stack": True, "shape": [1, 3]}),
            ("no-dimension", "T-1", "malformed", "is a stack without a dimension",
             {"stack": True, "shape": []}),
            ("transposed", "T-3", "malformed", "is transposed and has two dimensions",
             {"transposed": True, "stack": True, "shape": [1, 3]}),
            ("size", "L-1", "limit", "has 2^53 elements", {"shape": [2**27, 2**26]}),
            ("dimensions", "L-1", "limit", "has nine dimensions", {"shape": [1] * 9}),
            ("dimension", "L-1", "limit", "has a dimension of 2^40 + 1", {"shape": [2**40 + 1]}),
            ("shape-item", "J-4", "malformed", "has a shape with true", {"shape": [True]}),
        ):
            what = f"A tensor of an unknown {kind} {what}"
            name = f"unknown-{kind}-{name}"
            yield reject(name, f"{needed} T-5", code, what, small().change(**change, **keys))
        content = small().tensor("b", "U8", [0, 5], stack=True).change(**change, extent=1)
        what = f"A stack without experts of an unknown {kind}, whose extent is 1, not 0"
        yield reject(f"unknown-{kind}-extent", "T-1 T-5", "malformed", what, content)


def section_10_nesting() -> Iterator[Vector]:
    what = "Arrays and objects nested {} deep, in a key of an unknown encoding"
    values: dict[int, list[Any]] = {4: []}  # by depth: the key itself is at depth 3
    for depth in range(5, 501):
        values[depth] = [values[depth - 1]]
    content = unknown(x=values[8])
    yield reject(
        "limit-nesting-8", "L-1 T-5", "unsupported", what.format(8), content, stage="verify")
    yield reject("limit-nesting-9", "L-1", "limit", what.format(9), unknown(x=values[9]))
    yield reject("limit-nesting-500", "L-1 N-3", "limit", what.format(500), unknown(x=values[500]))
    content = unknown(x={"a": {"a": {"a": {"a": {"a": {}}}}}})
    yield reject("limit-nesting-objects", "L-1", "limit", what.format(9), content)


def section_10_shapes() -> Iterator[Vector]:
    def empty(shape: Sequence[int], dtype: str = "U8") -> Content:
        return Content().tensor("a", dtype, shape, b"")

    def bad(id: str, what: str, content: Content, needed: str = "L-1") -> Vector:
        return reject(f"limit-{id}", needed, "limit", what, content)

    yield accept("limit-dimensions-8", "L-1", "Eight dimensions", empty([0] * 8))
    yield bad("dimensions-9", "Nine dimensions", empty([0] * 9))
    yield accept("limit-dimension", "L-1", "A dimension of 2^40", empty([2**40, 0]))
    yield bad("dimension-more", "A dimension of 2^40 + 1", empty([2**40 + 1, 0]))
    # 2^53 - 1 = 6361 x 69431 x 20394401; the 0 makes a tensor of that many elements empty.
    most = [6361, 69431, 20394401, 0]
    yield accept("limit-size", "L-1", "Dimensions other than 0 multiply to 2^53 - 1", empty(most))
    yield bad("size-more", "Dimensions other than 0 multiply to 2^53", empty([2**27, 2**26, 0]))
    for place in range(3):
        shape = [2**40] * 3
        shape[place] = 0
        what = f"Dimensions multiply to 2^80, but for dimension {place}, which is 0"
        yield bad(f"size-zero-{place}", what, empty(shape))
    content = Content().tensor("a", "U8", [0, 2**40, 2**40], stack=True)
    what = "The dimensions of a stack without experts multiply to 2^80"
    yield bad("size-no-experts", what, content)
    yield bad("size-bytes", "2^50 elements of 8 bytes", empty([2**40, 2**10], "F64"))
    what = "Seven dimensions of 2^40, whose product wraps around in 64 bits"
    yield bad("size-overflow", what, empty([2**40] * 7 + [0]), "L-1 N-2")
    what = "An unknown element type counts as one byte: {}"
    yield reject("limit-size-unknown", "L-1 T-5", "unsupported", what.format("2^53 - 1"),
                 empty(most, "F4"), stage="verify")
    yield bad("size-unknown-more", what.format("2^53"), empty([2**27, 2**26, 0], "F4"))


def section_10_matrices() -> Iterator[Vector]:
    def empty(encoding: str, shape: Sequence[int]) -> Content:
        """A matrix without rows, or a stack without experts."""
        content, count = Content(), 3 - len(shape)
        if encoding == "int-group":
            return content.int_group("w", "F32", *[Groups([], [], 4)] * count, shape=shape)
        content.dictionary(BOOK)
        return content.int_dict("w", "F32", *[Matrix([], [])] * count, shape=shape)

    for encoding in ("int-dict", "int-group"):
        for name, needed, outcome, what, shape in (
            ("columns", "L-1 N-3", "accept", "0 rows, 2^31 - 1 columns", [0, 2**31 - 1]),
            ("columns-more", "L-1", "limit", "0 rows, 2^31 columns", [0, 2**31]),
            ("rows", "L-1", "accept", "0 experts of 2^31 - 1 rows", [0, 2**31 - 1, 0]),
            ("rows-more", "L-1", "limit", "0 experts of 2^31 rows", [0, 2**31, 0]),
        ):
            content = empty(encoding, shape)
            name, what = f"limit-{encoding}-{name}", f"An {encoding} tensor: {what}"
            if outcome == "accept":
                yield accept(name, needed, what, content)
                continue
            yield reject(name, needed, outcome, what, content)
            content.change(dtype="F4")
            yield reject(f"{name}-unknown", f"{needed} T-5", outcome,
                         f"{what}, of an unknown element type", content)
