"""The vectors of SPEC.md section 7: ternary matrices."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tools.conformance_vectors.file_builder import Content
from tools.conformance_vectors.int_dict_builder import (
    SIZES,
    Book,
    Matrix,
    bits_of,
    comb,
    patched,
    segment,
    tunstall,
)
from tools.conformance_vectors.samples import (
    CODEWORD8,
    ONE,
    PLANE8,
    TINY,
    bf16,
    noise,
    rows,
    symmetric,
    ternary,
)
from tools.conformance_vectors.vector import Vector, accept, reject, reject_extent

BASE = [[1, 0, -1, 0, 0], [0, 0, 1, 1, -1]]
LOW_HIGH = bf16(-0.5, 0.75, -3, 0.1)
BOOKS = (("plane", PLANE8), ("codeword", CODEWORD8))


def section_7_scales() -> Iterator[Vector]:
    groups = bf16(*[value / 8 for value in range(1, 13)])
    columns = bf16(1, -2, 0.5, 3, 0.7)
    for name, needed, what, matrix in (
        ("", "E-1 E-4 E-5 V-1 V-3", "Low and high of each row", Matrix(BASE, LOW_HIGH)),
        ("-symmetric", "V-1", "One scale a row", Matrix(BASE, bf16(0.5, 3), symmetric=True)),
        ("-groups", "E-X V-1", "Groups of two columns, the last of one",
         Matrix(BASE, groups, group_size=2)),
        ("-groups-symmetric", "E-X V-1", "Groups of two columns, the last of one",
         Matrix(BASE, groups[:6], group_size=2, symmetric=True)),
        ("-group-1", "E-X", "Groups of one column",
         Matrix([[1] * 3], bf16(1, 2, 3), group_size=1, symmetric=True)),
        ("-group-5", "E-X", "Groups of 5 columns where there are 5",
         Matrix(BASE, LOW_HIGH, group_size=5)),
        ("-group-6", "E-X", "Groups of 6 columns where there are 5",
         Matrix(BASE, LOW_HIGH, group_size=6)),
        ("-columns", "V-2 E-4", "A scale for each column", Matrix(BASE, LOW_HIGH, columns)),
        ("-columns-groups", "V-2 E-X", "Column scales, groups, symmetric",
         Matrix(BASE, groups[:6], columns, group_size=2, symmetric=True)),
    ):
        yield accept(f"ternary{name}", needed, what, ternary(matrix))
    for scale_dtype in ("F16", "BF16", "F32"):
        for dtype in ("F16", "BF16", "F32", "F64"):
            scales = [bits_of(value, scale_dtype) for value in (-0.1, 0.3, -1 / 3, 1000.7)]
            matrix = Matrix(BASE, scales, scales + scales[:1], scale_dtype)
            name = f"ternary-{scale_dtype.lower()}-{dtype.lower()}"
            what = f"Scales of {scale_dtype}, elements of {dtype}"
            yield accept(name, "V-1 V-2 V-3 E-2", what, ternary(matrix, dtype=dtype))


def section_7_3() -> Iterator[Vector]:
    """Arithmetic: what a reader gets wrong that rounds twice, flushes subnormals, or uses FMA."""
    tie = 0x3F800001  # 1 + 2^-23: its product with 1.5 and others lies halfway between two numbers
    for name, dtype, scales, columns, what in (
        ("ties", "F32", (tie, tie),
         (0x3FC00000, 0x3F800001, 0x3F000000, 0x40200000, 0x3FA00000),
         "Products halfway between two numbers of binary32"),
        ("subnormal", "F32", (0x00000001, 0x00800000),
         (0x3F000000, 0x3F000001, 0x3FC00000, 0x3F7FFFFF, 0x3F800000),
         "Subnormal scales and products, kept"),
        ("underflow", "F32", (0x0DA24260, 0x80000001),
         (0x0DA24260, 0x00000001, 0x80000001, 0x33D6BF95, 0x1E3CE508),
         "Products below all numbers: zero, with its sign"),
        ("overflow", "F32", (0x7F7FFFFF, 0xFF000000),
         (0x3F800000, 0x3F800001, 0x40000000, 0x7F7FFFFF),
         "Products beyond all numbers: infinity"),
        ("f16", "F16", (0x3F800000, 0x477FF000),
         (0x477FEFFF, 0x477FF000, 0x3F801000, 0x33000000, 0x33000001),
         "Rounding to F16: ties, overflow, underflow"),
        ("bf16", "BF16", (0x3F800000, 0x7F7FFFFF),
         (0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F7FFF, 0x00008000),
         "Rounding to BF16: ties, overflow, subnormal"),
        ("f64", "F64", (0x3F9D70A4, 0x3FFFFFFF), (0x3F9D70A4, 0x40490FDB, 0x3EAAAAAB),
         "To F64: rounded once, to binary32"),
        # The product is a little more than 1 + 2^-11, the middle between two numbers of F16:
        # rounding it to binary32 makes it the middle itself, and that goes to the even one, 1.
        ("twice", "F16", (0x3F801001, 0x3F801001), (0x3F7FFFFF, 0x3F800000),
         "Rounded to binary32 and then to F16, as the text says"),
    ):
        levels = [[1] * len(columns), [-1] * len(columns)]
        matrix = Matrix(levels, scales, columns, "F32", symmetric=True)
        yield accept(f"value-{name}", "V-2 V-3", what, ternary(matrix, TINY, dtype))
    levels = [[1, -1, 0, 1, -1]] * 3
    least = (0x0000, 0x8000, 0x8001, 0x0001)
    for scale_dtype, dtype, greatest in (("F16", "F32", 0x7BFF), ("BF16", "F16", 0x7F7F)):
        matrix = Matrix(levels, [*least, greatest, greatest | 0x8000], None, scale_dtype)
        what = f"Zero, minus zero, subnormal and greatest scales of {scale_dtype}; low above high"
        name = f"value-{scale_dtype.lower()}-scales"
        yield accept(name, "V-1 V-3", what, ternary(matrix, TINY, dtype))
    matrix = Matrix(levels, [0x8000, 0x0000, 0xBF80], symmetric=True)
    what = "Symmetric scales of minus zero, zero and -1"
    yield accept("value-sign", "V-1", what, ternary(matrix, TINY))
    matrix = Matrix([[0, 1, -1]], bf16(-1, 2), [*bf16(-1, 0), 0x8000])
    what = "Zeros stay +0 under a negative column scale; column scales of zero"
    yield accept("value-zero", "V-2", what, ternary(matrix, TINY))


def section_7_shapes() -> Iterator[Vector]:
    for name, levels, what in (
        ("1x1", [[-1]], "A matrix of one weight"),
        ("1x1-zero", [[0]], "A matrix of one zero"),
        ("column", [[1], [0], [-1]], "A matrix of one column"),
        ("row", [[0, 1, 0, 0, 0, -1, 0]], "A matrix of one row"),
        ("zeros", [[0] * 40] * 3, "Rows of zeros only"),
        ("nonzeros", [[1, -1] * 20] * 2, "Rows of non-zeros only"),
        ("long", [[0] * 600, [0] * 599 + [1]], "Rows longer than any entry"),
        ("overrun", [[0, 0], [1, 0], [0, -1]], "Rows shorter than their entries"),
    ):
        for signs, book in BOOKS:
            content = ternary(Matrix(levels, bf16(-2, 3) * len(levels)), book)
            yield accept(f"shape-{name}-{signs}", "E-10 E-11 E-13 E-14", what, content)
    for name, needed, what, matrix in (
        ("no-columns", "E-4 E-7 E-9", "Three rows of no columns, one group",
         Matrix([[], [], []], bf16(1, 2, 3), symmetric=True)),
        ("no-columns-groups", "E-X E-4", "Two rows of no columns and no groups",
         Matrix([[], []], [], group_size=4)),
        ("no-rows", "E-4 E-9", "Seven columns without rows", Matrix([], [], columns=7)),
        ("no-rows-columns", "E-4 E-9", "The same with column scales",
         Matrix([], [], bf16(*range(7)), columns=7)),
        ("nothing", "E-4 E-9", "No rows and no columns", Matrix([], [])),
    ):
        yield accept(f"shape-{name}", needed, what, ternary(matrix))
    content = Content().dictionary(PLANE8)
    content.ternary("w", "BF16", shape=[0, 4, 5], stack=True, members="w.{}")
    yield accept("shape-no-experts", "T-1", "A ternary stack without experts", content)
    for count in (31, 32, 33, 65):
        levels = rows(noise(count * 9, 12, count), 9)
        matrix = Matrix(levels, [ONE + i for i in range(count)], symmetric=True)
        what = f"{count} rows: {-(-count // 32)} blocks"
        yield accept(f"rows-{count}", "E-6", what, ternary(matrix))


def section_7_rows_per_segment() -> Iterator[Vector]:
    """[E-3], and the room that [E-7] demands."""
    for together in (2, 3, 7, 8, 100):
        levels = rows(noise(7 * 50, 6, together), 50)
        matrix = Matrix(
            levels, [ONE + i for i in range(7)], symmetric=True, rows_per_segment=together)
        what = f"Seven rows in segments of {together}"
        for signs, book in BOOKS:
            name = f"rows-together-{together}-{signs}"
            yield accept(name, "E-3 E-10 E-11", what, ternary(matrix, book))
    levels = rows(noise(70 * 9, 4, 1), 9)
    scales = [ONE + i for i in range(140)]
    matrix = Matrix(levels, scales, group_size=5, symmetric=True, rows_per_segment=2)
    what = "35 segments of two rows, two groups a row"
    yield accept("rows-together-blocks", "E-3 E-6 E-X", what, ternary(matrix))
    matrix = Matrix([[]] * 5, bf16(*range(5)), symmetric=True, rows_per_segment=2)
    what = "Three segments of nothing"
    yield accept("rows-together-no-columns", "E-3 E-7", what, ternary(matrix))
    content = ternary(Matrix(levels, scales[:70], symmetric=True)).change(rows_per_segment=0)
    yield reject("rows-per-segment-0", "E-3 L-1", "limit", "No rows in a segment", content)
    content.change(rows_per_segment=2**31)
    what = "2^31 rows in a segment, one more than the most"
    yield reject("rows-per-segment-2147483648", "E-3 L-1", "limit", what, content)
    content.change(rows_per_segment=2)
    what = "Segments of two rows by the index, of one in the extent"
    yield reject_extent("rows-per-segment-2", "E-3 E-4", "malformed", what, content)
    content = ternary(Matrix(levels, scales[:70], symmetric=True, rows_per_segment=70))
    content.change(rows_per_segment=2**31 - 1)
    what = "2^31 - 1 rows in a segment, the most, where there are 70"
    yield accept("rows-per-segment-most", "E-3 L-1", what, content)
    # Two segments of 2 x 510 weights, which take 4 codewords each, and one of 510.
    longest = Book(8, "plane", comb([0] * 255, 256))
    zeros = symmetric(*[[0] * 510] * 5, rows_per_segment=2)
    for place, least in ((0, 4), (2, 2)):
        content = ternary(zeros, longest, segments={place: bytes(least)})
        what = f"Segment {place} has just as many bytes as there are entries of 255 zeros"
        yield accept(f"segment-room-{place}", "E-7 E-3", what, content)
        content = ternary(zeros, longest, segments={place: bytes(least - 1)})
        what = f"Segment {place} has one byte less than that"
        yield reject_extent(f"segment-room-{place}-less", "E-7 E-3", "malformed", what, content)


def section_7_stacks() -> Iterator[Vector]:
    matrices = [
        Matrix(rows(noise(3 * 20, zeros, zeros), 20), bf16(-1, zeros + 1) * 3)
        for zeros in (0, 4, 8, 12, 16)
    ]
    content = Content().dictionary(PLANE8).dictionary(tunstall(8, "plane", 0.3))
    content.ternary("w", "BF16", *matrices, members="w.{}.weight", dictionaries=(0, 1))
    what = "Five experts, two dictionaries in turn"
    yield accept("stack-dictionaries", "E-1 T-1 T-2", what, content)
    content = Content().dictionary(TINY).ternary("w", "F32", symmetric([1, -1]), stack=True)
    yield accept("stack-one", "T-1", "A ternary stack of one expert", content)
    line = noise(90, 2, 5)
    lines = [symmetric(line[:i] + [0] * (90 - i)) for i in range(0, 90, 5)]
    content = Content().dictionary(PLANE8).ternary("w", "BF16", *lines)
    yield accept("stack-guards", "E-4 E-5", "Segments and guards of many lengths", content)
    content = Content().dictionary(TINY).dictionary(PLANE8).dictionary(CODEWORD8)
    for number, name in enumerate("abc"):
        content.ternary(name, "F32", symmetric([1, 0]), dictionaries=(number,))
    yield accept("ternary-three", "E-1", "Three tensors with a dictionary each", content)


def segment_lengths(matrix: Matrix) -> list[int]:
    codes = [PLANE8.parse(row) for row in matrix.levels]
    return [len(segment(codewords, 8, signs)) for codewords, signs in codes]


def section_7_lengths() -> Iterator[Vector]:
    for nonzeros, difference in ((589, 255), (590, 256)):
        matrix = symmetric([0] * 2000, noise(nonzeros, 0, 1) + [0] * (2000 - nonzeros))
        least, most = segment_lengths(matrix)
        assert most - least == difference
        what = f"Two segments that differ by {difference} bytes: length_width 1, or 2"
        yield accept(f"length-{difference}", "E-9", what, ternary(matrix))


def bad(
    name: str, needed: str, code: str, what: str, matrix: Matrix | None = None, **defects: Any
) -> Vector:
    """A defect of an extent."""
    content = ternary(matrix or Matrix(BASE, LOW_HIGH), **defects)
    return reject_extent(f"extent-{name}", needed, code, what, content)


def section_7_dictionary() -> Iterator[Vector]:
    """[E-1]"""
    for number in (1, 2**32 - 1):
        what = f"Dictionary {number} of 1"
        yield bad(f"dictionary-{number}", "E-1", "malformed", what, dictionary=number)
    keys: dict[str, Any]
    for name, book, keys in (
        ("width", tunstall(9, "plane", 0.9), {"width": 8}), ("signs", TINY, {"signs": "plane"}),
    ):
        content = Content().dictionary(PLANE8).dictionary(book)
        content.ternary("w", "F32", Matrix(BASE, LOW_HIGH), defects={"dictionary": 1})
        what = f"The header names a dictionary of other {name} than the segments have"
        yield reject_extent(f"extent-dictionary-{name}", "E-1", "malformed", what, content)
        content = ternary(Matrix(BASE, LOW_HIGH), book).change(**keys)
        what = f"The index entry has other {name} than the dictionary and the segments"
        yield reject_extent(f"extent-dictionary-{name}-index", "E-1", "malformed", what, content)


def section_7_index() -> Iterator[Vector]:
    """[E-2], [J-4]"""
    def change(name: str, needed: str, what: str, **keys: Any) -> Vector:
        content = ternary(symmetric([1]), TINY).change(**keys)
        return reject(f"ternary-{name}", needed, "malformed", what, content)

    for dtype in ("U8", "I32", "F8_E4M3", "BOOL"):
        yield change(f"dtype-{dtype.lower()}", "E-2", f"A ternary tensor of {dtype}", dtype=dtype)
    for shape, stack in (([1], False), ([1, 1, 1], False), ([1, 1], True), ([1, 1, 1, 1], True)):
        kind = "stack" if stack else "tensor"
        what = f"A ternary {kind} of {len(shape)} dimensions"
        yield change(f"{kind}-{len(shape)}", "E-2", what, shape=shape, stack=stack)
    for key, other in (
        ("signs", "none"), ("signs", ""), ("scale_dtype", "F64"), ("scale_dtype", ""),
    ):
        what = f"A ternary tensor's {key} is {other!r}"
        yield change(f"{key}-{other.lower() or 'empty'}", "J-4", what, **{key: other})


def section_7_1_sections() -> Iterator[Vector]:
    """[E-4], [E-5]"""
    good = ternary(Matrix(BASE, LOW_HIGH)).extents[1]
    for name, what, data in (
        ("empty", "The extent is empty", b""),
        ("31", "The extent ends within its header", good[:31]),
        ("32", "The extent ends after its header", good[:32]),
        ("shorter", "The guard is one byte short", good[:-1]),
        ("shorter-16", "The last 16 bytes are missing", good[:-16]),
        ("longer", "A zero byte after the guard", good + b"\0"),
        ("longer-16", "16 zero bytes after the guard", good + bytes(16)),
    ):
        content = ternary(Matrix(BASE, LOW_HIGH))
        content.extents[1] = data
        yield reject_extent(f"extent-{name}", "E-4", "malformed", what, content)
    keys: dict[str, Any]
    for name, needed, keys, what in (
        ("rows", "E-4 N-3", {"shape": [2**31 - 1, 5]}, "2^31 - 1 rows by the index"),
        ("rows-less", "E-4", {"shape": [1, 5]}, "One row by the index, eight in the extent"),
        ("columns", "E-4 N-3", {"shape": [2, 2**31 - 1], "column_scale": True},
         "2^31 - 1 column scales"),
        ("column-scale", "E-4", {"column_scale": True},
         "Column scales by the index, none in the extent"),
        ("groups", "E-4", {"group_size": 1}, "Five groups by the index, one in the extent"),
        ("scale-dtype", "E-4", {"scale_dtype": "F32"}, "Scales twice as wide by the index"),
    ):
        content = ternary(Matrix(BASE * 4, LOW_HIGH * 4)).change(**keys)
        yield reject_extent(f"extent-{name}", needed, "malformed", what, content)
    total = sum(segment_lengths(Matrix(BASE, LOW_HIGH)))
    for name, value, needed, code, what in (
        ("4294967295", 2**32 - 1, "E-4 N-3", "malformed", "4294967295"),
        ("4294967296", 2**32, "E-4 L-1 N-3", "limit", "4294967296"),
        ("18446744073709551615", 2**64 - 1, "E-4 L-1 N-3", "limit", "18446744073709551615"),
        ("16", total + 16, "E-4", "malformed", "16 too great"),
    ):
        what = f"segment_bytes is {what}"
        yield bad(f"segment-bytes-{name}", needed, code, what, segment_bytes=value)
    for value in (0, 3, 8, 255):
        content = ternary(symmetric([1]), TINY)
        content.extents[1] = patched(content.extents[1], {8: value})
        what = f"length_width is {value}"
        yield reject_extent(f"extent-length-width-{value}", "E-4 E-9", "malformed", what, content)
    for place in (0, 6):
        what = f"Byte {9 + place} of the header is not zero"
        zero = patched(bytes(7), {place: 1})
        yield bad(f"header-{9 + place}", "E-5", "padding", what, zero=zero)
    full = Matrix(BASE, LOW_HIGH, bf16(1, 1, 1, 1, 1))
    for place, (name, section) in enumerate((
        ("scales", "the row scales"), ("scales-columns", "the column scales"),
        ("offsets", "the block offsets"), ("lengths", "the lengths"), ("segments", "the segments"),
    )):
        for end, at in (("first", 0), ("last", -1)):
            what = f"The {end} zero byte after {section} is not zero"
            gaps = {place: {at: 1}}
            yield bad(f"gap-{name}-{end}", "E-5", "padding", what, full, gaps=gaps)


def section_7_1_lengths() -> Iterator[Vector]:
    """[E-6], [E-9]"""
    two = Matrix([[0] * 5, BASE[1]], LOW_HIGH)
    least, most = segment_lengths(two)
    more = most - least
    many = Matrix(rows(noise(33 * 3, 8, 7), 3), [ONE] * 33, symmetric=True)
    wide = symmetric([0] * 2000, noise(600, 0, 1) + [0] * 1400)
    nothing = Matrix([], [], columns=3)
    defects: dict[str, Any]
    for name, needed, what, matrix, defects in (
        ("row-length-more", "E-6", "A length is too great", two, {"lengths": {1: more + 1}}),
        ("row-length-less", "E-6", "A length is too small", two, {"lengths": {1: more - 1}}),
        ("segment-bytes-1", "E-6", "segment_bytes is one more than the lengths", two,
         {"segment_bytes": least + most + 1}),
        ("length-base-sum", "E-6", "length_base is one too great", two,
         {"length_base": least + 1, "lengths": {0: 0, 1: more}}),
        ("offset-first", "E-6", "The first block begins at 1", many, {"offsets": {0: 1}}),
        ("offset-second", "E-6", "The second block begins at 0", many, {"offsets": {1: 0}}),
        ("offset-huge", "E-6", "The second block begins at 2^32 - 1", many,
         {"offsets": {1: 2**32 - 1}}),
        ("length-base", "E-9", "length_base is 0 where the least length is 1", two,
         {"length_base": 0}),
        ("length-width-wide-2", "E-9", "length_width is 2 where 1 is enough", two,
         {"length_width": 2}),
        ("length-width-wide-4", "E-9", "length_width is 4 where 1 is enough", two,
         {"length_width": 4}),
        ("length-width-wide-2-4", "E-9", "length_width is 4 where 2 is enough", wide,
         {"length_width": 4}),
        ("length-base-no-rows", "E-9", "length_base is 1 of no rows", nothing, {"length_base": 1}),
        ("length-width-no-rows-2", "E-9", "length_width is 2 of no rows", nothing,
         {"length_width": 2}),
        ("length-width-no-rows-4", "E-9", "length_width is 4 of no rows", nothing,
         {"length_width": 4}),
        ("segments-no-rows", "E-6", "segment_bytes is 1 of no rows", nothing, {"segment_bytes": 1}),
    ):
        yield bad(name, needed, "malformed", what, matrix, **defects)


def section_7_1_numbers() -> Iterator[Vector]:
    """[E-8], [E-14]"""
    for dtype, infinity in (("BF16", 0x7F80), ("F16", 0x7C00), ("F32", 0x7F800000)):
        minus = 1 << (8 * SIZES[dtype] - 1)
        one = bits_of(1, dtype)
        for name, bits in (
            ("inf", infinity), ("-inf", infinity | minus), ("nan", infinity + 1),
            ("-nan", infinity | minus | 1),
        ):
            matrix = Matrix([[0, 1]], [one, bits], scale_dtype=dtype)
            what = f"A row scale of {name} in {dtype}"
            yield bad(f"scale-{dtype.lower()}-{name}", "E-8", "value", what, matrix)
        matrix = Matrix([[0, 1]], [one, one], [infinity + 1, one], dtype)
        what = f"A column scale of NaN in {dtype}, of a column of zeros"
        yield bad(f"scale-column-{dtype.lower()}", "E-8", "value", what, matrix)
    for value in (0, 4, 6, 2**64 - 1):
        what = f"nonzeros is {value}, there are 5"
        yield bad(f"nonzeros-{value}", "E-14", "malformed", what, nonzeros=value)


def bad_segment(
    name: str, needed: str, code: str, what: str, row: Sequence[int], wrong: bytes,
    book: Book = PLANE8, **defects: Any,
) -> Vector:
    """A matrix of one row with ``wrong`` in place of its segment."""
    content = ternary(symmetric(row), book, segments={0: wrong}, **defects)
    return reject_extent(f"segment-{name}", needed, code, what, content)


def section_7_2() -> Iterator[Vector]:
    zeros, row = [0] * 600, [1, 0, -1, 0, 0]
    few, _ = PLANE8.parse(zeros)
    codewords, signs = PLANE8.parse(row)
    nine = Book(9, "plane", comb([0] * 10, 512))
    nine_codewords, nine_signs = nine.parse(row)
    ten = Book(10, "codeword", [[], []])
    right = segment(codewords, 8, signs)
    for name, needed, code, what, levels, wrong, book in (
        ("least", "E-7 E-13", "malformed",
         "Two bytes for 600 columns, which no three entries can fill",
         zeros, segment(few, 8, [])[:2], PLANE8),
        ("none", "E-7 E-13 N-3", "malformed", "No bytes for 5 columns", [0] * 5, b"", PLANE8),
        ("cut", "E-10 E-13", "malformed", "The last codeword of a row is missing",
         zeros, segment(few[:-1], 8, []), PLANE8),
        ("codeword-more", "E-10 E-13", "malformed", "A codeword more than the row needs",
         zeros, segment([*few, 0], 8, []), PLANE8),
        ("overlap", "E-13", "malformed", "A segment without its signs",
         row, segment(codewords, 8, []), PLANE8),
        ("byte-more", "E-13", "malformed", "A zero byte between codewords and signs",
         row, segment(codewords, 8, signs, 1), PLANE8),
        ("bit-first", "E-13", "padding", "The first bit between signs and codewords is set",
         row, segment(codewords, 8, signs, 0, 1), PLANE8),
        ("bit-last", "E-13", "padding", "The last bit between signs and codewords is set",
         row, segment(codewords, 8, signs, 0, 1 << 5), PLANE8),
        ("bit-9", "E-13", "padding", "A bit between 9-bit codewords and signs is set",
         row, segment(nine_codewords, 9, nine_signs, 0, 1), nine),
        ("codeword-byte-more", "E-12 E-13", "malformed",
         "Signs in the codewords, and a zero byte after them",
         row, segment(CODEWORD8.parse(row)[0], 8, [], 1), CODEWORD8),
        ("codeword-bit", "E-13", "padding",
         "Signs in the codewords of 10 bits, and one of the two bits after them set",
         [0, 1, -1], segment(ten.parse([0, 1, -1])[0], 10, [], 0, 1), ten),
    ):
        assert not name.startswith("bit-") or len(wrong) == len(right) or book is nine
        yield bad_segment(name, needed, code, what, levels, wrong, book)
    for signs_in, book in BOOKS:  # [E-11]
        entry = next(e for e in book.entries if len(e) > 3 and sum(e) == 1 and e[-1] == 1)
        row = [0] * (len(entry) - 1)
        wrong = segment([book.first[entry]], 8, [0] if signs_in == "plane" else [])
        what = f"The last weight of an entry, beyond the row, is not zero ({signs_in})"
        yield bad_segment(f"overrun-{signs_in}", "E-11", "malformed", what, row, wrong, book)
        what = f"The same with nonzeros one greater ({signs_in})"
        yield bad_segment(
            f"overrun-counted-{signs_in}", "E-11", "malformed", what, row, wrong, book, nonzeros=1)
    for codeword in (TINY.codewords, 255):
        what = f"Codeword {codeword} of a dictionary that ends at 2"
        wrong = bytes([codeword])
        yield bad_segment(f"codeword-{codeword}", "D-X", "malformed", what, [1], wrong, TINY)
