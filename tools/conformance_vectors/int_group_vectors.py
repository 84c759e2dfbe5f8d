"""The vectors of SPEC.md section 8: int-group matrices."""

# A table, where a line holds as much as fits:
# fmt: off

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tools.conformance_vectors.exact_numbers import bf16
from tools.conformance_vectors.file_builder import Content
from tools.conformance_vectors.int_dict_builder import patched
from tools.conformance_vectors.int_group_builder import Groups
from tools.conformance_vectors.samples import ONE
from tools.conformance_vectors.vector import Vector, accept, reject, reject_extent


def numbers(count: int, below: int, seed: int) -> list[int]:
    """As in ``noise``: x -> 1664525 x + 1013904223 mod 2^32."""
    result = []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        result.append((seed >> 16) % below)
    return result


def grouped(matrix: Groups, dtype: str = "F32", **defects: Any) -> Content:
    return Content().int_group("w", dtype, matrix, defects=defects)


def sample(
    rows: int, columns: int, bits: int, grid: str = "linear", group_size: int = 0,
    zero_points: bool = False,
) -> Groups:
    """A matrix with numbers, scales and zero points of all kinds."""
    groups = rows * (-(-columns // group_size) if group_size else 1)
    codes = [numbers(columns, 2**bits, row + bits) for row in range(rows)]
    scales = bf16(*[(number - 99) / 64 for number in numbers(groups, 199, columns)])
    points = numbers(groups, 2**bits, 7) if zero_points else None
    return Groups(codes, scales, bits, grid, group_size, points)


def section_8_kinds() -> Iterator[Vector]:
    for bits in (2, 3, 4, 8):
        for grid, zero_points in (("linear", False), ("linear", True), ("log", False)):
            for size in (0, 32, 64, 128):
                matrix = sample(2, 131, bits, grid, size, zero_points)
                name = f"int-group-{bits}-{grid}{'-points' if zero_points else ''}-{size}"
                what = f"{bits} bits, {grid}, groups of {size or 'a row'}"
                what += ", zero points" if zero_points else ""
                yield accept(name, "G-1 G-2 G-3 G-6 G-7", what, grouped(matrix, "BF16"))
    for dtype in ("F16", "BF16", "F32", "F64"):
        matrix = sample(3, 40, 4, group_size=32, zero_points=True)
        name = f"int-group-{dtype.lower()}"
        yield accept(name, "G-8 V-3 E-2", f"Elements of {dtype}", grouped(matrix, dtype))


def section_8_shapes() -> Iterator[Vector]:
    for rows, columns, bits, size, what in (
        (1, 1, 2, 0, "One weight"), (1, 1, 8, 128, "One weight, a group of 128"),
        (5, 1, 3, 32, "One column"), (1, 64, 2, 64, "One group"),
        (2, 65, 2, 64, "A group and one column"), (2, 63, 4, 64, "A group but for one column"),
        (3, 128, 3, 64, "Two whole groups"), (3, 128, 8, 32, "Four whole groups"),
        (2, 32, 4, 0, "A row of just 16 bytes"), (2, 33, 4, 0, "A row of 16 bytes and a half"),
        (2, 42, 3, 0, "A row of 126 bits"), (2, 43, 3, 0, "A row of 129 bits"),
        (1, 85, 3, 0, "A row of 255 bits"), (4, 16, 8, 0, "Bytes"), (17, 9, 2, 32, "17 rows"),
        (3, 300, 4, 128, "300 columns"), (1, 1000, 8, 32, "1000 columns"),
    ):
        points = columns % 2 == 1
        what = f"{what}{', zero points' if points else ''}"
        content = grouped(sample(rows, columns, bits, "linear", size, points), "BF16")
        yield accept(f"int-group-{rows}x{columns}-{bits}-{size}", "G-2 G-3 G-4", what, content)
    for name, what, matrix in (
        ("no-columns", "Three rows of no columns: a scale each",
         Groups([[], [], []], bf16(1, 2, 3), 4)),
        ("no-columns-points", "Three rows of no columns: a scale and a zero point each",
         Groups([[], [], []], bf16(1, 2, 3), 4, zero_points=[1, 2, 3])),
        ("no-columns-groups", "Three rows of no columns and so no groups",
         Groups([[], [], []], [], 4, group_size=32)),
        ("no-rows", "No rows", Groups([], [], 3, columns=7)),
        ("no-rows-groups", "No rows, groups", Groups([], [], 3, group_size=32, columns=70)),
        ("nothing", "No rows and no columns", Groups([], [], 8)),
    ):
        yield accept(f"int-group-{name}", "G-2 G-3", what, grouped(matrix))
    content = grouped(Groups([[]], [], 4, group_size=32)).change(shape=[2**31 - 1, 0])
    content.expected["tensors"][0]["shape"] = [2**31 - 1, 0]
    what = "2^31 - 1 rows of no columns and no groups: an extent of 16 bytes"
    yield accept("int-group-rows-of-nothing", "G-2 G-3 L-1 N-3", what, content)
    matrices = [sample(3, 70, 3, "linear", size, True) for size in (64, 0, 128, 32)]
    for number, matrix in enumerate(matrices):
        matrix.codes = [numbers(70, 8, 10 * number + row) for row in range(3)]
    content = Content().int_group("w", "BF16", *matrices, members="w.{}", transposed=True)
    what = "A stack of four experts with all options, each with another group size"
    yield accept("int-group-stack", "G-2 T-1 T-2 T-3", what, content)
    content = Content().int_group("w", "BF16", matrices[0], stack=True)
    yield accept("int-group-stack-one", "T-1", "A stack of one expert", content)
    content = Content().int_group("w", "BF16", shape=[0, 4, 5])
    yield accept("int-group-no-experts", "T-1", "A stack without experts", content)


def section_8_values() -> Iterator[Vector]:
    special = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x7F7F, 0xFF7F, *bf16(0.3, -3)]
    for bits in (2, 3, 4, 8):
        every = list(range(2**bits))
        for name, grid, points, dtypes in (
            ("linear", "linear", None, ("F32",) if bits < 8 else ("F32", "F16")),
            ("points", "linear", [(place * 5) % 2**bits for place in range(10)], ("F32",)),
            ("log", "log", None, ("F32",) if bits < 8 else ("F32", "BF16", "F64")),
        ):
            matrix = Groups([every] * 10, special, bits, grid, 0, points)
            what = "Each integer under zero, minus zero, least, greatest and other scales"
            for dtype in dtypes:
                yield accept(f"int-group-values-{bits}-{name}-{dtype.lower()}", "G-6 G-7 G-8 V-3",
                             f"{what}: {bits} bits, {name}, {dtype}", grouped(matrix, dtype))
        if bits < 8:
            points = every
            matrix = Groups([every] * 2**bits, bf16(*[1.5] * 2**bits), bits, zero_points=points)
            what = f"Each integer of {bits} bits under each zero point"
            yield accept(f"int-group-points-{bits}", "G-6", what, grouped(matrix))
    matrix = Groups([[0, 1, 127, 128, 254, 255]] * 6, bf16(*[-0.75] * 6), 8,
                    zero_points=[0, 1, 127, 128, 254, 255])
    what = "Integers of 8 bits under the least, middle and greatest zero points"
    yield accept("int-group-points-8", "G-6 G-5", what, grouped(matrix))
    ties = [0x0100 + odd for odd in (0, 1, 2, 3, 0x41, 0x7F)]  # 2^-125 and more
    matrix = Groups([list(range(256))] * 6, ties, 8, "log")
    what = "Subnormal values of a log grid: ties, kept, and zeros with their signs"
    yield accept("int-group-log-subnormal", "G-7 V-2", what, grouped(matrix))
    matrix = Groups([[0, 1, 2, 255, 128, 129]] * 2, [0x7F7F, 0xFF7F], 8)
    what = "Products beyond all numbers of binary32: infinity; beyond those of BF16, too"
    for dtype in ("F32", "BF16", "F64"):
        yield accept(f"int-group-overflow-{dtype.lower()}", "G-6 G-8", what, grouped(matrix, dtype))
    # 7 x 73 x 2^119 and 127 x 129 x 2^114 are finite in binary32 and round to infinity in BF16.
    matrix = Groups([[135, 121, 255, 1]] * 2, bf16(73 * 2**119, 129 * 2**114), 8)
    what = "Finite in binary32, infinite in BF16"
    yield accept("int-group-bf16-great", "G-8 V-3", what, grouped(matrix, "BF16"))
    matrix = Groups([[0, 255, 128, 3]], bf16(1 + 1 / 128), 8, zero_points=[0])
    what = "255 times a scale of 8 bits: exact in binary32, ties in BF16 and F16"
    for dtype in ("F32", "BF16", "F16"):
        yield accept(f"int-group-ties-{dtype.lower()}", "G-6 G-8", what, grouped(matrix, dtype))


def section_8_index() -> Iterator[Vector]:
    """[G-1], [E-2]"""
    def change(name: str, needed: str, what: str, content: Content) -> Vector:
        return reject(f"int-group-{name}", needed, "malformed", what, content)

    def one() -> Content:
        return grouped(Groups([[1]], [ONE], 4))

    for key, values in (
        ("bits", (0, 1, 5, 6, 7, 16, 4 + 2**8, 4 + 2**32)),
        ("grid", ("", "Linear", "log2", "lo", "linear ")),
    ):
        for value in values:
            name = f"{key}-{str(value).replace(' ', '-space') or 'empty'}"
            yield change(name, "G-1", f"{key} is {value!r}", one().change(**{key: value}))
        content = Content().int_group("w", "F4", shape=[0, 1, 1]).change(**{key: values[1]})
        what = f"{key} is {values[1]!r} of a stack without experts of an unknown element type"
        yield change(f"{key}-unknown", "G-1 T-5", what, content)
    content = one().change(grid="log", zero_points=True)
    yield change("log-points", "G-1", "A log grid with zero points", content)
    for dtype in ("U8", "I32", "F8_E4M3", "BOOL"):
        name = f"dtype-{dtype.lower()}"
        yield change(name, "E-2 G-1", f"An int-group tensor of {dtype}", one().change(dtype=dtype))
    for shape, stack in (([1], False), ([1, 1, 1], False), ([1, 1], True), ([1, 1, 1, 1], True)):
        kind = "stack" if stack else "tensor"
        what = f"An int-group {kind} of {len(shape)} dimensions"
        content = one().change(shape=shape, stack=stack)
        yield change(f"{kind}-{len(shape)}", "E-2 G-1", what, content)


def section_8_extents() -> Iterator[Vector]:
    """[G-3] to [G-5]"""
    def bad(name: str, needed: str, code: str, what: str, content: Content) -> Vector:
        return reject_extent(f"int-group-{name}", needed, code, what, content)

    def matrix() -> Groups:
        return sample(3, 69, 3, "linear", 32, True)

    good = grouped(matrix()).extents[0]
    for name, what, data in (
        ("empty", "The extent is empty", b""),
        ("4", "The extent ends within its header", good[:4]),
        ("15", "The extent ends within its header", good[:15]),
        ("16", "The extent ends after its header", good[:16]),
        ("shorter", "The extent is one byte short", good[:-1]),
        ("shorter-16", "The last 16 bytes are missing", good[:-16]),
        ("shorter-row", "The last row is missing", good[:-32]),
        ("longer", "A zero byte more", good + b"\0"),
        ("longer-8", "Eight zero bytes more, as a guard", good + bytes(8)),
        ("longer-16", "16 zero bytes more", good + bytes(16)),
    ):
        content = grouped(matrix())
        content.extents[0] = data
        yield bad(f"extent-{name}", "G-3", "malformed", what, content)
    keys: dict[str, Any]
    for name, needed, keys, what in (
        ("rows", "G-3 N-3", {"shape": [2**31 - 1, 69]}, "2^31 - 1 rows by the index"),
        ("rows-less", "G-3", {"shape": [2, 69]}, "Two rows by the index, three in the extent"),
        ("columns", "G-3 N-3", {"shape": [3, 2**31 - 1]}, "2^31 - 1 columns by the index"),
        ("columns-more", "G-3", {"shape": [3, 97]}, "97 columns by the index, 69 in the extent"),
        ("both", "G-3 N-3", {"shape": [2**27, 2**25 - 1], "dtype": "BF16"},
         "2^27 rows of 2^25 - 1 columns by the index"),
        ("bits", "G-3", {"bits": 4}, "4 bits by the index, 3 in the extent"),
        ("points", "G-3", {"zero_points": False}, "No zero points by the index"),
    ):
        yield bad(f"extent-{name}", needed, "malformed", what, grouped(matrix()).change(**keys))
    for size in (1, 16, 31, 33, 96, 256, 32 + 2**8, 32 + 2**16, 2**32 - 1):
        content = grouped(sample(1, 1, 4, "linear", 32), group_size=size)
        yield bad(f"size-{size}", "G-3", "malformed", f"group_size is {size}", content)
    for size in (0, 64):
        content = grouped(matrix(), group_size=size)
        what = f"group_size is {size}, but there are as many scales as for groups of 32 columns"
        yield bad(f"size-{size}", "G-2 G-3", "malformed", what, content)
    for place in range(12):
        content = grouped(matrix(), zero=patched(bytes(12), {place: 1 << place % 8}))
        what = f"Byte {4 + place} of the header is not zero"
        yield bad(f"header-{4 + place}", "G-4", "padding", what, content)
    for place, (name, size) in enumerate((("scales", 18), ("points", 9))):
        for end, at in (("first", 0), ("last", -1)):
            what = f"The {end} zero byte after the {name} is not zero"
            assert size % 16
            content = grouped(matrix(), gaps={place: {at: 1}})
            yield bad(f"gap-{name}-{end}", "G-4", "padding", what, content)
    # 69 x 3 bits are 25 bytes and 7 bits; the row has 32 bytes.
    for row in range(3):
        for name, at, bit in (("bit", 25, 0x80), ("first", 26, 1), ("last", 31, 0x80)):
            extent = grouped(matrix()).extents[0]
            byte = extent[len(extent) - 96 + 32 * row + at] | bit
            what = f"Row {row}: a bit of byte {at} after the last weight is set"
            content = grouped(matrix(), patches={32 * row + at: byte})
            yield bad(f"row-{row}-{name}", "G-4", "padding", what, content)
    for bits in (2, 4, 8):
        content = grouped(sample(1, 1, bits), patches={1 if bits == 8 else 0: 0x80 | 3})
        what = f"One weight of {bits} bits, and a bit after it"
        yield bad(f"row-bits-{bits}", "G-4", "padding", what, content)
    for name, scale in (("inf", 0x7F80), ("-inf", 0xFF80), ("nan", 0x7F81), ("-nan", 0xFFFF)):
        for place in (0, 8):
            wrong = matrix()
            wrong.scales = [scale if i == place else ONE for i in range(9)]
            what = f"Scale {place} of 9 is {name}"
            yield bad(f"scale-{name}-{place}", "G-5", "value", what, grouped(wrong))
    lone = Groups([[]], [0x7F80], 4)
    what = "The scale of a row of no columns is infinite"
    yield bad("scale-no-columns", "G-5", "value", what, grouped(lone))
    middle = Groups([[8, 8]], [0x7F80], 4)
    what = "The scale of a row whose integers are all z is infinite"
    yield bad("scale-of-zeros", "G-5", "value", what, grouped(middle))
    for bits in (2, 3, 4):
        for place, point in ((0, 2**bits), (3, 2**bits), (3, 255)):
            points = [point if i == place else 1 for i in range(4)]
            wrong = Groups([[1]] * 4, [ONE] * 4, bits, zero_points=points)
            what = f"Zero point {place} is {point}, with {bits} bits"
            yield bad(f"point-{bits}-{place}-{point}", "G-5", "malformed", what, grouped(wrong))
    wrong = Groups([[]], [ONE], 4, zero_points=[16])
    what = "The zero point of a row of no columns is 16, with 4 bits"
    yield bad("point-no-columns", "G-5", "malformed", what, grouped(wrong))
