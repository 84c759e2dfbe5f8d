"""The vectors of SPEC.md sections 4 to 6: raw and compressed bytes, dictionaries."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

import struct
from collections.abc import Iterator

from tools.conformance_vectors.exact_numbers import SIZES, bf16
from tools.conformance_vectors.file_builder import Content, frame, raw_block, run_block, shuffled
from tools.conformance_vectors.int_dict_builder import Book, Matrix, comb, patched, tunstall
from tools.conformance_vectors.samples import BOOK, coded, rows, small, symmetric
from tools.conformance_vectors.vector import Vector, accept, reject_extent

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
    what = "The content is one byte too great, and so is the index; the checksum is there"
    more = frame(b"abc", flags=0x04, size=4) + b"\0\0\0\0"
    yield reject_extent("zstd-content-less-checksum", "Z-4", "malformed", what, zstd(more, 4))


def section_5_empty() -> Iterator[Vector]:
    """Frames whose content is nothing are decoded, too."""
    nothing = raw_block(b"", False)
    checksum = (0xEF46DB3751D8E999 & 0xFFFFFFFF).to_bytes(4, "little")  # XXH64 of nothing
    content = Content()
    for name, stored in (
        ("a", frame(b"")), ("b", frame(b"", window=0, blocks=nothing * 3 + run_block(7, 0))),
        ("c", frame(b"", flags=0x04) + checksum), ("d", frame(b"", size_bytes=1)),
        ("e", frame(b"", window=0, size_bytes=8)),
    ):
        content.tensor(name, "U16", [0], b"", stored=[stored], encoding="zstd")
    what = "Frames of nothing: of one block, of four, with a checksum, with other headers"
    yield accept("zstd-nothing", "Z-2 Z-4", what, content)
    for name, stored, what in (
        ("content", frame(b"", blocks=raw_block(b"abc")), "A block of three bytes"),
        ("run", frame(b"", window=0, blocks=run_block(7, 3)), "A block of three times one byte"),
        ("first", frame(b"", blocks=raw_block(b"abc", False) + raw_block(b"")),
         "A block of three bytes before one of none"),
        ("garbage", frame(b"", blocks=raw_block(b"\xff" * 20, kind=2)),
         "A compressed block of nonsense"),
        ("reserved", frame(b"", blocks=raw_block(b"", kind=3)), "A block of type 3"),
        ("reserved-bit", frame(b"", flags=0x08), "The reserved bit of the header is set"),
        ("last-missing", frame(b"", blocks=nothing), "No block is the last"),
        ("block-cut", frame(b"")[:-1], "The frame ends within its block"),
        ("block-missing", frame(b"", blocks=b""), "The frame ends after its header"),
        ("checksum", frame(b"", flags=0x04) + b"\0\0\0\0", "The frame's own checksum is wrong"),
        ("checksum-missing", frame(b"", flags=0x04), "The checksum is missing"),
        ("checksum-cut", frame(b"", flags=0x04) + checksum[:3], "The checksum has three bytes"),
    ):
        what = f"A frame whose content is nothing. {what}"
        yield reject_extent(f"zstd-nothing-{name}", "Z-4", "malformed", what, zstd(stored, 0))
    for name, stored, what in (
        ("trailing", frame(b"") + b"\0", "a byte after it"),
        ("twice", frame(b"") * 2, "another one after it"),
        ("no-size", frame(b"", window=0, size_bytes=0), "no content size in the header"),
        ("dictionary", frame(b"", dictionary=7), "which needs dictionary 7"),
        ("absent", b"", "whose extent is empty"),
        ("size", frame(b"", size=1), "which says one byte"),
    ):
        what = f"A frame whose content is nothing, {what}"
        yield reject_extent(f"zstd-nothing-{name}", "Z-2", "malformed", what, zstd(stored, 0))
    content = zstd(frame(b"", window=17 << 3 | 1), 0)
    what = "A frame whose content is nothing, with a window of 9/8 x 2^27 bytes"
    yield reject_extent("zstd-nothing-window", "Z-3 L-1", "limit", what, content)


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
    for name, data, size, what in (
        ("window", frame(b"abc", window=0xFF, size=4), 3, "a window of 15/8 x 2^41 bytes"),
        ("ratio", run(2**25), 2**25 + 1, "32 MiB of content in 1 KiB"),
    ):
        what = f"Two defects, a content size that is not the index's and {what}: the first counts"
        content = zstd(data, size)
        yield reject_extent(f"order-zstd-{name}", "Z-2 Z-3 C-4", "malformed", what, content)
    # 2^27 + 1 bytes are within the ratio of a frame of this length, most of it empty blocks.
    most = 2**27 + 1
    length = -(-(most - 2**20) // 1024)
    blocks = run(most)[9:]
    blocks = raw_block(b"", False) * (-(-(length - 9 - len(blocks)) // 3)) + blocks
    data = frame(b"", size=most, blocks=blocks)
    assert most <= 1024 * len(data) + 2**20
    what = "A single segment of 2^27 + 1 bytes, and so a window of as many"
    content = zstd(data, most)
    yield reject_extent("zstd-window-single", "Z-3 L-1 N-3", "limit", what, content)


def section_6_entries() -> Iterator[Vector]:
    for width, zeros in (
        (8, 0.885), (9, 0.3), (10, 0.5), (11, 0.95), (12, 0.6), (13, 0.9), (14, 0.2), (15, 0.8),
        (16, 0.885),
    ):
        book = tunstall(width, zeros)
        # Entries from everywhere in the tree, each with signs of its own.
        step = len(book.entries) // 60 | 1
        levels = [
            -weight if (i + place) % 3 == 0 else weight
            for i, entry in enumerate(book.entries[::step])
            for place, weight in enumerate(entry)
        ]
        columns = -(-len(levels) // 4)
        levels += [0] * (4 * columns - len(levels))
        content = coded(Matrix(rows(levels, columns), bf16(-1, 2) * 4), book, "BF16")
        what = f"A dictionary of {width} bits, fitted to a fraction of {zeros} zeros"
        yield accept(f"dictionary-{width}", "D-1 D-2 D-4 E-12 E-10", what, content)
    content = coded(symmetric([weight for entry in BOOK.entries for weight in entry]))
    what = "Each codeword of 8 bits once, in order"
    yield accept("dictionary-all-entries", "D-4 E-10", what, content)
    what = "A dictionary that no tensor uses"
    yield accept("dictionary-unused", "D-1", what, small().dictionary(BOOK))
    for turns, name, what in (
        ([0] * 255, "255", "An entry of 255 zeros, the longest"),
        ([1] * 16, "16", "An entry of 16 ones, the most"),
        ([0] * 239 + [1] * 16, "255-16", "An entry of 239 zeros and 16 ones, the longest"),
        ([1] * 15 + [0] * 240, "15-255", "An entry of 15 ones and 240 zeros, the longest"),
        ([1], "1", "The second child of the root is a leaf"),
    ):
        book = Book(8, comb(turns, 256))
        content = coded(symmetric(turns + [0] * 300 + turns, [1] * (2 * len(turns) + 300)), book)
        yield accept(f"entry-{name}", "D-3 L-1 E-10", what, content)


def tree(
    name: str, needed: str, code: str, what: str, data: bytes, book: Book = BOOK, /, **keys: int
) -> Vector:
    """A bad tree in place of that of ``book``."""
    content = Content().dictionary(book, data, bytes=len(data)).change("dictionaries", **keys)
    return reject_extent(name, needed, code, what, content)


def bad_tree(
    name: str, needed: str, code: str, what: str, book: Book, /, data: bytes = b"", **keys: int
) -> Vector:
    """A tree that breaks a rule, but is described by the index as well as limits allow."""
    keys = {"max_length": min(book.max_length, 255), "max_ones": min(book.max_ones, 16), **keys}
    return tree(name, needed, code, what, data or book.tree, book, **keys)


def section_6_trees() -> Iterator[Vector]:
    deep = Book(9, comb([0] * 256, 512))
    many = Book(8, comb([1] * 17, 256))
    yield bad_tree("entry-256", "D-3 L-1", "limit", "An entry of 256 bits", deep)
    yield bad_tree("entry-17", "D-3 L-1", "limit", "An entry of 17 ones", many)
    both = Book(9, comb([0] * 200 + [1] * 17, 512))
    yield bad_tree("entry-217-17", "D-3 L-1", "limit", "An entry of 200 zeros and 17 ones", both)
    for name, book in (("256", deep), ("17", many)):
        what = f"Two defects, an entry of {name} and {{}}: the first counts"
        needed = "D-3 C-4"
        yield bad_tree(f"order-entry-{name}-leaves", f"{needed} D-4", "limit",
                       what.format("too many leaves"), book, width=8 if name == "256" else 9)
        yield bad_tree(f"order-entry-{name}-fewer", f"{needed} D-4", "limit",
                       what.format("too few leaves"), book, width=16)
        yield bad_tree(f"order-entry-{name}-length", f"{needed} D-1", "limit",
                       what.format("a wrong max_length"), book, max_length=1)
        yield bad_tree(f"order-entry-{name}-ones", f"{needed} D-1", "limit",
                       what.format("a wrong max_ones"), book, max_ones=0)
        yield bad_tree(f"order-entry-{name}-more", f"{needed} D-2", "limit",
                       what.format("a byte after the tree"), book, book.tree + b"\0")
        padded = patched(book.tree, {-1: book.tree[-1] | 0x80})
        yield bad_tree(f"order-entry-{name}-padding", f"{needed} D-2", "limit",
                       what.format("a bit after the tree"), book, padded)
    late = Book(8, [comb([0] * 20, 256), comb([1] * 16, 256)])
    what = "Two defects, 512 leaves of 256, and a last entry of 17 ones: the second counts"
    yield bad_tree("order-leaves-entry", "D-3 D-4 C-4", "limit", what, late)
    content = Content().dictionary(BOOK, frame(BOOK.tree), encoding="zstd")
    content.int_dict("w", "F32", symmetric([1, 0, -1]))
    yield accept("dictionary-zstd", "D-2 Z-2", "A tree in a Zstandard frame", content)
    for length in (63, 65):
        content = Content().dictionary(BOOK, bytes=length)
        what = f"A tree of 64 bytes, {length} by the index"
        yield reject_extent(f"dictionary-bytes-{length}", "D-2 R-1", "malformed", what, content)
        content = Content().dictionary(BOOK, frame(BOOK.tree), encoding="zstd", bytes=length)
        what = f"{what}, in a Zstandard frame"
        yield reject_extent(f"dictionary-zstd-{length}", "D-2 Z-2", "malformed", what, content)
    for encoding in ("lz4", "int-dict", "int-group"):
        content = Content().dictionary(BOOK, encoding=encoding)
        what = f"A tree in the encoding {encoding}, which is none for dictionaries"
        name = f"dictionary-encoding-{encoding}"
        yield reject_extent(name, "T-5", "unsupported", what, content)
        content.int_dict("w", "F32", symmetric([1]))
        yield reject_extent(f"{name}-used", "T-5", "unsupported", f"{what}, and used", content)
    what = "A tree of inner nodes only, 100 bytes long"
    yield tree("tree-deep", "D-3 L-1 N-3", "limit", what, b"\xff" * 100, BOOK, width=16)
    for leaves in (2, 128, 255, 257, 512):
        book = Book(8, comb([0] * min(20, leaves - 1), leaves))
        what = f"{leaves} leaves instead of 256"
        yield bad_tree(f"tree-{leaves}", "D-4", "malformed", what, book)
    good = BOOK.tree
    yield tree("tree-cut", "D-2", "malformed", "The last byte of the tree is missing", good[:-1])
    what = "The extent of the tree is empty"
    yield tree("tree-none", "D-2 R-1", "malformed", what, b"", BOOK, bytes=64)
    yield tree("tree-more", "D-2", "malformed", "A zero byte after the tree", good + b"\0")
    what = "A byte other than 0 after the tree"
    yield tree("tree-more-one", "D-2", "malformed", what, good + b"\1")
    padded = patched(good, {-1: good[-1] | 0x80})
    yield tree("tree-padding", "D-2", "padding", "The bit after the tree is not zero", padded)
    yield tree("tree-leaf", "D-3", "malformed", "A tree that is one leaf", b"\0")
    for key, value in (("max_length", BOOK.max_length), ("max_ones", BOOK.max_ones)):
        for other in (value - 1, value + 1):
            what = f"{key} is {other}, in the tree it is {value}"
            yield tree(f"tree-{key}-{other}", "D-1", "malformed", what, good, BOOK, **{key: other})
