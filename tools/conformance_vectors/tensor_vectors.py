"""The vectors of SPEC.md sections 4 to 7: what is in the extents.

Each rejected vector has one defect, and everything else in it, checksums too, is right.
"""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.conformance_vectors.file_builder import (
    SIZES,
    Book,
    Content,
    Matrix,
    bits_of,
    comb,
    frame,
    patched,
    raw_block,
    run_block,
    segment,
    shuffled,
    tunstall,
)
from tools.conformance_vectors.table import (
    CODEWORD8,
    COMPRESSED_NUMBERS,
    ONE,
    PLANE8,
    TINY,
    accept,
    bf16,
    noise,
    reject,
    rows,
    small,
    ternary,
)

# -- Sections 4 and 5 ------------------------------------------------------------------------------


def section_4_and_5() -> None:
    content = Content()
    for name, size in sorted(SIZES.items()):
        content.tensor(name, name, [2, 2], bytes(range(1, 4 * size + 1)))
    accept("dtypes-raw", "R-1 N-1", "Each element type, raw", content)
    content = Content()
    for name, size in sorted(SIZES.items()):
        data = bytes(range(1, 5 * size + 1))
        content.tensor(name, name, [5], data, stored=[frame(shuffled(data, size))], encoding="zstd")
    accept("dtypes-zstd", "Z-1 Z-4", "Each element type, shuffled", content)
    for size in (2, 4):
        content = Content()
        content.tensor("a", "U8", [3], bytes(size))
        what = f"The extent of a raw tensor of 3 bytes has {size}"
        reject(f"raw-length-{size}", "R-1", "malformed*", what, content)
    content = Content()
    content.tensor("a", "U8", [2**40], bytes(2))
    what = "A raw tensor of 2^40 bytes in an extent of 2"
    reject("raw-length-huge", "R-1 N-3", "malformed*", what, content)

    def one(data: bytes, length: int = 3, dtype: str = "U8", expected: bytes = b"abc") -> Content:
        content = Content()
        content.tensor("a", dtype, [length], expected, stored=[data], encoding="zstd")
        return content

    numbers = struct.pack("<96f", *[(i // 8) ** 2 / 4 - 9 for i in range(96)])
    content = one(COMPRESSED_NUMBERS, 96, "F32", numbers)
    accept("zstd-compressed", "Z-1 Z-4", "A frame with a compressed block and a checksum", content)
    content = Content()
    for name, data, size_bytes in (
        ("1", b"abc", 1),
        ("2", b"abc" * 100, 2),
        ("4", b"abc", 4),
        ("8", b"abc", 8),
    ):
        content.tensor(
            name,
            "U8",
            [len(data)],
            data,
            stored=[frame(data, size_bytes=size_bytes)],
            encoding="zstd",
        )
    data = b"abc" + b"x" * 1000 + b"def"
    blocks = raw_block(b"abc", False) + run_block(ord("x"), 1000, False) + raw_block(b"def")
    stored = [frame(data, window=0, blocks=blocks)]
    content.tensor("blocks", "U8", [len(data)], data, stored=stored, encoding="zstd")
    blocks = raw_block(b"abc", False) + raw_block(b"")
    content.tensor(
        "last", "U8", [3], b"abc", stored=[frame(b"abc", blocks=blocks)], encoding="zstd"
    )
    accept("zstd-frames", "Z-1", "Content sizes of 1, 2, 4 and 8 bytes; several blocks", content)
    what = "A dictionary number of 0 in the frame's header stands for none"
    accept("zstd-dictionary-0", "Z-1", what, one(frame(b"abc", dictionary=0)))
    reject(
        "zstd-dictionary", "Z-1", "malformed*", "The frame needs dictionary 7",
        one(frame(b"abc", dictionary=7)),
    )
    good = frame(b"abc")
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    for name, data, what in (
        ("empty", b"", "The extent is empty"),
        ("raw", b"abc", "The extent is the tensor, not compressed"),
        ("trailing", good + b"\0", "A byte after the frame"),
        ("trailing-long", good + bytes(16), "16 bytes after the frame"),
        ("twice", good + good, "Two frames"),
        ("second-empty", good + frame(b""), "A second frame, of nothing"),
        ("skippable", skippable, "A skippable frame of the right size"),
        ("skippable-before", skippable + good, "A skippable frame before the frame"),
        ("skippable-after", good + skippable, "A skippable frame after the frame"),
        ("magic", b"\x27" + good[1:], "The magic number of an older version"),
        ("no-size", frame(b"abc", window=0, size_bytes=0), "No content size in the header"),
        ("size-less", frame(b"ab"), "The frame has two bytes, the tensor three"),
        ("size-more", frame(b"abcd"), "The frame has four bytes, the tensor three"),
    ):
        reject(f"zstd-{name}", "Z-1", "malformed*", what, one(data))
    two = b"".join(frame(half) for half in (b"ab", b"c"))
    reject("zstd-halves", "Z-1", "malformed*", "Two frames, together the tensor", one(two))
    data = frame(b"", window=0, size_bytes=0)
    what = "No content size in the header, for 0 elements"
    reject("zstd-no-size-0", "Z-1", "malformed*", what, one(data, 0))
    reject("zstd-empty-0", "Z-1", "malformed*", "An empty extent for 0 elements", one(b"", 0))
    for name, data, what in (
        ("header-cut", good[:7], "The frame ends within its header"),
        ("block-cut", good[:-1], "The frame ends within its block"),
        ("block-missing", good[:9], "The frame ends after its header"),
        ("last-missing", frame(b"abc", blocks=raw_block(b"abc", False)), "No block is the last"),
        ("block-reserved", frame(b"abc", blocks=raw_block(b"abc", kind=3)), "A block of type 3"),
        ("reserved-bit", frame(b"abc", flags=0x08), "The reserved bit of the header is set"),
        ("content-less", frame(b"abc", blocks=raw_block(b"ab")), "One byte less than it says"),
        ("content-more", frame(b"abc", blocks=raw_block(b"abcd")), "One byte more than it says"),
        (
            "garbage", frame(b"abc", blocks=raw_block(b"\xff" * 20, kind=2)),
            "A compressed block of nonsense",
        ),
        ("checksum-missing", frame(b"abc", flags=0x04), "The checksum after the blocks is missing"),
    ):
        reject(f"zstd-{name}", "Z-3", "malformed*", what, one(data))
    data = patched(COMPRESSED_NUMBERS, {-1: 0x68})
    what = "The frame's own checksum is wrong"
    reject("zstd-checksum", "Z-3", "malformed*", what, one(data, 96, "F32", numbers))
    lies = frame(bytes(4096), blocks=run_block(0, 2**17, False) * 40 + run_block(0, 2**17))
    what = "Blocks of 5 MiB in a frame that says, as the index does, 4096 bytes"
    reject("zstd-lying-bomb", "Z-3 N-3", "malformed*", what, one(lies, 4096))

    what = "A window of 2^27 bytes, the most"
    accept("zstd-window", "Z-2 L-1", what, one(frame(b"abc", window=17 << 3)))
    for name, window, shown in (
        ("more", 17 << 3 | 1, "9/8 x 2^27"),
        ("32", 22 << 3, "2^32"),
        ("most", 0xFF, "15/8 x 2^41"),
    ):
        what = f"A window of {shown} bytes"
        reject(
            f"zstd-window-{name}", "Z-2 L-1 N-3", "limit*", what, one(frame(b"abc", window=window)),
        )

    def run(length: int) -> bytes:
        blocks = b""
        for start in range(0, length, 2**17):
            part = min(2**17, length - start)
            blocks += run_block(7, part, start + part == length)
        return frame(bytes([7]) * length, blocks=blocks)

    most = 1024 * len(run(2**20 + 40000)) + 2**20
    assert most == 1024 * len(run(most)) + 2**20
    content = one(run(most), most, expected=bytes([7]) * most)
    accept("zstd-ratio", "Z-2 L-1", "The most content that a frame of its length may have", content)
    what = "One byte more content than a frame of its length may have"
    reject("zstd-ratio-more", "Z-2 L-1 N-3", "limit*", what, one(run(most + 1), most + 1))
    what = "A frame of 1 KiB with 32 MiB of content"
    reject("zstd-bomb", "Z-2 L-1 N-3", "limit*", what, one(run(2**25), 2**25))
    data = frame(b"abc", size_bytes=8, size=2**40)
    what = "A frame of 20 bytes that says, as the index does, 2^40 bytes"
    reject("zstd-size-lie", "Z-2 L-1 N-3", "limit*", what, one(data, 2**40))


# -- Section 6 -------------------------------------------------------------------------------------


def section_6() -> None:
    for width, zeros in ((8, 0.885), (11, 0.95), (12, 0.6), (16, 0.885)):
        for signs in ("plane", "codeword"):
            book = tunstall(width, signs, zeros)
            # Entries from everywhere in the tree, each with signs of its own.
            step = len(book.entries) // 60 | 1
            trits = [
                -weight if (i + place) % 3 == 0 else weight
                for i, entry in enumerate(book.entries[::step])
                for place, weight in enumerate(entry)
            ]
            columns = -(-len(trits) // 4)
            trits += [0] * (4 * columns - len(trits))
            matrix = Matrix(rows(trits, columns), bf16(-1, 2) * 4)
            what = f"A dictionary of {width} bits, signs in the {signs}, fitted to {zeros} zeros"
            content = ternary(matrix, book, "BF16")
            needed = "D-1 D-2 D-4 D-6 E-9 E-11" if signs == "plane" else "D-1 D-2 D-5 D-6 E-9"
            accept(f"dictionary-{signs}-{width}", needed, what, content)

    every = [weight for entry in PLANE8.entries for weight in entry]
    content = ternary(Matrix([every], bf16(1), symmetric=True))
    accept("dictionary-all-entries", "D-4 E-9", "Each codeword of 8 bits once, in order", content)
    trits = [
        1 - 2 * (lie >> sum(entry[:place]) & 1) if weight else 0
        for entry in CODEWORD8.entries
        for lie in range(2 ** sum(entry))
        for place, weight in enumerate(entry)
    ]
    content = ternary(Matrix([trits], bf16(1), symmetric=True), CODEWORD8)
    accept("dictionary-all-signs", "D-5 D-6", "Each codeword with signs once, in order", content)
    book = Book(8, "codeword", comb([0] * 127, 128))
    assert book.codewords == 255
    content = ternary(Matrix([[0, 0, -1, 0, 1]], [ONE], symmetric=True), book)
    accept("dictionary-255-codewords", "D-5", "255 codewords with signs, the most of 256", content)
    book = Book(8, "codeword", comb([0] * 128, 129))
    assert book.codewords == 257
    content = Content()
    content.dictionary(book)
    what = "257 codewords with signs, where 8 bits have 256"
    reject("dictionary-257-codewords", "D-5", "malformed*", what, content)
    content = ternary(Matrix([[0, 1, -1]], [ONE], symmetric=True), TINY)
    accept("dictionary-tiny", "D-2 D-5", "The smallest tree: entries 0 and 1, one byte", content)
    content = small()
    content.dictionary(TINY)
    accept("dictionary-unused", "D-1", "A dictionary that no tensor uses", content)

    longest = Book(8, "plane", comb([0] * 255, 256))
    content = ternary(Matrix([[0] * 700 + [1, -1, 0]], [ONE], symmetric=True), longest)
    accept("entry-255", "D-3 L-1 E-9", "An entry of 255 zeros, the longest", content)
    sixteen = Book(8, "plane", comb([1] * 16, 256))
    content = ternary(Matrix([[-1, 1] * 20], [ONE], symmetric=True), sixteen)
    accept("entry-16", "D-3 L-1", "An entry of 16 non-zeros, the most", content)

    def bad(
        name: str,
        needed: str,
        code: str,
        what: str,
        tree: bytes,
        keys: Mapping[str, int],
        signs: str = "plane",
    ) -> None:
        content = Content()
        content.dictionary(PLANE8 if signs == "plane" else TINY)
        content.extents[0] = tree
        content.index["dictionaries"][0] |= {"bytes": len(tree), **keys}
        reject(name, needed, f"{code}*", what, content)

    def of(book: Book) -> dict[str, int]:
        return {
            "width": book.width,
            "max_length": min(book.max_length, 255),
            "max_nonzeros": min(book.max_nonzeros, 16),
        }

    book = Book(9, "plane", comb([0] * 256, 512))
    bad("entry-256", "D-3 L-1", "limit", "An entry of 256 weights", book.tree, of(book))
    book = Book(8, "plane", comb([1] * 17, 256))
    bad("entry-17", "D-3 L-1", "limit", "An entry of 17 non-zeros", book.tree, of(book))
    content = Content()
    content.dictionary(PLANE8, frame(PLANE8.tree), "zstd")
    content.ternary("w", "F32", Matrix([[1, 0, -1]], [ONE], symmetric=True))
    accept("dictionary-zstd", "D-2 Z-1", "A tree in a Zstandard frame", content)
    for length in (63, 65):
        content = Content()
        content.dictionary(PLANE8)
        content.index["dictionaries"][0]["bytes"] = length
        what = f"A tree of 64 bytes, {length} by the index"
        reject(f"dictionary-bytes-{length}", "D-2 R-1", "malformed*", what, content)
    for length in (0, 2**14 + 1):
        content = Content()
        content.dictionary(PLANE8)
        content.index["dictionaries"][0]["bytes"] = length
        what = f"A tree of {length} bytes by the index"
        reject(f"dictionary-bytes-{length}", "D-1 L-1", "limit", what, content)
    content = Content()
    content.dictionary(PLANE8, encoding="lz4")
    reject("dictionary-encoding", "T-4", "unsupported*", "A tree in an unknown encoding", content)
    what = "A tree of inner nodes only, 100 bytes long"
    bad("tree-deep", "D-3 L-1 N-3", "limit", what, b"\xff" * 100, {"width": 16})
    book = Book(8, "plane", comb([0] * 20, 255))
    bad("tree-255", "D-4", "malformed", "255 leaves instead of 256", book.tree, of(book))
    book = Book(8, "plane", comb([0] * 20, 257))
    bad("tree-257", "D-4", "malformed", "257 leaves instead of 256", book.tree, of(book))
    tree = PLANE8.tree
    bad("tree-cut", "D-2", "malformed", "The last byte of the tree is missing", tree[:-1], {})
    what = "The extent of the tree is empty"
    bad("tree-none", "D-2 R-1", "malformed", what, b"", {"bytes": 64})
    bad("tree-more", "D-2", "malformed", "A zero byte after the tree", tree + b"\0", {})
    tree = patched(tree, {-1: tree[-1] | 0x80})
    bad("tree-padding", "D-2", "padding", "The bit after the tree is not zero", tree, {})
    bad("tree-padding-tiny", "D-2", "padding", "Bit 3, after a tree of 3", b"\x09", {}, "codeword")
    what = "A second tree in the bits after the first"
    bad("tree-padding-tree", "D-2", "padding", what, b"\x11", {}, "codeword")
    bad("tree-leaf", "D-3", "malformed", "A tree that is one leaf", b"\0", {}, "codeword")
    for key, value in (("max_length", PLANE8.max_length), ("max_nonzeros", PLANE8.max_nonzeros)):
        for other in (value - 1, value + 1):
            what = f"{key} is {other}, in the tree it is {value}"
            bad(f"tree-{key}-{other}", "D-1", "malformed", what, PLANE8.tree, {key: other})


# -- Section 7 -------------------------------------------------------------------------------------


def section_7() -> None:
    base = [[1, 0, -1, 0, 0], [0, 0, 1, 1, -1]]
    low_high = bf16(-0.5, 0.75, -3, 0.1)
    matrix = Matrix(base, low_high)
    accept("ternary", "E-1 E-4 E-14 V-1 V-3", "Low and high of each row", ternary(matrix))
    matrix = Matrix(base, bf16(0.5, 3), symmetric=True)
    accept("ternary-symmetric", "V-1", "One scale a row", ternary(matrix))
    groups = bf16(*[value / 8 for value in range(1, 13)])
    for symmetric in (False, True):
        scales = groups[:6] if symmetric else groups
        matrix = Matrix(base, scales, group_size=2, symmetric=symmetric)
        name = "ternary-groups" + "-symmetric" * symmetric
        accept(name, "E-2 V-1", "Groups of two columns, the last of one", ternary(matrix))
    matrix = Matrix([[1] * 3], bf16(1, 2, 3), group_size=1, symmetric=True)
    accept("ternary-group-1", "E-2", "Groups of one column", ternary(matrix))
    for size in (5, 6):
        matrix = Matrix(base, low_high, group_size=size)
        what = f"Groups of {size} columns where there are 5"
        accept(f"ternary-group-{size}", "E-2", what, ternary(matrix))
    columns = bf16(1, -2, 0.5, 3, 0.7)
    matrix = Matrix(base, low_high, columns)
    accept("ternary-columns", "V-2 E-4", "A scale for each column", ternary(matrix))
    matrix = Matrix(base, groups[:6], columns, group_size=2, symmetric=True)
    accept("ternary-columns-groups", "V-2 E-2", "Column scales, groups, symmetric", ternary(matrix))
    for scale_dtype in ("F16", "BF16", "F32"):
        for dtype in ("F16", "BF16", "F32", "F64"):
            scales = [bits_of(value, scale_dtype) for value in (-0.1, 0.3, -1 / 3, 1000.7)]
            matrix = Matrix(base, scales, scales + scales[:1], scale_dtype)
            name = f"ternary-{scale_dtype.lower()}-{dtype.lower()}"
            what = f"Scales of {scale_dtype}, elements of {dtype}"
            accept(name, "V-1 V-2 V-3 E-3", what, ternary(matrix, dtype=dtype))

    section_7_values()

    # Shapes
    for name, trits, what in (
        ("1x1", [[-1]], "A matrix of one weight"),
        ("1x1-zero", [[0]], "A matrix of one zero"),
        ("column", [[1], [0], [-1]], "A matrix of one column"),
        ("row", [[0, 1, 0, 0, 0, -1, 0]], "A matrix of one row"),
        ("zeros", [[0] * 40] * 3, "Rows of zeros only"),
        ("nonzeros", [[1, -1] * 20] * 2, "Rows of non-zeros only"),
        ("long", [[0] * 600, [0] * 599 + [1]], "Rows longer than any entry"),
        ("overrun", [[0, 0], [1, 0], [0, -1]], "Rows shorter than their entries"),
    ):
        for signs, book in (("plane", PLANE8), ("codeword", CODEWORD8)):
            content = ternary(Matrix(trits, bf16(-2, 3) * len(trits)), book)
            accept(f"shape-{name}-{signs}", "E-9 E-10 E-12 E-13", what, content)
    content = ternary(Matrix([[], [], []], bf16(1, 2, 3), symmetric=True))
    accept("shape-no-columns", "E-4 E-6 E-8", "Three rows of no columns, one group", content)
    content = ternary(Matrix([[], []], [], group_size=4))
    accept("shape-no-columns-groups", "E-2 E-4", "Two rows of no columns and no groups", content)
    content = ternary(Matrix([], [], columns=7))
    accept("shape-no-rows", "E-4 E-8", "Seven columns without rows", content)
    content = ternary(Matrix([], [], bf16(*range(7)), columns=7))
    accept("shape-no-rows-columns", "E-4 E-8", "The same with column scales", content)
    accept("shape-nothing", "E-4 E-8", "No rows and no columns", ternary(Matrix([], [])))
    content = Content()
    content.dictionary(PLANE8)
    content.ternary("w", "BF16", shape=[0, 4, 5], stack=True, members="w.{}")
    accept("shape-no-experts", "T-1", "A ternary stack without experts", content)
    for count in (31, 32, 33, 65):
        trits = rows(noise(count * 9, 12, count), 9)
        matrix = Matrix(trits, [ONE + i for i in range(count)], symmetric=True)
        what = f"{count} rows: {-(-count // 32)} blocks"
        accept(f"rows-{count}", "E-5", what, ternary(matrix))

    for together in (2, 3, 7, 8, 100):
        matrix = Matrix(
            rows(noise(7 * 50, 6, together), 50), [ONE + i for i in range(7)],
            symmetric=True, rows_per_segment=together,
        )
        what = f"Seven rows in segments of {together}"
        for signs, book in (("plane", PLANE8), ("codeword", CODEWORD8)):
            content = ternary(matrix, book)
            accept(f"rows-together-{together}-{signs}", "E-15 E-9 E-10", what, content)
    trits = rows(noise(70 * 9, 4, 1), 9)
    scales = [ONE + i for i in range(140)]
    matrix = Matrix(trits, scales, group_size=5, symmetric=True, rows_per_segment=2)
    what = "35 segments of two rows, two groups a row"
    accept("rows-together-blocks", "E-15 E-5 E-2", what, ternary(matrix))
    matrix = Matrix([[]] * 5, bf16(*range(5)), symmetric=True, rows_per_segment=2)
    accept("rows-together-no-columns", "E-15 E-6", "Three segments of nothing", ternary(matrix))
    matrix = Matrix(trits, scales[:70], symmetric=True)
    for value, code, what in (
        (0, "limit", "No rows in a segment"),
        (2**31, "limit", "2^31 rows in a segment, one more than the most"),
        (2, "malformed*", "Segments of two rows by the index, of one in the extent"),
    ):
        content = ternary(matrix)
        content.index["tensors"][0]["rows_per_segment"] = value
        needed = "E-15 E-4" if value == 2 else "E-15 L-1"
        reject(f"rows-per-segment-{value}", needed, code, what, content)
    content = ternary(Matrix(trits, scales[:70], symmetric=True, rows_per_segment=70))
    content.index["tensors"][0]["rows_per_segment"] = 2**31 - 1
    what = "2^31 - 1 rows in a segment, the most, where there are 70"
    accept("rows-per-segment-most", "E-15 L-1", what, content)

    # [E-6] Two segments of 2 x 510 weights, which take 4 codewords each, and one of 510.
    longest_zeros = Book(8, "plane", comb([0] * 255, 256))
    zeros = Matrix([[0] * 510] * 5, [ONE] * 5, symmetric=True, rows_per_segment=2)
    for place, least in ((0, 4), (2, 2)):
        content = ternary(zeros, longest_zeros, segments={place: bytes(least)})
        what = f"Segment {place} has just as many bytes as there are entries of 255 zeros"
        accept(f"segment-room-{place}", "E-6 E-15", what, content)
        content = ternary(zeros, longest_zeros, segments={place: bytes(least - 1)})
        what = f"Segment {place} has one byte less than that"
        reject(f"segment-room-{place}-less", "E-6 E-15", "malformed*", what, content)

    # Stacks
    matrices = [
        Matrix(rows(noise(3 * 20, zeros, zeros), 20), bf16(-1, zeros + 1) * 3)
        for zeros in (0, 4, 8, 12, 16)
    ]
    content = Content()
    for book in (PLANE8, tunstall(8, "plane", 0.3)):
        content.dictionary(book)
    content.ternary("w", "BF16", *matrices, members="w.{}.weight", dictionaries=(0, 1))
    accept("stack-dictionaries", "E-1 T-1 T-2", "Five experts, two dictionaries in turn", content)
    content = Content()
    content.dictionary(TINY)
    content.ternary("w", "F32", Matrix([[1, -1]], [ONE], symmetric=True), stack=True)
    accept("stack-one", "T-1", "A ternary stack of one expert", content)
    content = Content()
    content.dictionary(PLANE8)
    line = noise(90, 2, 5)
    lines = [line[:i] + [0] * (90 - i) for i in range(0, 90, 5)]
    content.ternary("w", "BF16", *[Matrix([line], [ONE], symmetric=True) for line in lines])
    accept("stack-guards", "E-4 E-14", "Segments and guards of many lengths", content)
    content = Content()
    for book in (TINY, PLANE8, CODEWORD8):
        content.dictionary(book)
    content.ternary("a", "F32", Matrix([[1, 0]], [ONE], symmetric=True))
    content.ternary("b", "F32", Matrix([[1, 0]], [ONE], symmetric=True), dictionaries=(1,))
    content.ternary("c", "F32", Matrix([[1, 0]], [ONE], symmetric=True), dictionaries=(2,))
    accept("ternary-three", "E-1", "Three tensors with a dictionary each", content)

    # Lengths
    for nonzeros, difference in ((589, 255), (590, 256)):
        row = noise(nonzeros, 0, 1) + [0] * (2000 - nonzeros)
        matrix = Matrix([[0] * 2000, row], bf16(1, 1), symmetric=True)
        least, most = segment_lengths(matrix)
        assert most - least == difference
        what = f"Two segments that differ by {difference} bytes: length_width 1, or 2"
        accept(f"length-{difference}", "E-8", what, ternary(matrix))

    section_7_extent(base, low_high)
    section_7_segments()


def segment_lengths(matrix: Matrix) -> list[int]:
    codes = [PLANE8.parse(row) for row in matrix.trits]
    return [len(segment(codewords, 8, signs)) for codewords, signs in codes]


def section_7_values() -> None:
    """Arithmetic: what a reader gets wrong that rounds twice, flushes subnormals, or uses FMA."""

    def f32(*bits: int, columns: Sequence[int], name: str, what: str, dtype: str = "F32") -> None:
        trits = [[1] * len(columns), [-1] * len(columns)]
        scales = [bits[0], bits[-1]]
        matrix = Matrix(trits, scales, columns, "F32", symmetric=True)
        accept(name, "V-2 V-3", what, ternary(matrix, TINY, dtype))

    tie = 0x3F800001  # 1 + 2^-23: its product with 1.5 and others lies halfway between two numbers
    f32(
        tie, columns=[0x3FC00000, 0x3F800001, 0x3F000000, 0x40200000, 0x3FA00000],
        name="value-ties", what="Products halfway between two numbers of binary32",
    )
    f32(
        0x00000001, 0x00800000,
        columns=[0x3F000000, 0x3F000001, 0x3FC00000, 0x3F7FFFFF, 0x3F800000],
        name="value-subnormal", what="Subnormal scales and products, kept",
    )
    f32(
        0x0DA24260, 0x80000001,
        columns=[0x0DA24260, 0x00000001, 0x80000001, 0x33D6BF95, 0x1E3CE508],
        name="value-underflow", what="Products below all numbers: zero, with its sign",
    )
    f32(
        0x7F7FFFFF, 0xFF000000, columns=[0x3F800000, 0x3F800001, 0x40000000, 0x7F7FFFFF],
        name="value-overflow", what="Products beyond all numbers: infinity",
    )
    f32(
        0x3F800000, 0x477FF000,
        columns=[0x477FEFFF, 0x477FF000, 0x3F801000, 0x33000000, 0x33000001], dtype="F16",
        name="value-f16", what="Rounding to F16: ties, overflow, underflow",
    )
    f32(
        0x3F800000, 0x7F7FFFFF,
        columns=[0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F7FFF, 0x00008000], dtype="BF16",
        name="value-bf16", what="Rounding to BF16: ties, overflow, subnormal",
    )
    f32(
        0x3F9D70A4, 0x3FFFFFFF, columns=[0x3F9D70A4, 0x40490FDB, 0x3EAAAAAB], dtype="F64",
        name="value-f64", what="To F64: rounded once, to binary32",
    )
    # The product is a little more than 1 + 2^-11, the middle between two numbers of F16: rounding
    # it to binary32 makes it the middle itself, and that goes to the even one, 1.
    f32(
        0x3F801001, columns=[0x3F7FFFFF, 0x3F800000], dtype="F16", name="value-twice",
        what="Rounded to binary32 and then to F16, as the text says",
    )
    trits = [[1, -1, 0, 1, -1]] * 3
    matrix = Matrix(trits, [0x0000, 0x8000, 0x8001, 0x0001, 0x7BFF, 0xFBFF], None, "F16")
    what = "Zero, minus zero, subnormal and greatest scales of F16; low above high"
    accept("value-f16-scales", "V-1 V-3", what, ternary(matrix, TINY))
    matrix = Matrix(trits, [0x0000, 0x8000, 0x8001, 0x0001, 0x7F7F, 0xFF7F], None, "BF16")
    what = "Zero, minus zero, subnormal and greatest scales of BF16; low above high"
    accept("value-bf16-scales", "V-1 V-3", what, ternary(matrix, TINY, "F16"))
    matrix = Matrix(trits, [0x8000, 0x0000, 0xBF80], None, "BF16", symmetric=True)
    what = "Symmetric scales of minus zero, zero and -1"
    accept("value-sign", "V-1", what, ternary(matrix, TINY))
    matrix = Matrix([[0, 1, -1]], bf16(-1, 2), [*bf16(-1, 0), 0x8000], "BF16")
    what = "Zeros stay +0 under a negative column scale; column scales of zero"
    accept("value-zero", "V-2", what, ternary(matrix, TINY))


def section_7_extent(base: list[list[int]], low_high: list[int]) -> None:
    def bad(
        name: str, needed: str, code: str, what: str, matrix: Matrix | None = None, **defects: Any
    ) -> None:
        data = ternary(matrix or Matrix(base, low_high), **defects)
        reject(f"extent-{name}", needed, f"{code}*", what, data)

    for number in (1, 2**32 - 1):
        what = f"Dictionary {number} of 1"
        bad(f"dictionary-{number}", "E-1", "malformed", what, dictionary=number)
    for name, book, index_keys in (
        ("width", tunstall(9, "plane", 0.9), {"width": 8}), ("signs", TINY, {"signs": "plane"}),
    ):
        content = Content()
        content.dictionary(PLANE8)
        content.dictionary(book)
        content.ternary("w", "F32", Matrix(base, low_high), defects={"dictionary": 1})
        what = f"The header names a dictionary of other {name} than the segments have"
        reject(f"extent-dictionary-{name}", "E-1", "malformed*", what, content)
        content = Content()
        content.dictionary(book)
        content.ternary("w", "F32", Matrix(base, low_high)).update(index_keys)
        what = f"The index entry has other {name} than the dictionary and the segments"
        reject(f"extent-dictionary-{name}-index", "E-1", "malformed*", what, content)

    for dtype in ("U8", "I32", "F8_E4M3", "BOOL"):
        content = ternary(Matrix([[1]], [ONE], symmetric=True), TINY)
        content.index["tensors"][0]["dtype"] = dtype
        what = f"A ternary tensor of {dtype}"
        reject(f"ternary-dtype-{dtype.lower()}", "E-3", "malformed", what, content)
    for shape, stack in (([1], False), ([1, 1, 1], False), ([1, 1], True), ([1, 1, 1, 1], True)):
        content = ternary(Matrix([[1]], [ONE], symmetric=True), TINY)
        content.index["tensors"][0].update(shape=shape, stack=stack)
        kind = "stack" if stack else "tensor"
        what = f"A ternary {kind} of {len(shape)} dimensions"
        reject(f"ternary-{kind}-{len(shape)}", "E-3", "malformed", what, content)
    for key, other in (
        ("signs", "none"),
        ("signs", ""),
        ("scale_dtype", "F64"),
        ("scale_dtype", ""),
    ):
        content = ternary(Matrix([[1]], [ONE], symmetric=True), TINY)
        content.index["tensors"][0][key] = other
        what = f"A ternary tensor's {key} is {other!r}"
        reject(f"ternary-{key}-{other.lower() or 'empty'}", "J-4", "malformed", what, content)

    # [E-4]
    def length(name: str, what: str, change: Callable[[bytes], bytes]) -> None:
        content = ternary(Matrix(base, low_high))
        content.extents[1] = change(content.extents[1])
        reject(f"extent-{name}", "E-4", "malformed*", what, content)

    length("empty", "The extent is empty", lambda data: b"")
    length("31", "The extent ends within its header", lambda data: data[:31])
    length("32", "The extent ends after its header", lambda data: data[:32])
    length("shorter", "The guard is one byte short", lambda data: data[:-1])
    length("shorter-16", "The last 16 bytes are missing", lambda data: data[:-16])
    length("longer", "A zero byte after the guard", lambda data: data + b"\0")
    length("longer-16", "16 zero bytes after the guard", lambda data: data + bytes(16))
    for name, keys, what in (
        ("rows", {"shape": [2**31 - 1, 5]}, "2^31 - 1 rows by the index"),
        ("rows-less", {"shape": [1, 5]}, "One row by the index, eight in the extent"),
        ("columns", {"shape": [2, 2**31 - 1], "column_scale": True}, "2^31 - 1 column scales"),
        ("column-scale", {"column_scale": True}, "Column scales by the index, none in the extent"),
        ("groups", {"group_size": 1}, "Five groups by the index, one in the extent"),
        ("scale-dtype", {"scale_dtype": "F32"}, "Scales twice as wide by the index"),
    ):
        content = ternary(Matrix(base * 4, low_high * 4))
        content.index["tensors"][0].update(keys)
        needed = "E-4 N-3" if "2^31" in what else "E-4"
        reject(f"extent-{name}", needed, "malformed*", what, content)
    for value, code in ((2**32 - 1, "malformed"), (2**32, "limit"), (2**64 - 1, "limit")):
        needed = "E-4 N-3" if code == "malformed" else "E-4 L-1 N-3"
        what = f"segment_bytes is {value}"
        bad(f"segment-bytes-{value}", needed, code, what, segment_bytes=value)
    total = sum(segment_lengths(Matrix(base, low_high)))
    what = "segment_bytes is 16 too great"
    bad("segment-bytes-16", "E-4", "malformed", what, segment_bytes=total + 16)
    for value in (0, 3, 8, 255):
        content = ternary(Matrix([[1]], [ONE], symmetric=True), TINY)
        content.extents[1] = patched(content.extents[1], {8: value})
        what = f"length_width is {value}"
        reject(f"extent-length-width-{value}", "E-4 E-8", "malformed*", what, content)

    # [E-14]
    for place in (0, 6):
        zero = patched(bytes(7), {place: 1})
        what = f"Byte {9 + place} of the header is not zero"
        bad(f"header-{9 + place}", "E-14", "padding", what, zero=zero)
    full = Matrix(base, low_high, bf16(1, 1, 1, 1, 1))
    names = (
        "the row scales",
        "the column scales",
        "the block offsets",
        "the lengths",
        "the segments",
    )
    for place, name in enumerate(names):
        for at in (0, -1):
            short = name.split()[-1]
            what = f"The {'last' if at else 'first'} zero byte after {name} is not zero"
            bad(
                f"gap-{short}{'-columns' * (place == 1)}-{'last' if at else 'first'}", "E-14",
                "padding", what, full, gaps={place: {at: 1}},
            )

    # [E-5], [E-8]
    two = Matrix([[0] * 5, base[1]], low_high)
    least, most = segment_lengths(two)
    above = most - least
    bad("row-length-more", "E-5", "malformed", "A length is too great", two, lengths={1: above + 1})
    bad("row-length-less", "E-5", "malformed", "A length is too small", two, lengths={1: above - 1})
    what = "segment_bytes is one more than the lengths"
    bad("segment-bytes-1", "E-5", "malformed", what, two, segment_bytes=least + most + 1)
    what = "length_base is one too great"
    lengths = {0: 0, 1: above}
    bad("length-base-sum", "E-5", "malformed", what, two, length_base=least + 1, lengths=lengths)
    trits = rows(noise(33 * 3, 8, 7), 3)
    many = Matrix(trits, [ONE] * 33, symmetric=True)
    bad("offset-first", "E-5", "malformed", "The first block begins at 1", many, offsets={0: 1})
    bad("offset-second", "E-5", "malformed", "The second block begins at 0", many, offsets={1: 0})
    bad(
        "offset-huge", "E-5", "malformed", "The second block begins at 2^32 - 1", many,
        offsets={1: 2**32 - 1},
    )
    what = "length_base is 0 where the least length is 1"
    bad("length-base", "E-8", "malformed", what, two, length_base=0)
    for width in (2, 4):
        what = f"length_width is {width} where 1 is enough"
        bad(f"length-width-wide-{width}", "E-8", "malformed", what, two, length_width=width)
    zeros = [0] * 2000
    wide = Matrix([zeros, noise(600, 0, 1) + zeros[600:]], bf16(1, 1), symmetric=True)
    what = "length_width is 4 where 2 is enough"
    bad("length-width-wide-2-4", "E-8", "malformed", what, wide, length_width=4)
    nothing = Matrix([], [], columns=3)
    bad(
        "length-base-no-rows", "E-8", "malformed", "length_base is 1 of no rows", nothing,
        length_base=1,
    )
    for width in (2, 4):
        what = f"length_width is {width} of no rows"
        bad(f"length-width-no-rows-{width}", "E-8", "malformed", what, nothing, length_width=width)
    bad(
        "segments-no-rows", "E-5", "malformed", "segment_bytes is 1 of no rows", nothing,
        segment_bytes=1,
    )

    # [E-7]
    for dtype, infinity in (("BF16", 0x7F80), ("F16", 0x7C00), ("F32", 0x7F800000)):
        minus = 1 << (8 * SIZES[dtype] - 1)
        one = bits_of(1, dtype)
        for name, bits in (
            ("inf", infinity), ("-inf", infinity | minus), ("nan", infinity + 1),
            ("-nan", infinity | minus | 1),
        ):
            matrix = Matrix([[0, 1]], [one, bits], scale_dtype=dtype)
            what = f"A row scale of {name} in {dtype}"
            bad(f"scale-{dtype.lower()}-{name}", "E-7", "value", what, matrix)
        matrix = Matrix([[0, 1]], [one, one], [infinity + 1, one], dtype)
        what = f"A column scale of NaN in {dtype}, of a column of zeros"
        bad(f"scale-column-{dtype.lower()}", "E-7", "value", what, matrix)

    # [E-13]
    for value in (0, 4, 6, 2**64 - 1):
        what = f"nonzeros is {value}, there are 5"
        bad(f"nonzeros-{value}", "E-13", "malformed", what, nonzeros=value)


def section_7_segments() -> None:
    def bad(
        name: str,
        needed: str,
        code: str,
        what: str,
        row: Sequence[int],
        wrong: bytes,
        book: Book = PLANE8,
        **defects: Any,
    ) -> None:
        matrix = Matrix([row], [ONE], symmetric=True)
        content = ternary(matrix, book, segments={0: wrong}, **defects)
        reject(f"segment-{name}", needed, f"{code}*", what, content)

    zeros = [0] * 600
    codewords, _ = PLANE8.parse(zeros)
    what = "Two bytes for 600 columns, which no three entries can fill"
    bad("least", "E-6 E-12", "malformed", what, zeros, segment(codewords, 8, [])[:2])
    what = "No bytes for 5 columns"
    bad("none", "E-6 E-12 N-3", "malformed", what, [0] * 5, b"")
    what = "The last codeword of a row is missing"
    bad("cut", "E-9 E-12", "malformed", what, zeros, segment(codewords[:-1], 8, []))
    what = "A codeword more than the row needs"
    bad("codeword-more", "E-9 E-12", "malformed", what, zeros, segment([*codewords, 0], 8, []))
    row = [1, 0, -1, 0, 0]
    codewords, signs = PLANE8.parse(row)
    right = segment(codewords, 8, signs)
    what = "A segment without its signs"
    bad("overlap", "E-12", "malformed", what, row, segment(codewords, 8, []))
    what = "A zero byte between codewords and signs"
    bad("byte-more", "E-12", "malformed", what, row, segment(codewords, 8, signs, 1))
    for name, middle in (("first", 1), ("last", 1 << 5)):
        what = f"The {name} bit between signs and codewords is set"
        wrong = segment(codewords, 8, signs, 0, middle)
        assert len(wrong) == len(right)
        bad(f"bit-{name}", "E-12", "padding", what, row, wrong)
    book = Book(9, "plane", comb([0] * 10, 512))
    codewords, signs = book.parse(row)
    wrong = segment(codewords, 9, signs, 0, 1)
    bad(
        "bit-9", "E-12", "padding", "A bit between 9-bit codewords and signs is set", row, wrong,
        book,
    )
    codewords, _ = CODEWORD8.parse(row)
    what = "Signs in the codewords, and a zero byte after them"
    wrong = segment(codewords, 8, [], 1)
    bad("codeword-byte-more", "E-11 E-12", "malformed", what, row, wrong, CODEWORD8)
    book = Book(10, "codeword", [[], []])
    codewords, _ = book.parse([0, 1, -1])
    what = "Signs in the codewords of 10 bits, and one of the two bits after them set"
    wrong = segment(codewords, 10, [], 0, 1)
    bad("codeword-bit", "E-12", "padding", what, [0, 1, -1], wrong, book)

    # [E-10]: the entry 0 1 in a row of one column
    for book in (PLANE8, CODEWORD8):
        long = next(e for e in book.entries if len(e) > 3 and sum(e) == 1 and e[-1] == 1)
        row = [0] * (len(long) - 1)
        wrong = segment([book.first[long]], 8, [0] if book.signs == "plane" else [])
        what = f"The last weight of an entry, beyond the row, is not zero ({book.signs})"
        bad(f"overrun-{book.signs}", "E-10", "malformed", what, row, wrong, book)
        what = f"The same with nonzeros one greater ({book.signs})"
        bad(
            f"overrun-counted-{book.signs}", "E-10", "malformed", what, row, wrong, book,
            nonzeros=1,
        )

    # [D-5]
    for codeword in (TINY.codewords, 255):
        what = f"Codeword {codeword} of a dictionary that ends at 2"
        bad(f"codeword-{codeword}", "D-5", "malformed", what, [1], bytes([codeword]), TINY)
