"""The vectors of SPEC.md section 7: int-dict matrices."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tools.conformance_vectors.exact_numbers import bf16
from tools.conformance_vectors.file_builder import Content
from tools.conformance_vectors.int_dict_builder import (
    Book,
    Matrix,
    comb,
    mask,
    patched,
    refinement,
    segment,
    signs,
    tunstall,
)
from tools.conformance_vectors.samples import (
    BASE,
    BOOK,
    LEVELS,
    LOW_HIGH,
    ONE,
    UNARY,
    coded,
    noise,
    rows,
    symmetric,
)
from tools.conformance_vectors.vector import Vector, accept, reject, reject_extent

COLUMNS = bf16(1, -2, 0.5, 3, 0.7)


def section_7_scales() -> Iterator[Vector]:
    for kind, levels in (("ternary", BASE), ("refined", LEVELS)):
        for name, needed, what, matrix in (
            ("", "E-1 E-4 E-5 V-1 V-3", "low and high of each row", Matrix(levels, LOW_HIGH)),
            ("-symmetric", "V-1", "one scale a row",
             Matrix(levels, bf16(0.5, -3), symmetric=True)),
            ("-columns", "V-2 E-4", "a scale for each column", Matrix(levels, LOW_HIGH, COLUMNS)),
            ("-columns-symmetric", "V-1 V-2", "one scale a row and a column",
             Matrix(levels, bf16(0.5, 3), COLUMNS, symmetric=True)),
        ):
            what = f"A {kind} matrix, {what}"
            yield accept(f"int-dict-{kind}{name}", needed, what, coded(matrix))
    for dtype in ("F16", "BF16", "F32", "F64"):
        scales = bf16(-0.1, 0.3, -1 / 3, 1000.7)
        matrix = Matrix(LEVELS, scales, [*scales, scales[0]])
        name = f"int-dict-{dtype.lower()}"
        yield accept(name, "V-1 V-2 V-3 E-2", f"Elements of {dtype}", coded(matrix, dtype=dtype))


def section_7_3() -> Iterator[Vector]:
    """Arithmetic: rounding, overflow, subnormal numbers, signs of zero."""
    every = list(range(-127, 128))
    matrix = Matrix([every, every[::-1]], bf16(0.7, -1 / 3, -5, 1e-30))
    yield accept("value-levels", "V-1 E-10", "Each level from -127 to 127", coded(matrix))
    for name, dtype, scales, what in (
        ("least", "F32", [0x0001, 0x8003], "The least subnormal scales times levels: exact"),
        ("greatest", "F32", [0x7F7F, 0xFF7F],
         "The greatest scales: infinity from level 2 on"),
        ("great", "F32", [0x7E00, 0xFE01], "Great scales: infinity from level 8 on"),
        # 17 x 129 and 21 x 195 have 12 bits, binary16 has 11; the second is next to infinity.
        ("f16", "F16", bf16(-1 / 3, 129), "Rounding to F16: ties"),
        ("f16-great", "F16", bf16(-195 * 16, 195 * 16), "Rounding to F16: overflow at a tie"),
        ("f16-small", "F16", bf16(-(2**-25), 3 * 2**-25), "Subnormals of F16: ties"),
        ("bf16", "BF16", bf16(-131 / 128, 129 / 128), "Rounding to BF16: ties"),
        # 7 x 73 = 511 and 127 x 129 = 2^14 - 1, both near 2^128.
        ("bf16-great", "BF16", bf16(129 * 2**114, 73 * 2**119),
         "Finite in binary32, infinite in BF16"),
        ("bf16-infinite", "BF16", [0x7F7F, 0xFF7F], "Infinite in binary32, and so in BF16"),
        ("f64-infinite", "F64", [0x7F7F, 0xFF7F], "Infinite in binary32, and so in F64"),
    ):
        row = [1, -1, 3, -3, 7, -7, 8, -8, 17, -17, 21, -21, 0, 127, -127]
        content = coded(Matrix([row], scales), dtype=dtype)
        yield accept(f"value-level-{name}", "V-1 V-3", what, content)
    for name, dtype, scales, columns, what in (
        ("exact", "F32", bf16(255 / 128, -129 / 128), bf16(255 / 128, 253 / 128),
         "Products of 23 bits, which binary32 holds"),
        ("subnormal", "F32", [0x0040, 0x8041], [0x3F01, 0x3E03, 0x3F7F, 0x3380, 0x3400],
         "Subnormal products, kept; ties; level times scale times column scale in this order"),
        ("underflow", "F32", [0x0DA2, 0x8001], [0x0DA2, 0x0001, 0x8001, 0x33D7, 0x1E3D],
         "Products below all numbers: zero, with its sign"),
        ("overflow", "F32", [0x7F7F, 0xFF00], [0x3F80, 0x3F81, 0x4000, 0x7F7F],
         "Products beyond all numbers: infinity"),
        ("infinite", "F32", [0x7F7F, 0xFF7F], [0x3F00, 0xBE80, 0x0001],
         "A level times its scale is infinite: it stays so whatever the column's scale is"),
        ("f16", "F16", bf16(1, -1.5), bf16(65536, 65280, 2**-24, 2**-25, 129 / 128),
         "Rounding to F16: overflow, subnormal, ties"),
        # 177 x 187 x 99 / 4 is just above 12.5 x 2^16, 171 x 219 x 21 / 8 just below 1.5 x 2^16:
        # in units of 2^-149 they round to these ties of BF16, and those to even numbers.
        ("twice", "BF16", bf16(177 * 2**-75, 171 * 2**-76), bf16(187 * 2**-76, 219 * 2**-76),
         "Rounded to binary32 and then to BF16, as the text says"),
        ("f64", "F64", [0x0041, 0x3F9D], [0x3EAB, 0x3F03, 0x0341],
         "To F64: rounded once, to binary32"),
    ):
        levels = [[level] * len(columns) for level in (1, -1, 3, -3, 99, -99, 21, -21)]
        matrix = Matrix(levels, scales * len(levels), columns)
        yield accept(f"value-{name}", "V-2 V-3", what, coded(matrix, dtype=dtype))
    levels = [[1, -1, 0, 1, -1]] * 3
    matrix = Matrix(levels, [0x0000, 0x8000, 0x8001, 0x0001, 0x7F7F, 0xFF7F])
    what = "Zero, minus zero, subnormal and greatest scales; low above high"
    for dtype in ("F16", "F32"):
        content = coded(matrix, dtype=dtype)
        yield accept(f"value-scales-{dtype.lower()}", "V-1 V-3", what, content)
    matrix = Matrix([[1, -1, 0, 2, -2]] * 3, [0x8000, 0x0000, 0xBF80], symmetric=True)
    what = "Symmetric scales of minus zero, zero and -1"
    yield accept("value-sign", "V-1", what, coded(matrix))
    matrix = Matrix([[0, 1, -1, 2]], bf16(-1, 2), [*bf16(-1, 0), 0x8000, 0x8000])
    what = "Zeros stay +0 under a negative column scale; column scales of zero"
    yield accept("value-zero", "V-2", what, coded(matrix))


def section_7_shapes() -> Iterator[Vector]:
    for name, levels, what in (
        ("1x1", [[-1]], "A matrix of one weight"),
        ("1x1-zero", [[0]], "A matrix of one zero"),
        ("1x1-127", [[-127]], "A matrix of one weight of level -127"),
        ("column", [[1], [0], [-2]], "A matrix of one column"),
        ("row", [[0, 1, 0, 0, 0, -1, 0]], "A matrix of one row"),
        ("zeros", [[0] * 40] * 3, "Rows of zeros only"),
        ("nonzeros", [[1, -1] * 20] * 2, "Rows of non-zeros only"),
        ("twos", [[2, -2] * 20] * 2, "Rows of twos only"),
        ("long", [[0] * 600, [0] * 599 + [1]], "Rows longer than any entry"),
        ("overrun", [[0, 0], [1, 0], [0, -1]], "Rows shorter than their entries"),
        ("overrun-refined", [[0, 2], [-1, 0], [3, 0]],
         "Rows shorter than their entries, refinements too"),
    ):
        content = coded(Matrix(levels, bf16(-2, 3) * len(levels)))
        yield accept(f"shape-{name}", "E-10 E-11 E-13 E-14", what, content)
    for name, needed, what, matrix in (
        ("no-columns", "E-4 E-7 E-9", "Three rows of no columns",
         Matrix([[], [], []], bf16(1, 2, 3), symmetric=True)),
        ("no-rows", "E-4 E-9", "Seven columns without rows", Matrix([], [], columns=7)),
        ("no-rows-columns", "E-4 E-9", "The same with column scales",
         Matrix([], [], bf16(*range(7)), columns=7)),
        ("nothing", "E-4 E-9", "No rows and no columns", Matrix([], [])),
    ):
        yield accept(f"shape-{name}", needed, what, coded(matrix))
    content = Content().dictionary(BOOK)
    content.int_dict("w", "BF16", shape=[0, 4, 5], stack=True, members="w.{}")
    yield accept("shape-no-experts", "T-1", "An int-dict stack without experts", content)
    for count in (31, 32, 33, 65):
        levels = rows(noise(count * 9, 12, count, 1 + count % 2), 9)
        matrix = symmetric(*levels)
        matrix.row_scales = [ONE + i for i in range(count)]
        what = f"{count} rows: {-(-count // 32)} blocks"
        yield accept(f"rows-{count}", "E-6", what, coded(matrix))


def section_7_refined() -> Iterator[Vector]:
    for name, levels, what in (
        ("one", [[0, 1, 0, -1], [1, 1, 1, 1], [0, 0, -2, 0]], "One level beyond -1 to 1"),
        ("empty", [[0] * 9, [2, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 9],
         "Segments of zeros only, whose refinements are empty"),
        ("plain", [[1, -1, 1, 0, 0, 1], [-2, 1, 0, 0, 1, 1]], "A segment of ones only"),
        ("126", [[0, 127, 0], [-127, 1, 127]], "126 ones in a row, the most, thrice"),
        ("neighbors", [[127, -127, 127, -127]] * 2, "Neighbors of the greatest magnitude"),
        ("noise", rows(noise(900, 7, 1, 20), 90), "Levels of many magnitudes"),
        ("dense", rows(noise(900, 0, 2, 4), 90), "No level of 0"),
    ):
        content = coded(Matrix(levels, bf16(-2, 3) * len(levels)))
        yield accept(f"refined-{name}", "E-10 E-11 E-12 E-15 E-16", what, content)
        both = coded(symmetric(*levels, rows_per_segment=2), tunstall(9, 0.8), unary=BOOK)
        if name in ("one", "empty", "noise"):
            what = f"{what}; two rows in a segment, wider codewords for the mask"
            yield accept(f"refined-{name}-together", "E-3 E-10 E-1", what, both)
    matrix = symmetric(*LEVELS)
    content = Content().dictionary(BOOK).int_dict("w", "F32", matrix)
    what = "Mask and refinement have the same dictionary"
    yield accept("refined-same-dictionary", "E-1 E-10", what, content)
    content = Content().dictionary(UNARY).dictionary(BOOK)
    content.int_dict("w", "F32", matrix, dictionaries=[(1, 0)])
    what = "The refinement's dictionary is before the mask's"
    yield accept("refined-dictionary-first", "E-1", what, content)
    ones = Book(16, comb([1] * 16, 2**16))
    content = coded(symmetric(noise(60, 6, 3, 127), [127] * 60), unary=ones)
    what = "A refinement of 16-bit codewords, whose longest entry is 16 ones"
    yield accept("refined-16", "E-10 E-13 E-15", what, content)
    content = coded(symmetric([1] * 520 + [2]), unary=Book(8, comb([0] * 255, 256)))
    what = "A refinement of 520 zeros, which three entries hold"
    yield accept("refined-zeros", "E-10 E-7", what, content)
    ternary = [symmetric(BASE[0]), symmetric([2, 0, 0, 0, -9]), symmetric([0] * 5)]
    content = Content().dictionary(BOOK).dictionary(UNARY).int_dict("w", "BF16", *ternary)
    yield accept("refined-some", "E-4 E-16 T-1", "A stack with one refined expert", content)


def section_7_rows_per_segment() -> Iterator[Vector]:
    """[E-3], and the room that [E-7] demands."""
    for together in (2, 3, 7, 8, 100):
        levels = rows(noise(7 * 50, 6, together, together % 3 + 1), 50)
        matrix = symmetric(*levels, rows_per_segment=together)
        matrix.row_scales = [ONE + i for i in range(7)]
        what = f"Seven rows in segments of {together}"
        yield accept(f"rows-together-{together}", "E-3 E-10 E-11", what, coded(matrix))
    levels = rows(noise(70 * 9, 4, 1, 3), 9)
    scales = [ONE + i for i in range(140)]
    columns = bf16(*range(1, 10))
    matrix = Matrix(levels, scales, columns, rows_per_segment=2)
    what = "35 segments of two rows, with everything: low and high, column scales, refinement"
    yield accept("rows-together-blocks", "E-3 E-6 V-1 V-2", what, coded(matrix))
    matrix = Matrix([[]] * 5, bf16(*range(5)), symmetric=True, rows_per_segment=2)
    what = "Three segments of nothing"
    yield accept("rows-together-no-columns", "E-3 E-7", what, coded(matrix))
    content = coded(Matrix(levels, scales[:70], symmetric=True)).change(rows_per_segment=0)
    yield reject("rows-per-segment-0", "E-3 L-1", "limit", "No rows in a segment", content)
    content.change(rows_per_segment=2**31)
    what = "2^31 rows in a segment, one more than the most"
    yield reject("rows-per-segment-2147483648", "E-3 L-1", "limit", what, content)
    content.change(dtype="F4")
    what = "The same of an element type that no reader knows"
    yield reject("rows-per-segment-unknown", "E-3 L-1 T-5", "limit", what, content)
    content.change(rows_per_segment=2, dtype="F32")
    what = "Segments of two rows by the index, of one in the extent"
    yield reject_extent("rows-per-segment-2", "E-3 E-4", "malformed", what, content)
    content = coded(Matrix(levels, scales[:70], symmetric=True, rows_per_segment=70))
    content.change(rows_per_segment=2**31 - 1)
    what = "2^31 - 1 rows in a segment, the most, where there are 70"
    yield accept("rows-per-segment-most", "E-3 L-1", what, content)
    # Two segments of 2 x 510 weights, which take 4 codewords each, and one of 510.
    longest = Book(8, comb([0] * 255, 256))
    zeros = symmetric(*[[0] * 510] * 5, rows_per_segment=2)
    for place, least in ((0, 4), (2, 2)):
        content = coded(zeros, longest, segments={place: bytes(least)})
        what = f"Segment {place} has just as many bytes as there are entries of 255 zeros"
        yield accept(f"segment-room-{place}", "E-7 E-3", what, content)
        content = coded(zeros, longest, segments={place: bytes(least - 1)})
        what = f"Segment {place} has one byte less than that"
        yield reject_extent(f"segment-room-{place}-less", "E-7 E-3", "malformed", what, content)


def section_7_stacks() -> Iterator[Vector]:
    matrices = [
        Matrix(rows(noise(3 * 20, zeros, zeros), 20), bf16(-1, zeros + 1) * 3)
        for zeros in (0, 4, 8, 12, 16)
    ]
    content = Content().dictionary(BOOK).dictionary(tunstall(8, 0.3))
    content.int_dict("w", "BF16", *matrices, members="w.{}.weight", dictionaries=((0, 0), (1, 1)))
    what = "Five experts, two dictionaries in turn"
    yield accept("stack-dictionaries", "E-1 T-1 T-2", what, content)
    content = Content().dictionary(BOOK).int_dict("w", "F32", symmetric([1, -1]), stack=True)
    yield accept("stack-one", "T-1", "An int-dict stack of one expert", content)
    matrices = [
        Matrix(rows(noise(5 * 20, 6, seed, seed), 20), bf16(-1, seed, 2, -3, seed, 1, 0, 9, 4, 5),
               bf16(*range(-seed, 20 - seed)), rows_per_segment=2)
        for seed in (1, 2, 3, 5)
    ]
    content = Content().dictionary(BOOK).dictionary(UNARY).dictionary(tunstall(8, 0.3))
    content.int_dict("w", "F16", *matrices, members="w.{}.weight", transposed=True,
                     dictionaries=((0, 1), (2, 1), (2, 0)))
    what = "Four experts, three of them refined, with all options and three dictionaries"
    yield accept("stack-everything", "E-1 E-3 T-1 T-3 V-1 V-2", what, content)
    line = noise(90, 2, 5, 3)
    lines = [symmetric(line[:i] + [0] * (90 - i)) for i in range(0, 90, 5)]
    content = Content().dictionary(BOOK).int_dict("w", "BF16", *lines)
    yield accept("stack-guards", "E-4 E-5", "Segments and guards of many lengths", content)
    content = Content().dictionary(BOOK).dictionary(UNARY).dictionary(tunstall(8, 0.3))
    for number, name in enumerate("abc"):
        content.int_dict(name, "F32", symmetric([1, 0]), dictionaries=[(number, number)])
    yield accept("int-dict-three", "E-1", "Three tensors with a dictionary each", content)


def mask_segment(levels: Sequence[int], book: Book = BOOK) -> bytes:
    return segment(book.parse(mask(levels)), book.width, signs(levels))


def unary_segment(levels: Sequence[int], book: Book = UNARY) -> bytes:
    return segment(book.parse(refinement(levels)), book.width)


def section_7_lengths() -> Iterator[Vector]:
    for nonzeros, difference in ((589, 255), (590, 256)):
        matrix = symmetric([0] * 2000, noise(nonzeros, 0, 1) + [0] * (2000 - nonzeros))
        least, most = (len(mask_segment(row)) for row in matrix.levels)
        assert most - least == difference
        what = f"Two segments that differ by {difference} bytes: length_width 1, or 2"
        yield accept(f"length-{difference}", "E-9", what, coded(matrix))
    for difference, width in ((255, 1), (256, 2), (65535, 2), (65536, 4)):
        levels = long_refinement(1 + difference)
        rest = [0] * (len(levels) - 1)
        first = [[1, *rest]] * (31 if width == 4 else 1)
        last = [[1, *rest]] * (65 if width == 4 else 0)
        content = coded(symmetric(*first, levels, *last), unary=ONE_ONE)
        assert content.extents[2][32 + 8] == width
        what = f"Refinements that differ by {difference} bytes: length_width {width}"
        what += "; blocks that begin beyond 2^16" if last else ""
        yield accept(f"length-refinement-{difference}", "E-9 E-6", what, content)
    book = Book(16, comb([1], 2**16))  # one codeword and one sign for each 1
    count = 32767
    content = coded(symmetric([0] * count, [-1] * count), book)
    assert content.extents[1][8] == 4
    what = "Two masks that differ by more than 2^16 bytes: length_width 4"
    yield accept("length-mask-4", "E-9 E-6 E-12", what, content)


ONE_ONE = Book(8, comb([1], 256))  # has an entry that is one 1


def long_refinement(length: int) -> list[int]:
    """Levels whose refinement takes this many bytes, in codewords of ``ONE_ONE``."""
    levels = [127] * (length // 120)
    # Each further 1 takes a byte, but for some after the 0 before them, which share its codeword.
    missing = length - len(ONE_ONE.parse(refinement(levels)))
    tries = ([*levels, missing + shared] for shared in range(9))
    return next(each for each in tries if len(ONE_ONE.parse(refinement(each))) == length)


def bad(
    name: str, needed: str, code: str, what: str, matrix: Matrix | None = None, **defects: Any
) -> Vector:
    """A defect of an extent."""
    content = coded(matrix or Matrix(LEVELS, LOW_HIGH), **defects)
    return reject_extent(f"extent-{name}", needed, code, what, content)


def section_7_dictionary() -> Iterator[Vector]:
    """[E-1]"""
    for number in (2, 256, 2**16):
        what = f"Dictionary {number} of 2"
        yield bad(f"dictionary-{number}", "E-1", "malformed", what, dictionary=number)
        yield bad(f"dictionary-refinement-{number}", "E-1", "malformed", f"{what}, refinement",
                  refinement={"dictionary": number})
    yield bad("dictionary-no-rows", "E-1", "malformed", "Dictionary 1 of 1, but no rows",
              Matrix([], []), dictionary=1)
    content = coded(Matrix(BASE, LOW_HIGH), tunstall(9, 0.9))
    content.index["dictionaries"] = []
    content.index["tensors"][0]["extent"] = 0
    del content.extents[0]
    what = "A matrix in a file without dictionaries"
    yield reject_extent("extent-dictionary-none", "E-1", "malformed", what, content)


def section_7_index() -> Iterator[Vector]:
    """[E-2]"""
    for dtype in ("U8", "I32", "F8_E4M3", "BOOL"):
        content = coded(symmetric([1])).change(dtype=dtype)
        what = f"An int-dict tensor of {dtype}"
        yield reject(f"int-dict-dtype-{dtype.lower()}", "E-2", "malformed", what, content)
    for shape, stack in (([1], False), ([1, 1, 1], False), ([1, 1], True), ([1, 1, 1, 1], True)):
        kind = "stack" if stack else "tensor"
        content = coded(symmetric([1])).change(shape=shape, stack=stack)
        what = f"An int-dict {kind} of {len(shape)} dimensions"
        name = f"int-dict-{kind}-{len(shape)}"
        yield reject(name, "E-2", "malformed", what, content)
        content.change(dtype="F4")
        what = f"{what}, whose element type no reader knows"
        yield reject(f"{name}-unknown", "E-2 T-5", "malformed", what, content)


def section_7_1_sections() -> Iterator[Vector]:
    """[E-4], [E-5]"""
    for kind, levels in (("ternary", BASE), ("refined", LEVELS)):
        good = coded(Matrix(levels, LOW_HIGH)).extents[-1]
        for name, what, data in (
            ("empty", "The extent is empty", b""),
            ("31", "The extent ends within its header", good[:31]),
            ("32", "The extent ends after 32 bytes", good[:32]),
            ("63", "The extent ends after 63 bytes", good[:63]),
            ("64", "The extent ends after 64 bytes", good[:64]),
            ("shorter", "The guard is one byte short", good[:-1]),
            ("shorter-16", "The last 16 bytes are missing", good[:-16]),
            ("longer", "A zero byte after the guard", good + b"\0"),
            ("longer-16", "16 zero bytes after the guard", good + bytes(16)),
        ):
            content = coded(Matrix(levels, LOW_HIGH))
            content.extents[-1] = data
            yield reject_extent(
                f"extent-{kind}-{name}", "E-4", "malformed", f"{what} ({kind})", content)
    keys: dict[str, Any]
    for name, needed, keys, what in (
        ("rows", "E-4 N-3", {"shape": [2**31 - 1, 5]}, "2^31 - 1 rows by the index"),
        ("rows-less", "E-4", {"shape": [1, 5]}, "One row by the index, eight in the extent"),
        ("columns", "E-4 N-3", {"shape": [2, 2**31 - 1], "column_scale": True},
         "2^31 - 1 column scales"),
        ("column-scale", "E-4", {"column_scale": True},
         "Column scales by the index, none in the extent"),
        ("symmetric", "E-4", {"symmetric": True},
         "One scale a row by the index, two in the extent"),
    ):
        content = coded(Matrix(BASE * 40, LOW_HIGH * 40)).change(**keys)
        yield reject_extent(f"extent-{name}", needed, "malformed", what, content)
    for name, value, needed, code, what in (
        ("4294967295", 2**32 - 1, "E-4 N-3", "malformed", "4294967295"),
        ("4294967296", 2**32, "E-4 L-1 N-3", "limit", "4294967296"),
        ("18446744073709551615", 2**64 - 1, "E-4 L-1 N-3", "limit", "18446744073709551615"),
        ("32", 32, "E-4", "malformed", "about 16 too great"),
    ):
        what = f"segment_bytes is {what}"
        yield bad(f"segment-bytes-{name}", needed, code, what, segment_bytes=value)
        yield bad(f"segment-bytes-refinement-{name}", needed, code, f"{what}, refinement",
                  refinement={"segment_bytes": value})
    for value in (0, 3, 8):
        for kind, header in (("", 0), ("-refinement", 32)):
            content = coded(symmetric([2]))
            content.extents[2] = patched(content.extents[2], {header + 8: value})
            what = f"length_width{kind} is {value}"
            name = f"extent-length-width{kind}-{value}"
            yield reject_extent(name, "E-4 E-9", "malformed", what, content)
    for value in (2, 255):
        what = f"refined is {value} in a {{}} matrix"
        yield bad(f"refined-{value}", "E-4", "malformed", what.format("refined"), refined=value)
        yield bad(f"refined-{value}-ternary", "E-4", "malformed", what.format("ternary"),
                  Matrix(BASE, LOW_HIGH), refined=value)
        yield bad(f"refined-{value}-refinement", "E-4", "malformed",
                  f"refined is {value} in the refinement", refinement={"refined": value})
    yield bad("refined-1-refinement", "E-4", "malformed", "refined is 1 in the refinement",
              refinement={"refined": 1})
    yield bad("refined-0", "E-4", "malformed", "refined is 0, but there is a refinement", refined=0)
    yield bad("refined-1", "E-4", "malformed", "refined is 1 in 48 bytes without rows",
              Matrix([], []), refined=1)
    fields: dict[str, int]
    for name, other, fields in (
        ("width", "length_width", {"length_width": 3}), ("refined", "refined", {"refined": 1}),
        ("length", "the extent's length", {"segment_bytes": 0}),
    ):
        what = f"Two defects, segment_bytes, and {other} of the refinement: the first is reported"
        content = coded(Matrix(LEVELS, LOW_HIGH), segment_bytes=2**32, refinement=fields)
        yield reject_extent(f"order-extent-{name}", "E-4 C-4", "limit", what, content)
    content = coded(Matrix(LEVELS, LOW_HIGH), refined=2, refinement={"segment_bytes": 2**32})
    what = "Two defects, refined is 2, and segment_bytes would be 2^32: the first is reported"
    yield reject_extent("order-extent-refined-limit", "E-4 C-4", "malformed", what, content)
    for place in range(6):
        zero = patched(bytes(6), {place: 1 << place})
        what = f"Byte {10 + place} of the header is not zero"
        yield bad(f"header-{10 + place}", "E-5", "padding", what, zero=zero)
        what = f"Byte {10 + place} of the refinement's 32 bytes is not zero"
        yield bad(f"header-{42 + place}", "E-5", "padding", what, refinement={"zero": zero})
    full = Matrix(LEVELS, LOW_HIGH, bf16(1, 1, 1, 1, 1))
    for place, (name, section) in enumerate((
        ("scales", "the row scales"), ("scales-columns", "the column scales"),
        ("offsets", "the block offsets"), ("lengths", "the lengths"), ("segments", "the segments"),
        ("offsets-refinement", "the block offsets of the refinement"),
        ("lengths-refinement", "the lengths of the refinement"),
        ("guard", "the segments of the refinement"),
    )):
        for end, at in (("first", 0), ("last", -1)):
            what = f"The {end} zero byte after {section} is not zero"
            gaps = {place: {at: 1}}
            yield bad(f"gap-{name}-{end}", "E-5", "padding", what, full, gaps=gaps)
    for end, at in (("first", 0), ("last", -1)):
        what = f"The {end} byte of the guard of a ternary matrix is not zero"
        yield bad(f"gap-guard-ternary-{end}", "E-5", "padding", what, Matrix(BASE, LOW_HIGH),
                  gaps={4: {at: 128}})


def section_7_1_lengths() -> Iterator[Vector]:
    """[E-6], [E-9]"""
    two = Matrix([[0] * 5, [-3, 0, 0, 2, 60]], LOW_HIGH)
    wide = symmetric([0] * 2000, noise(600, 0, 1) + [0] * 1399 + [2])
    wider = symmetric([1, 0, 0, 0, 0], [127] * 5)
    nothing = Matrix([], [], columns=3)
    for kind, lengths in (
        ("", [len(mask_segment(row)) for row in two.levels]),
        ("-refinement", [len(unary_segment(row)) for row in two.levels]),
    ):
        def defect(
            name: str, needed: str, what: str, matrix: Matrix, kind: str = kind, **defects: Any
        ) -> Vector:
            where = {"refinement": defects} if kind else defects
            what += f" ({'refinement' if kind else 'mask'})"
            return bad(f"{name}{kind}", needed, "malformed", what, matrix, **where)

        least, most = lengths
        more = most - least
        yield defect("length-more", "E-6", "A length is too great", two, lengths={1: more + 1})
        yield defect("length-less", "E-6", "A length is too small", two, lengths={1: more - 1})
        yield defect("segment-bytes-1", "E-6", "segment_bytes is one more than the lengths", two,
                     segment_bytes=least + most + 1)
        yield defect("length-base-sum", "E-6", "length_base is one too great", two,
                     length_base=least + 1, lengths={0: 0, 1: more})
        for power in (8, 16, 31):
            what = f"length_base is 2^{power} too great"
            yield defect(f"length-base-{power}", "E-6", what, two,
                         length_base=least + 2**power, lengths={0: 0, 1: more}, length_width=1)
        yield defect("length-width-wide-2", "E-9", "length_width is 2 where 1 is enough", two,
                     length_width=2)
        yield defect("length-width-wide-4", "E-9", "length_width is 4 where 1 is enough", two,
                     length_width=4)
        if least:
            yield defect("length-base", "E-9", "length_base is 0 where the least length is more",
                         two, length_base=0)
        levels = rows(noise(97 * 3, 8, 7), 3)
        many = symmetric([2, 0, 0], *levels[1:])
        for name, what, block, start in (
            ("first", "The first block begins at 1", 0, 1),
            ("second", "The second block begins at 0", 1, 0),
            ("huge", "The second block begins at 2^32 - 1", 1, 2**32 - 1),
            ("third", "The third block begins at 0", 2, 0),
            ("fourth", "The fourth block begins at 2^16", 3, 2**16),
        ):
            yield defect(f"offset-{name}", "E-6", what, many, offsets={block: start})
        one = symmetric([1, 2])
        for power in (8, 16, 31):
            yield defect(f"offset-{power}", "E-6", f"The only block begins at 2^{power}", one,
                         offsets={0: 2**power})
    yield bad("length-base-refinement", "E-9", "malformed",
              "length_base of the refinement is 0 where the least length is 2",
              symmetric([2], [3]), refinement={"length_base": 0})
    yield bad("length-width-wide-2-4", "E-9", "malformed", "length_width is 4 where 2 is enough",
              wide, length_width=4)
    content = coded(wider, unary=ONE_ONE, refinement={"length_width": 4})
    yield reject_extent("extent-length-width-wide-2-4-refinement", "E-9", "malformed",
                        "length_width of the refinement is 4 where 2 is enough", content)
    for name, needed, what, defects in (
        ("length-base-no-rows", "E-9", "length_base is 1 of no rows", {"length_base": 1}),
        ("length-width-no-rows-2", "E-9", "length_width is 2 of no rows", {"length_width": 2}),
        ("length-width-no-rows-4", "E-9", "length_width is 4 of no rows", {"length_width": 4}),
        ("segments-no-rows", "E-6", "segment_bytes is 1 of no rows", {"segment_bytes": 1}),
        ("ones-no-rows", "E-14", "ones is 1 of no rows", {"ones": 1}),
    ):
        yield bad(name, needed, "malformed", what, nothing, **defects)


def section_7_1_numbers() -> Iterator[Vector]:
    """[E-8], [E-14], [E-16]"""
    for name, bits in (("inf", 0x7F80), ("-inf", 0xFF80), ("nan", 0x7F81), ("-nan", 0xFFFF)):
        matrix = Matrix([[0, 1]], [ONE, bits])
        yield bad(f"scale-{name}", "E-8", "value", f"A row scale of {name}", matrix)
        matrix = Matrix([[0, 1]], [ONE, ONE], [bits, ONE])
        what = f"A column scale of {name}, of a column of zeros"
        yield bad(f"scale-column-{name}", "E-8", "value", what, matrix)
    for name, what, matrix in (
        ("low", "The low scale is infinite, no level is negative",
         Matrix([[0, 1]], [0x7F80, ONE])),
        ("high", "The high scale is infinite, no level is positive",
         Matrix([[0, -1]], [ONE, 0x7F80])),
        ("zeros", "The scale of a row of zeros is infinite",
         Matrix([[0, 0]], [0x7F80], symmetric=True)),
        ("last", "The last row's scale is infinite",
         Matrix([[1, 0]] * 3, [ONE, ONE, 0x7F80], symmetric=True)),
        ("last-column", "The last column's scale is infinite",
         Matrix([[1, 0]], [ONE], [ONE, 0x7F80], symmetric=True)),
        ("refined", "A scale of a refined matrix is infinite",
         Matrix([[1, 5]] * 2, [ONE, ONE, ONE, 0x7F80])),
        ("no-columns", "The scale of a row of no columns is infinite",
         Matrix([[]], [0x7F80], symmetric=True)),
        ("no-rows", "The scale of a column of no rows is infinite",
         Matrix([], [], [0x7F80], columns=1)),
    ):
        yield bad(f"scale-{name}", "E-8", "value", what, matrix)
    yield bad("ones-mask", "E-14", "malformed", "ones of a refined mask is 6, not 5", ones=6)
    for value in (0, 4, 6, 5 + 2**8, 5 + 2**16, 5 + 2**32):
        what = f"ones is {value}, there are 5"
        yield bad(f"ones-{value}", "E-14", "malformed", what, Matrix(BASE, LOW_HIGH), ones=value)
    for value in (0, 6, 8, 7 + 2**8, 7 + 2**16, 7 + 2**32):
        what = f"ones of the refinement is {value}, there are 7"
        yield bad(f"ones-{value}-refinement", "E-14 E-16", "malformed", what,
                  refinement={"ones": value})
    for name, levels in (("", BASE), ("-zeros", [[0] * 5] * 2), ("-nothing", [])):
        matrix = Matrix(levels, LOW_HIGH if levels else [], columns=5, refined=True)
        what = f"A refinement without ones{name.replace('-', ': a matrix of ')}"
        yield bad(f"refined-ternary{name}", "E-16", "malformed", what, matrix)
    matrix = Matrix(BASE, LOW_HIGH, refined=True)
    yield bad("refined-ternary-counted", "E-14 E-16", "malformed",
              "A refinement without ones that is said to have 3", matrix, refinement={"ones": 3})


def section_7_2() -> Iterator[Vector]:
    """Segments of a matrix of one row, or of three."""
    def wrong(
        name: str, needed: str, code: str, what: str, row: Sequence[int], bad: bytes,
        book: Book = BOOK, **defects: Any,
    ) -> Vector:
        content = coded(symmetric(row), book, segments={0: bad}, **defects)
        return reject_extent(f"segment-{name}", needed, code, what, content)

    zeros, row = [0] * 600, [1, 0, -1, 0, 0]
    few = BOOK.parse(mask(zeros))
    codewords = BOOK.parse(mask(row))
    nine = Book(9, comb([0] * 10, 512))
    right = segment(codewords, 8, signs(row))
    assert len(right) == len(segment(codewords, 8)) + 1
    for name, needed, code, what, levels, bad, book in (
        ("least", "E-7 E-13", "malformed",
         "Two bytes for 600 columns, which no three entries can fill",
         zeros, segment(few, 8)[:2], BOOK),
        ("none", "E-7 E-13 N-3", "malformed", "No bytes for 5 columns", [0] * 5, b"", BOOK),
        ("cut", "E-10 E-13", "malformed", "The last codeword of a row is missing",
         zeros, segment(few[:-1], 8), BOOK),
        ("codeword-more", "E-10 E-13", "malformed", "A codeword more than the row needs",
         zeros, segment([*few, 0], 8), BOOK),
        ("overlap", "E-13", "malformed", "A segment without its signs",
         row, segment(codewords, 8), BOOK),
        ("byte-more", "E-13", "malformed", "A zero byte between codewords and signs",
         row, segment(codewords, 8, signs(row), 1), BOOK),
        ("bit-first", "E-13", "padding", "The first bit between signs and codewords is set",
         row, segment(codewords, 8, signs(row), 0, 1), BOOK),
        ("bit-last", "E-13", "padding", "The last bit between signs and codewords is set",
         row, segment(codewords, 8, signs(row), 0, 1 << 5), BOOK),
        ("bit-9", "E-13", "padding", "A bit between 9-bit codewords and signs is set",
         row, segment(nine.parse(mask(row)), 9, signs(row), 0, 1), nine),
        ("no-columns", "E-10 E-13", "malformed", "A byte where there are no columns",
         [], b"\0", BOOK),
        ("bit-no-signs", "E-13", "padding", "A bit after 9-bit codewords is set, no signs",
         [0] * 10, segment(nine.parse([0] * 10), 9, [], 0, 64), nine),
    ):
        yield wrong(name, needed, code, what, levels, bad, book)
    # Seven signs and a codeword of 9 bits fill two bytes; with eight signs one bit is too many.
    eight = Book(9, comb([1] * 8, 512))
    full = segment(eight.parse([1] * 8), 9, [0, 1] * 4)
    assert len(full) == 3
    for name, first in (("", [1] * 8), ("-negative", [-1] * 8)):
        bad = segment(eight.parse(mask(first)), 9, signs(first)[:7])
        what = "Codewords and signs overlap by exactly one bit"
        yield wrong(f"overlap-1{name}", "E-13", "malformed", what, first, bad, eight)
    entry = next(e for e in BOOK.entries if len(e) > 3 and sum(e) == 1 and e[-1] == 1)
    row = [0] * (len(entry) - 1)
    bad = segment([BOOK.codewords[entry]], 8, [0])
    what = "The last bit of an entry, beyond the row, is not zero"
    yield wrong("overrun", "E-11", "malformed", what, row, bad)
    what = "The same without the sign of that bit"
    yield wrong("overrun-unsigned", "E-11", "malformed", what, row, bad[1:])
    what = "The same with ones one greater"
    yield wrong("overrun-counted", "E-11", "malformed", what, row, bad, ones=1)
    entry = next(e for e in BOOK.entries if len(e) > 3 and sum(e) == 1 and e[-2] == 1)
    bad = segment([BOOK.codewords[entry]], 8, [0])
    what = "The bit before the last one of an entry, beyond the row, is not zero"
    yield wrong("overrun-middle", "E-11", "malformed", what, [0] * (len(entry) - 2), bad)
    row = [1, 0, -1, 0, 0]
    codewords = BOOK.parse(mask(row))
    for name, needed, code, what, bad in (
        ("codeword-more", "E-10 E-13", "malformed", "a codeword too many",
         segment([*codewords, 0], 8, signs(row))),
        ("cut", "E-10 E-11 E-13", "malformed", "the last codeword is missing",
         segment(codewords[:-1], 8, signs(row))),
        ("bit", "E-13", "padding", "a bit above the signs is set",
         segment(codewords, 8, signs(row), 0, 1)),
    ):
        content = coded(symmetric(row, row, row), segments={1: bad})
        what = f"The second segment of three: {what}"
        yield reject_extent(f"segment-second-{name}", needed, code, what, content)


def section_7_2_refinement() -> Iterator[Vector]:
    def wrong(
        name: str, needed: str, code: str, what: str, row: Sequence[int], bad: bytes,
        unary: Book = UNARY, place: int = 0, **fields: int,
    ) -> Vector:
        others = [[1, -2, 0]] * place if place else []
        width = len(row)
        others = [[*each, *[0] * (width - 3)][:width] for each in others]
        matrix = symmetric(*others, row, *others, refined=True)
        content = coded(matrix, unary=unary, refinement={"segments": {place: bad}, **fields})
        return reject_extent(f"refinement-{name}", needed, code, what, content)

    row = [1, 0, -2, 0, 4, 3]
    codewords = UNARY.parse(refinement(row))
    for name, needed, code, what, bad, book in (
        ("none", "E-10 E-13", "malformed", "The refinement of a segment is missing", b"", UNARY),
        ("cut", "E-10 E-13", "malformed", "The refinement ends before its last codeword",
         segment(codewords[:-1], 9), UNARY),
        ("half", "E-10 E-13", "malformed", "The refinement ends within a codeword",
         segment(codewords, 9)[1:], UNARY),
        ("codeword-more", "E-10 E-13", "malformed", "A codeword more than the refinement needs",
         segment([*ONE_ONE.parse(refinement(row)), 0], 8), ONE_ONE),
        ("byte-more", "E-13", "malformed", "A zero byte after the codewords",
         segment(codewords, 9, [], 1), UNARY),
        ("bit-first", "E-13", "padding", "The lowest bit, after 9-bit codewords, is set",
         segment(codewords, 9, [], 0, 1), UNARY),
        ("bit-last", "E-13", "padding", "The highest bit after 9-bit codewords is set",
         segment(codewords, 9, [], 0, 1 << (-9 * len(codewords) % 8 - 1)), UNARY),
    ):
        yield wrong(name, needed, code, what, row, bad, book)
        yield wrong(f"{name}-second", needed, code, f"{what}, in the second segment of three",
                    row, bad, book, 1)
    balanced = Book(8, tree_of_depth(8))
    what = "A refinement of the segment whose levels are all 0"
    yield wrong("of-zeros", "E-10 E-13", "malformed", what, [0] * 6, b"\0", balanced, 1)
    for name, what, bits in (
        ("overrun", "The last bit of an entry, beyond the refinement's end, is 1", "11000001"),
        ("overrun-next", "The bit after the refinement's end is 1", "11001000"),
        ("overrun-all", "All bits after the refinement's end are 1", "11001111"),
    ):
        # Entry i of a balanced tree is the number i, the first bit the highest.
        bad = segment([int(bits, 2)], 8)
        yield wrong(name, "E-11", "malformed", what, [3, 1, 0], bad, balanced)
        yield wrong(f"{name}-counted", "E-11", "malformed", f"{what}, and counted in ones",
                    [3, 1, 0], bad, balanced, ones=bits.count("1"))
    for level in (128, -128, 255, 256, 257):
        content = coded(symmetric([0, 1, level, -2]))
        what = f"A level of {level}"
        yield reject_extent(f"refinement-level-{level}", "E-15 L-1", "limit", what, content)
    content = coded(symmetric([1, 3], [2, 128], [0, 1]))
    what = "A level of 128 at the end of the second segment of three"
    yield reject_extent("refinement-level-second", "E-15 L-1", "limit", what, content)
    ones = Book(8, comb([1] * 16, 256))
    content = coded(symmetric([128, 0]), unary=ones)
    what = "A level of 128, in entries of 16 ones"
    yield reject_extent("refinement-level-16", "E-15 L-1", "limit", what, content)


def tree_of_depth(depth: int) -> list[Any]:
    """All leaves at this depth."""
    return [tree_of_depth(depth - 1), tree_of_depth(depth - 1)] if depth else []
