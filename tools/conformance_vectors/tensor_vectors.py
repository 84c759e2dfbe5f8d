"""The vectors of SPEC.md sections 4 to 6: raw and compressed bytes, dictionaries."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

import struct
from collections.abc import Iterator

from tools.conformance_vectors.file_builder import Content, frame, raw_block, run_block, shuffled
from tools.conformance_vectors.int_dict_builder import SIZES, Book, Matrix, comb, patched, tunstall
from tools.conformance_vectors.samples import (
    CODEWORD8,
    PLANE8,
    TINY,
    bf16,
    rows,
    small,
    symmetric,
    ternary,
)
from tools.conformance_vectors.vector import Vector, accept, reject, reject_extent

# Made by Zstandard 1.5.7 from NUMBERS, shuffled.
COMPRESSED_NUMBERS = bytes.fromhex(
    "28b52ffd6480004501009800100c00d8a0300050e03480aac1c0004041411298"
    "10f8060010e6e65976edff6758f4175e02019413c867"
)
NUMBERS = struct.pack("<96f", *[(i // 8) ** 2 / 4 - 9 for i in range(96)])


def section_4() -> Iterator[Vector]:
    raw, compressed = Content(), Content()
    for name, size in sorted(SIZES.items()):
        raw.tensor(name, name, [2, 2], bytes(range(1, 4 * size + 1)))
        data = bytes(range(1, 5 * size + 1))
        stored = [frame(shuffled(data, size))]
        compressed.tensor(name, name, [5], data, stored=stored, encoding="zstd")
    yield accept("dtypes-raw", "R-1 N-1", "Each element type, raw", raw)
    yield accept("dtypes-zstd", "Z-2 Z-1", "Each element type, shuffled", compressed)
    for size in (2, 4):
        content = Content().tensor("a", "U8", [3], bytes(size))
        what = f"The extent of a raw tensor of 3 bytes has {size}"
        yield reject_extent(f"raw-length-{size}", "R-1", "malformed", what, content)
    content = Content().tensor("a", "U8", [2**40], bytes(2))
    what = "A raw tensor of 2^40 bytes in an extent of 2"
    yield reject_extent("raw-length-huge", "R-1 N-3", "malformed", what, content)


def zstd(stored: bytes, length: int = 3, dtype: str = "U8", expected: bytes = b"abc") -> Content:
    """One compressed tensor."""
    return Content().tensor("a", dtype, [length], expected, stored=[stored], encoding="zstd")


def section_5_frames() -> Iterator[Vector]:
    what = "A frame with a compressed block and a checksum"
    yield accept("zstd-compressed", "Z-2 Z-1", what, zstd(COMPRESSED_NUMBERS, 96, "F32", NUMBERS))
    long = b"abc" + b"x" * 1000 + b"def"
    blocks = raw_block(b"abc", False) + run_block(ord("x"), 1000, False) + raw_block(b"def")
    content = Content()
    for name, data, stored in (
        ("1", b"abc", frame(b"abc", size_bytes=1)),
        ("2", b"abc" * 100, frame(b"abc" * 100, size_bytes=2)),
        ("4", b"abc", frame(b"abc", size_bytes=4)),
        ("8", b"abc", frame(b"abc", size_bytes=8)),
        ("blocks", long, frame(long, window=0, blocks=blocks)),
        ("last", b"abc", frame(b"abc", blocks=raw_block(b"abc", False) + raw_block(b""))),
    ):
        content.tensor(name, "U8", [len(data)], data, stored=[stored], encoding="zstd")
    what = "Content sizes of 1, 2, 4 and 8 bytes; several blocks"
    yield accept("zstd-frames", "Z-2", what, content)
    what = "A dictionary number of 0 in the frame's header stands for none"
    yield accept("zstd-dictionary-0", "Z-2", what, zstd(frame(b"abc", dictionary=0)))
    good = frame(b"abc")
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    for name, data, what in (
        ("dictionary", frame(b"abc", dictionary=7), "The frame needs dictionary 7"),
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
        ("halves", frame(b"ab") + frame(b"c"), "Two frames, together the tensor"),
    ):
        yield reject_extent(f"zstd-{name}", "Z-2", "malformed", what, zstd(data))
    for name, data, what in (
        ("no-size-0", frame(b"", window=0, size_bytes=0), "No content size in the header, for"),
        ("empty-0", b"", "An empty extent for"),
    ):
        yield reject_extent(f"zstd-{name}", "Z-2", "malformed", f"{what} 0 elements", zstd(data, 0))
    for name, data, what in (
        ("header-cut", good[:7], "The frame ends within its header"),
        ("block-cut", good[:-1], "The frame ends within its block"),
        ("block-missing", good[:9], "The frame ends after its header"),
        ("last-missing", frame(b"abc", blocks=raw_block(b"abc", False)), "No block is the last"),
        ("block-reserved", frame(b"abc", blocks=raw_block(b"abc", kind=3)), "A block of type 3"),
        ("reserved-bit", frame(b"abc", flags=0x08), "The reserved bit of the header is set"),
        ("content-less", frame(b"abc", blocks=raw_block(b"ab")), "One byte less than it says"),
        ("content-more", frame(b"abc", blocks=raw_block(b"abcd")), "One byte more than it says"),
        ("garbage", frame(b"abc", blocks=raw_block(b"\xff" * 20, kind=2)),
         "A compressed block of nonsense"),
        ("checksum-missing", frame(b"abc", flags=0x04), "The checksum after the blocks is missing"),
    ):
        yield reject_extent(f"zstd-{name}", "Z-4", "malformed", what, zstd(data))
    content = zstd(patched(COMPRESSED_NUMBERS, {-1: 0x68}), 96, "F32", NUMBERS)
    what = "The frame's own checksum is wrong"
    yield reject_extent("zstd-checksum", "Z-4", "malformed", what, content)


def section_5_limits() -> Iterator[Vector]:
    def run(length: int) -> bytes:
        """A frame of ``length`` times the same byte."""
        blocks = b""
        for start in range(0, length, 2**17):
            part = min(2**17, length - start)
            blocks += run_block(7, part, start + part == length)
        return frame(bytes([7]) * length, blocks=blocks)

    lies = frame(bytes(4096), blocks=run_block(0, 2**17, False) * 40 + run_block(0, 2**17))
    what = "Blocks of 5 MiB in a frame that says, as the index does, 4096 bytes"
    yield reject_extent("zstd-lying-bomb", "Z-4 N-3", "malformed", what, zstd(lies, 4096))
    what = "A window of 2^27 bytes, the most"
    yield accept("zstd-window", "Z-3 L-1", what, zstd(frame(b"abc", window=17 << 3)))
    most = 1024 * len(run(2**20 + 40000)) + 2**20
    assert most == 1024 * len(run(most)) + 2**20
    for name, window, shown in (
        ("more", 17 << 3 | 1, "9/8 x 2^27"), ("32", 22 << 3, "2^32"), ("most", 0xFF, "15/8 x 2^41"),
    ):
        what = f"A window of {shown} bytes"
        content = zstd(frame(b"abc", window=window))
        yield reject_extent(f"zstd-window-{name}", "Z-3 L-1 N-3", "limit", what, content)
    what = "The most content that a frame of its length may have"
    yield accept("zstd-ratio", "Z-3 L-1", what, zstd(run(most), most, expected=bytes([7]) * most))
    for name, data, size, what in (
        ("ratio-more", run(most + 1), most + 1,
         "One byte more content than a frame of its length may have"),
        ("bomb", run(2**25), 2**25, "A frame of 1 KiB with 32 MiB of content"),
        ("size-lie", frame(b"abc", size_bytes=8, size=2**40), 2**40,
         "A frame of 20 bytes that says, as the index does, 2^40 bytes"),
    ):
        yield reject_extent(f"zstd-{name}", "Z-3 L-1 N-3", "limit", what, zstd(data, size))


def section_6_entries() -> Iterator[Vector]:
    for width, zeros in ((8, 0.885), (11, 0.95), (12, 0.6), (16, 0.885)):
        for signs, needed in (
            ("plane", "D-1 D-2 D-4 E-12 E-10 E-12"), ("codeword", "D-1 D-2 D-X E-12 E-10"),
        ):
            book = tunstall(width, signs, zeros)
            # Entries from everywhere in the tree, each with signs of its own.
            step = len(book.entries) // 60 | 1
            levels = [
                -weight if (i + place) % 3 == 0 else weight
                for i, entry in enumerate(book.entries[::step])
                for place, weight in enumerate(entry)
            ]
            columns = -(-len(levels) // 4)
            levels += [0] * (4 * columns - len(levels))
            content = ternary(Matrix(rows(levels, columns), bf16(-1, 2) * 4), book, "BF16")
            what = f"A dictionary of {width} bits, signs in the {signs}, fitted to {zeros} zeros"
            yield accept(f"dictionary-{signs}-{width}", needed, what, content)
    content = ternary(symmetric([weight for entry in PLANE8.entries for weight in entry]))
    what = "Each codeword of 8 bits once, in order"
    yield accept("dictionary-all-entries", "D-4 E-10", what, content)
    levels = [
        1 - 2 * (lie >> sum(entry[:place]) & 1) if weight else 0
        for entry in CODEWORD8.entries
        for lie in range(2 ** sum(entry))
        for place, weight in enumerate(entry)
    ]
    what = "Each codeword with signs once, in order"
    yield accept("dictionary-all-signs", "D-X E-12", what, ternary(symmetric(levels), CODEWORD8))
    book = Book(8, "codeword", comb([0] * 127, 128))
    assert book.codewords == 255
    what = "255 codewords with signs, the most of 256"
    content = ternary(symmetric([0, 0, -1, 0, 1]), book)
    yield accept("dictionary-255-codewords", "D-X", what, content)
    book = Book(8, "codeword", comb([0] * 128, 129))
    assert book.codewords == 257
    what = "257 codewords with signs, where 8 bits have 256"
    content = Content().dictionary(book)
    yield reject_extent("dictionary-257-codewords", "D-X", "malformed", what, content)
    what = "The smallest tree: entries 0 and 1, one byte"
    yield accept("dictionary-tiny", "D-2 D-X", what, ternary(symmetric([0, 1, -1]), TINY))
    what = "A dictionary that no tensor uses"
    yield accept("dictionary-unused", "D-1", what, small().dictionary(TINY))
    content = ternary(symmetric([0] * 700 + [1, -1, 0]), Book(8, "plane", comb([0] * 255, 256)))
    yield accept("entry-255", "D-3 L-1 E-10", "An entry of 255 zeros, the longest", content)
    content = ternary(symmetric([-1, 1] * 20), Book(8, "plane", comb([1] * 16, 256)))
    yield accept("entry-16", "D-3 L-1", "An entry of 16 non-zeros, the most", content)


def tree(
    name: str, needed: str, code: str, what: str, data: bytes, book: Book = PLANE8, /, **keys: int
) -> Vector:
    """A bad tree in place of that of ``book``."""
    content = Content().dictionary(book, data, bytes=len(data)).change("dictionaries", **keys)
    return reject_extent(name, needed, code, what, content)


def plane_tree(name: str, needed: str, code: str, what: str, book: Book) -> Vector:
    """A tree that breaks a rule, but is described by the index as well as limits allow."""
    length, nonzeros = min(book.max_length, 255), min(book.max_nonzeros, 16)
    return tree(name, needed, code, what, book.tree, book, max_length=length, max_nonzeros=nonzeros)


def section_6_trees() -> Iterator[Vector]:
    book = Book(9, "plane", comb([0] * 256, 512))
    yield plane_tree("entry-256", "D-3 L-1", "limit", "An entry of 256 weights", book)
    book = Book(8, "plane", comb([1] * 17, 256))
    yield plane_tree("entry-17", "D-3 L-1", "limit", "An entry of 17 non-zeros", book)
    content = Content().dictionary(PLANE8, frame(PLANE8.tree), encoding="zstd")
    content.ternary("w", "F32", symmetric([1, 0, -1]))
    yield accept("dictionary-zstd", "D-2 Z-2", "A tree in a Zstandard frame", content)
    for length in (63, 65):
        content = Content().dictionary(PLANE8, bytes=length)
        what = f"A tree of 64 bytes, {length} by the index"
        yield reject_extent(f"dictionary-bytes-{length}", "D-2 R-1", "malformed", what, content)
    for length in (0, 2**14 + 1):
        content = Content().dictionary(PLANE8, bytes=length)
        what = f"A tree of {length} bytes by the index"
        yield reject(f"dictionary-bytes-{length}", "D-1 L-1", "limit", what, content)
    content = Content().dictionary(PLANE8, encoding="lz4")
    what = "A tree in an unknown encoding"
    yield reject_extent("dictionary-encoding", "T-5", "unsupported", what, content)
    what = "A tree of inner nodes only, 100 bytes long"
    yield tree("tree-deep", "D-3 L-1 N-3", "limit", what, b"\xff" * 100, width=16)
    for leaves in (255, 257):
        book = Book(8, "plane", comb([0] * 20, leaves))
        what = f"{leaves} leaves instead of 256"
        yield plane_tree(f"tree-{leaves}", "D-4", "malformed", what, book)
    good = PLANE8.tree
    yield tree("tree-cut", "D-2", "malformed", "The last byte of the tree is missing", good[:-1])
    what = "The extent of the tree is empty"
    yield tree("tree-none", "D-2 R-1", "malformed", what, b"", bytes=64)
    yield tree("tree-more", "D-2", "malformed", "A zero byte after the tree", good + b"\0")
    padded = patched(good, {-1: good[-1] | 0x80})
    yield tree("tree-padding", "D-2", "padding", "The bit after the tree is not zero", padded)
    yield tree("tree-padding-tiny", "D-2", "padding", "Bit 3, after a tree of 3", b"\x09", TINY)
    what = "A second tree in the bits after the first"
    yield tree("tree-padding-tree", "D-2", "padding", what, b"\x11", TINY)
    yield tree("tree-leaf", "D-3", "malformed", "A tree that is one leaf", b"\0", TINY)
    for key, value in (("max_length", PLANE8.max_length), ("max_nonzeros", PLANE8.max_nonzeros)):
        for other in (value - 1, value + 1):
            what = f"{key} is {other}, in the tree it is {value}"
            yield tree(f"tree-{key}-{other}", "D-1", "malformed", what, good, **{key: other})
