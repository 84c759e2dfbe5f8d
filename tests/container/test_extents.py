"""What is in extents: one test a requirement of SPEC.md sections 4 to 7.1."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard

from qmoe_format import QMoEError
from tests.container.files import (
    align,
    assemble,
    code_at_opening,
    code_of,
    index_of,
    one_matrix,
    opened,
    read_all,
    take_apart,
    tensor,
)


def compressed(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(data)


def code_of_zstd(frame: bytes, size: int = 100) -> str | None:
    data = assemble(index_of(tensors=[tensor(encoding="zstd", shape=[size])]), [frame])
    assert code_at_opening(data) is None
    code = code_of(data)
    # Reading finds what verification finds.
    with opened(data) as file:
        if code is None:
            assert file.read("t").nbytes == size
        else:
            with pytest.raises(QMoEError) as caught:
                file.read("t")
            assert caught.value.code == code
    return code


def raw_blocks(*blocks: tuple[int, bytes | int], size: int, header: bytes = b"\xc0\x50") -> bytes:
    """A frame of blocks (0, bytes) as they are or (1, length) of zeros; ``size`` in the header."""
    frame = b"\x28\xb5\x2f\xfd" + header + size.to_bytes(8, "little")
    for number, (kind, what) in enumerate(blocks):
        length = what if isinstance(what, int) else len(what)
        last = number == len(blocks) - 1
        frame += (length << 3 | kind << 1 | last).to_bytes(3, "little")
        frame += b"\0" if isinstance(what, int) else what
    return frame


@pytest.mark.parametrize("encoding", ["raw", "zstd"])
@pytest.mark.parametrize("dtype", ["U8", "BF16", "F64"])
def test_the_length_has_to_fit_the_shape(encoding: str, dtype: str) -> None:
    """[R-1] [Z-2]"""
    size = {"U8": 3, "BF16": 6, "F64": 24}[dtype]
    for stored, expected in ((size, None), (size - 1, "malformed"), (size + 1, "malformed")):
        extent = bytes(stored)
        if encoding == "zstd":
            extent = compressed(extent)
        keys = {"encoding": encoding, "dtype": dtype, "shape": [3]}
        data = assemble(index_of(tensors=[tensor(**keys)]), [extent])
        assert code_at_opening(data) is None
        assert code_of(data) == expected


def test_bytes_are_shuffled_by_significance() -> None:
    """[Z-1]"""
    frame = compressed(bytes([0x01, 0x03, 0x02, 0x04]))
    data = assemble(index_of(tensors=[tensor(encoding="zstd", dtype="U16", shape=[2])]), [frame])
    found = read_all(data)["t"]
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [0x0201, 0x0403]


@pytest.mark.parametrize(
    "content", [bytes(100), bytes(range(100)), np.random.default_rng(0).bytes(100)]
)
def test_one_frame_exactly(content: bytes) -> None:
    """[Z-2] [Z-4]"""
    frame = compressed(content)
    assert code_of_zstd(frame) is None
    assert code_of_zstd(compressed(content, write_checksum=True)) is None
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    for bad in (
        b"",
        frame[:3],
        frame[:6],
        frame[:-1],
        frame + b"\0",
        frame + frame,
        frame + skippable,
        skippable + frame,
        skippable,
        compressed(content, write_content_size=False),
        b"\x1f\x8b" + frame[2:],
        frame[:4] + bytes([frame[4] | 0x08]) + frame[5:],  # a reserved bit
    ):
        assert code_of_zstd(bad) == "malformed", bad.hex()
    checked = bytearray(compressed(content, write_checksum=True))
    checked[-1] ^= 1
    assert code_of_zstd(bytes(checked)) == "malformed"


def test_a_frame_without_content() -> None:
    empty = compressed(b"")
    assert code_of_zstd(empty, 0) is None
    assert code_of_zstd(raw_blocks((0, b""), (0, b""), (0, b""), size=0), 0) is None
    assert code_of_zstd(raw_blocks(*[(0, b"")] * 500, size=0), 0) is None
    for bad in (
        empty[:-1],
        empty + b"\0",
        empty + empty,
        compressed(b"", write_content_size=False),
        raw_blocks((0, b"x"), size=0),
        raw_blocks(*[(0, b"")] * 38, size=0) + b"x",  # 128 bytes, and one
        raw_blocks((0, b""), (1, 99), size=0),
        raw_blocks(*[(1, 1 << 17)] * 1000, size=0),
        raw_blocks(*[(0, b"")] * 500, size=0)[:-1],
        raw_blocks(*[(0, b"")] * 500, size=0) + bytes(200),
    ):
        assert code_of_zstd(bad, 0) == "malformed", bad[:40].hex()


def test_a_frame_that_holds_more_or_less_than_it_says() -> None:
    assert code_of_zstd(raw_blocks((0, bytes(100)), size=100)) is None
    assert code_of_zstd(raw_blocks((0, bytes(99)), size=100)) == "malformed"
    assert code_of_zstd(raw_blocks((0, bytes(101)), size=100)) == "malformed"
    assert code_of_zstd(raw_blocks(*[(1, 1 << 17)] * 100, size=100)) == "malformed"


def test_a_frame_that_needs_a_dictionary() -> None:
    samples: list[Any] = [b"sample %d of a dictionary" % number * 9 for number in range(300)]
    dictionary = zstandard.train_dictionary(2000, samples)
    assert code_of_zstd(compressed(bytes(100), dict_data=dictionary)) == "malformed"


def test_the_window() -> None:
    """[Z-3] and its limit, on both sides"""
    blocks = ((0, bytes(100)),)
    most = 17 << 3  # 2^(10 + 17) bytes
    assert code_of_zstd(raw_blocks(*blocks, size=100, header=bytes([0xC0, most]))) is None
    assert code_of_zstd(raw_blocks(*blocks, size=100, header=bytes([0xC0, most + 1]))) == "limit"
    assert code_of_zstd(raw_blocks(*blocks, size=100, header=bytes([0xC0, 0xFF]))) == "limit"


def test_the_window_of_a_single_segment_is_its_content() -> None:
    for size, expected in ((2**27, None), (2**27 + 1, "limit")):
        # The ratio allows it only to a frame that is long enough: blocks without content.
        blocks: list[tuple[int, bytes | int]] = [(0, b"")] * 50_000
        blocks += [(1, 1 << 17)] * (size >> 17) + [(1, 1)] * (size % (1 << 17))
        frame = raw_blocks(*blocks, size=size, header=b"\xe0")
        assert code_of_zstd(frame, size) == expected


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65791, 65792, 65793, 1 << 20])
def test_every_form_of_the_content_size(size: int) -> None:
    """A frame header says it in 1, 2, 4 or 8 bytes."""
    data = np.random.default_rng(0).bytes(size)
    assert code_of_zstd(compressed(data), size) is None
    assert code_of_zstd(compressed(data), size + 1) == "malformed"


def test_the_ratio_of_content_to_frame() -> None:
    """[Z-3] and its limit, on both sides"""
    count = 9
    length = 14 + 4 * count
    most = 1024 * length + 2**20
    for size, expected in ((most, None), (most + 1, "limit")):
        lengths = [1 << 17] * (count - 1)
        lengths.append(size - sum(lengths))
        assert 0 < lengths[-1] <= 1 << 17
        frame = raw_blocks(*[(1, each) for each in lengths], size=size)
        assert len(frame) == length
        assert code_of_zstd(frame, size) == expected


# Offsets in the header of an extent, section 7.1.
DICTIONARY, BASE, WIDTH, REFINED, SPARE, ONES, SEGMENT_BYTES = 0, 4, 8, 9, 10, 16, 24
ROWS, COLUMNS = 40, 50
ROW_SCALES = 32
COLUMN_SCALES = align(ROW_SCALES + ROWS * 4, 16)
OFFSETS = align(COLUMN_SCALES + COLUMNS * 2, 16)
LENGTHS = align(OFFSETS + 8, 16)
SEGMENTS = align(LENGTHS + ROWS, 16)
SECOND = 32  # the header of a refinement, in front of everything else


def put(extent: bytearray, at: int, kind: str, value: int) -> None:
    struct.pack_into("<" + kind, extent, at, value)


def get(extent: bytes | bytearray, at: int, kind: str) -> int:
    return int(struct.unpack_from("<" + kind, extent, at)[0])


def code_of_extent(change: Callable[[bytearray], Any], most: int = 1, **keys: Any) -> str | None:
    """The code after a change of the matrix's extent, or of its entry in the index."""
    index, extents, _ = one_matrix(ROWS, COLUMNS, columns_scaled=True, most=most)
    extent = bytearray(extents[0])
    changed = change(extent)
    if isinstance(changed, bytes):
        extent = bytearray(changed)
    record = index["tensors"][0] | keys
    data = assemble({**index, "tensors": [record]}, [bytes(extent), *extents[1:]])
    assert code_at_opening(data) is None
    code = code_of(data)
    # Reading finds what verification finds.
    with opened(data) as file:
        if code is None:
            file.read("w")
        else:
            with pytest.raises(QMoEError) as caught:
                file.read("w")
            assert caught.value.code == code
    return code


def nothing(_: bytearray) -> None:
    pass


def refinement_at() -> tuple[int, int, int]:
    """Where block offsets, lengths and segments of the refinement are, after the mask's."""
    _, _, value = one_matrix(ROWS, COLUMNS, columns_scaled=True, most=5)
    offsets = align(SECOND + SEGMENTS + value.levels.mask.segment_bytes, 16)
    lengths = align(offsets + 8, 16)
    return offsets, lengths, align(lengths + ROWS, 16)


OFFSETS_2, LENGTHS_2, SEGMENTS_2 = refinement_at()


@pytest.mark.parametrize("most", [1, 5])
def test_the_extent_is_laid_out_as_the_tests_below_think(most: int) -> None:
    _, extents, value = one_matrix(ROWS, COLUMNS, columns_scaled=True, most=most)
    extent, strings = extents[0], value.levels.strings
    assert len(strings) == 1 + (most > 1)
    shift = SECOND * (most > 1)
    assert value.column_scale is not None
    sections: list[tuple[int, npt.NDArray[Any]]] = [
        (shift + ROW_SCALES, value.row_scale),
        (shift + COLUMN_SCALES, value.column_scale),
    ]
    for number, (header, at) in enumerate(
        [
            (0, (shift + OFFSETS, shift + LENGTHS, shift + SEGMENTS)),
            (SECOND, (OFFSETS_2, LENGTHS_2, SEGMENTS_2)),
        ][: len(strings)]
    ):
        bits = strings[number]
        assert get(extent, header + DICTIONARY, "I") == number
        assert get(extent, header + BASE, "I") == bits.length_base
        assert extent[header + WIDTH] == 1
        assert extent[header + REFINED] == len(strings) - 1 - number
        assert get(extent, header + ONES, "Q") == bits.ones
        assert get(extent, header + SEGMENT_BYTES, "Q") == bits.segment_bytes
        arrays = bits.block_offsets, bits.lengths, bits.segments[: bits.segment_bytes]
        sections += zip(at, arrays, strict=True)
    for start, array in sections:
        assert extent[start : start + array.nbytes] == array.tobytes()
    assert len(extent) == align(start + array.nbytes + 8, 16)
    assert code_of_extent(nothing, most) is None


@pytest.mark.parametrize(
    ("requirement", "change", "expected"),
    [
        ("E-1", lambda e: put(e, DICTIONARY, "I", 1), "malformed"),
        ("E-1", lambda e: put(e, DICTIONARY, "I", 2**32 - 1), "malformed"),
        ("E-4", lambda e: bytes(e[:31]), "malformed"),
        ("E-4", lambda e: b"", "malformed"),
        ("E-4", lambda e: bytes(e[:-16]), "malformed"),
        ("E-4", lambda e: bytes(e[:-1]), "malformed"),
        ("E-4", lambda e: bytes(e + bytes(16)), "malformed"),
        ("E-4", lambda e: put(e, WIDTH, "B", 0), "malformed"),
        ("E-4", lambda e: put(e, WIDTH, "B", 3), "malformed"),
        ("E-4", lambda e: put(e, WIDTH, "B", 255), "malformed"),
        ("E-4", lambda e: put(e, REFINED, "B", 2), "malformed"),
        ("E-4", lambda e: put(e, REFINED, "B", 255), "malformed"),
        ("E-4", lambda e: put(e, SEGMENT_BYTES, "Q", 2**32 - 1), "malformed"),
        ("E-4", lambda e: put(e, SEGMENT_BYTES, "Q", 2**32), "limit"),
        ("E-4", lambda e: put(e, SEGMENT_BYTES, "Q", 2**64 - 1), "limit"),
        ("E-4", lambda e: put(e, SEGMENT_BYTES, "Q", 0), "malformed"),
        ("E-5", lambda e: put(e, SPARE, "B", 1), "padding"),
        ("E-5", lambda e: put(e, SPARE + 5, "B", 1), "padding"),
        ("E-5", lambda e: put(e, OFFSETS - 1, "B", 1), "padding"),
        ("E-5", lambda e: put(e, LENGTHS - 1, "B", 1), "padding"),
        ("E-5", lambda e: put(e, SEGMENTS - 1, "B", 1), "padding"),
        ("E-5", lambda e: put(e, len(e) - 1, "B", 1), "padding"),
        ("E-5", lambda e: put(e, len(e) - 8, "B", 1), "padding"),
        ("E-6", lambda e: put(e, BASE, "I", get(e, BASE, "I") + 1), "malformed"),
        ("E-6", lambda e: put(e, BASE, "I", 2**32 - 1), "malformed"),
        ("E-6", lambda e: put(e, OFFSETS, "I", 1), "malformed"),
        ("E-6", lambda e: put(e, OFFSETS + 4, "I", get(e, OFFSETS + 4, "I") + 1), "malformed"),
        ("E-6", lambda e: put(e, OFFSETS + 4, "I", 2**32 - 1), "malformed"),
        ("E-8", lambda e: put(e, ROW_SCALES, "H", 0x7F80), "value"),
        ("E-8", lambda e: put(e, ROW_SCALES + 2, "H", 0xFF80), "value"),
        ("E-8", lambda e: put(e, COLUMN_SCALES - 4, "H", 0x7FC0), "value"),
        ("E-8", lambda e: put(e, COLUMN_SCALES + 2 * COLUMNS - 2, "H", 0x7F80), "value"),
        ("E-8", lambda e: put(e, ROW_SCALES, "H", 0x7F7F), None),
        ("E-14", lambda e: put(e, ONES, "Q", get(e, ONES, "Q") + 1), "malformed"),
        ("E-14", lambda e: put(e, ONES, "Q", 2**64 - 1), "malformed"),
    ],
)  # fmt: skip
def test_one_change_of_a_ternary_extent(
    requirement: str, change: Callable[[bytearray], Any], expected: str | None
) -> None:
    assert code_of_extent(change) == expected, requirement


def test_lengths_of_no_segment_have_a_width() -> None:
    """[E-4], in a matrix without rows, whose refinement is malformed anyway ([E-16])."""
    index, extents, _ = one_matrix(0, 50)
    header = struct.pack("<IIBB22x", 0, 0, 1, 1) + struct.pack("<IIBB22x", 0, 0, 3, 0)
    with opened(assemble(index, [header + bytes(16), extents[1]])) as file:
        with pytest.raises(QMoEError, match="lengths have 3 bytes") as caught:
            file.read("w")
        assert caught.value.code == "malformed"


def longer_lengths(extent: bytearray) -> None:
    """Every length is one above a base that is one less."""
    put(extent, SECOND + BASE, "I", get(extent, SECOND + BASE, "I") - 1)
    for row in range(ROWS):
        extent[LENGTHS_2 + row] += 1


@pytest.mark.parametrize(
    ("requirement", "change", "expected"),
    [
        ("E-1", lambda e: put(e, SECOND + DICTIONARY, "I", 2), "malformed"),
        ("E-4", lambda e: bytes(e[:63]), "malformed"),
        ("E-4", lambda e: bytes(e[:32]), "malformed"),
        ("E-4", lambda e: bytes(e[:-16]), "malformed"),
        ("E-4", lambda e: bytes(e + bytes(16)), "malformed"),
        ("E-4", lambda e: put(e, SECOND + WIDTH, "B", 3), "malformed"),
        ("E-4", lambda e: put(e, REFINED, "B", 0), "malformed"),
        ("E-4", lambda e: put(e, REFINED, "B", 2), "malformed"),
        ("E-4", lambda e: put(e, SECOND + REFINED, "B", 1), "malformed"),
        ("E-4", lambda e: put(e, SECOND + SEGMENT_BYTES, "Q", 2**32), "limit"),
        ("E-4", lambda e: put(e, SECOND + SEGMENT_BYTES, "Q", 2**32 - 1), "malformed"),
        ("E-5", lambda e: put(e, SPARE, "B", 1), "padding"),
        ("E-5", lambda e: put(e, SECOND + SPARE, "B", 1), "padding"),
        ("E-5", lambda e: put(e, SECOND + SPARE + 5, "B", 1), "padding"),
        ("E-5", lambda e: put(e, LENGTHS_2 - 1, "B", 1), "padding"),
        ("E-5", lambda e: put(e, SEGMENTS_2 - 1, "B", 1), "padding"),
        ("E-5", lambda e: put(e, len(e) - 8, "B", 1), "padding"),
        ("E-6", lambda e: put(e, SECOND + BASE, "I", get(e, SECOND + BASE, "I") + 1), "malformed"),
        ("E-6", lambda e: put(e, OFFSETS_2, "I", 1), "malformed"),
        ("E-6", lambda e: put(e, OFFSETS_2 + 4, "I", 2**32 - 1), "malformed"),
        ("E-9", longer_lengths, "malformed"),
        ("E-14", lambda e: put(e, SECOND + ONES, "Q", get(e, SECOND + ONES, "Q") - 1), "malformed"),
        ("E-14", lambda e: put(e, SECOND + ONES, "Q", 2**64 - 1), "malformed"),
        ("E-16", lambda e: put(e, SECOND + ONES, "Q", 0), "malformed"),
    ],
)  # fmt: skip
def test_one_change_of_a_refined_extent(
    requirement: str, change: Callable[[bytearray], Any], expected: str | None
) -> None:
    assert code_of_extent(change, most=5) == expected, requirement


@pytest.mark.parametrize(
    "keys",
    [
        {"symmetric": True},
        {"column_scale": False},
        {"rows_per_segment": 2},
        {"shape": [40, 49]},
        {"shape": [41, 50]},
        {"shape": [40, 51]},
        {"shape": [50, 40]},
        {"shape": [0, 50]},
        {"shape": [40, 0]},
    ],
)
def test_an_entry_that_does_not_fit_its_extent(keys: dict[str, Any]) -> None:
    """[E-1] [E-4] [E-10] to [E-13]"""
    assert code_of_extent(nothing, **keys) in ("malformed", "padding")


def test_lengths_that_balance_each_other_are_found_by_the_block_offsets() -> None:
    """[E-6] The sum is right; row 0 is one byte longer at the cost of row 39."""

    def change(extent: bytearray) -> None:
        lengths = extent[LENGTHS : LENGTHS + ROWS]
        longer = min(range(32), key=lambda row: lengths[row] == 0)
        shorter = max(range(32, ROWS), key=lambda row: lengths[row])
        extent[LENGTHS + longer] += 1
        extent[LENGTHS + shorter] -= 1

    assert code_of_extent(change) == "malformed"


def rebuilt(base: int, kind: str, lengths: list[int], rows: int, columns: int) -> bytes:
    """A file whose one matrix has such lengths, zeros for scales and segments; width 8."""
    index, extents, _ = one_matrix(rows, columns)
    total = base * rows + sum(lengths)
    parts = [
        struct.pack("<IIB7xQQ", 0, base, struct.calcsize(kind), 0, total),
        bytes(4 * rows),
        struct.pack(
            f"<{-(-rows // 32)}I", *(sum(lengths[:r]) + base * r for r in range(0, rows, 32))
        ),
        struct.pack(f"<{rows}{kind}", *lengths),
    ]
    extent = b"".join(part + bytes(align(len(part), 16) - len(part)) for part in parts)
    extent += bytes(align(len(extent) + total + 8, 16) - len(extent))
    return assemble(index, [extent, extents[1]])


def test_lengths_in_another_form_than_the_shortest() -> None:
    """[E-9]; the segments are not looked at before"""

    def message(data: bytes) -> str:
        with pytest.raises(QMoEError) as caught, opened(data) as file:
            file.encoded("w")
        return f"{caught.value.code}: {caught.value}"

    with opened(rebuilt(7, "B", [0, 1, 255], 3, 50)) as file:
        assert file.encoded("w").levels.mask.lengths.tolist() == [0, 1, 255]
    for data in (
        rebuilt(6, "B", [1, 2, 3], 3, 50),
        rebuilt(7, "H", [0, 1, 255], 3, 50),
        rebuilt(7, "I", [0, 1, 256], 3, 50),
        rebuilt(7, "I", [0, 1, 65535], 3, 50),
        rebuilt(1, "B", [], 0, 50),
        rebuilt(0, "H", [], 0, 50),
    ):
        assert "malformed" in message(data)
        assert "shortest form" in message(data)
    index, extents = take_apart(rebuilt(0, "B", [], 0, 50))
    extents[0] = extents[0][:8] + b"\3" + extents[0][9:]  # of which there are none
    assert "lengths have 3 bytes" in message(assemble(index, extents))
    with opened(rebuilt(7, "H", [0, 1, 256], 3, 50)) as file:
        assert file.encoded("w").levels.mask.lengths.dtype == np.uint16


def test_a_segment_too_short_for_the_row_is_found_before_anything_is_decoded() -> None:
    """[E-7]: 1020 columns need 4 codewords, 1021 need 5"""
    for columns, base, expected in ((1020, 4, None), (1021, 4, "malformed"), (1021, 5, None)):
        with opened(rebuilt(base, "B", [0], 1, columns)) as file:
            if expected is None:
                file.encoded("w")
                continue
            with pytest.raises(QMoEError, match="too short for rows of 1021") as caught:
                file.encoded("w")
            assert caught.value.code == expected


@pytest.mark.parametrize(("shape", "sections"), [([3, 0], 3), ([0, 2**31 - 1], 0), ([0, 0], 0)])
def test_a_matrix_without_elements_is_nothing_to_wait_for(shape: list[int], sections: int) -> None:
    """It takes a few bytes, whatever its sides."""
    index, extents, _ = one_matrix(3, 20)
    keys = {"shape": shape, "rows_per_segment": 2**31 - 1}
    extent = struct.pack("<IIB7x16x", 0, 0, 1) + bytes(16 * sections + 16)
    data = assemble({**index, "tensors": [index["tensors"][0] | keys]}, [extent, extents[1]])
    found = read_all(data)["w"]
    assert isinstance(found, np.ndarray)
    assert found.shape == tuple(shape)


@pytest.mark.parametrize("encoding", ["raw", "zstd", "int-dict"])
def test_reading_a_tensor_of_an_unknown_type(encoding: str) -> None:
    """[T-5]"""
    index, extents, _ = one_matrix(3, 20)
    record = index["tensors"][0] | {"dtype": "F4"}
    if encoding != "int-dict":
        record = tensor(name="w", dtype="F4", encoding=encoding)
    data = assemble({**index, "tensors": [record]}, extents)
    with opened(data) as file:
        for call in (lambda: file.read("w"), file.verify):
            with pytest.raises(QMoEError, match="'F4' is unknown") as caught:
                call()
            assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    ("requirement", "change", "keys", "expected"),
    [
        ("D-1", None, {"max_length": 100}, "malformed"),
        ("D-1", None, {"max_ones": 2}, "malformed"),
        ("D-1", None, {"width": 9}, "malformed"),
        ("D-2", lambda tree: tree[:-1], {}, "malformed"),
        ("D-2", lambda tree: tree + b"\0", {}, "malformed"),
        ("R-1", lambda tree: tree + b"\0", {"bytes": 64}, "malformed"),
        ("L-1", lambda tree: tree + bytes(1 << 20), {}, "limit"),
        ("D-2", lambda tree: tree[:-1] + bytes([tree[-1] | 0x80]), {}, "padding"),
        ("L-1", lambda tree: b"", {}, "limit"),
        ("D-3", lambda tree: b"\0" + tree[1:], {}, "malformed"),
        ("D-3", lambda tree: b"\xff" * 64, {}, None),
    ],
)
def test_dictionaries(
    requirement: str,
    change: Callable[[bytes], bytes] | None,
    keys: dict[str, Any],
    expected: str | None,
) -> None:
    """The code of each defect of a tree is the codec's to test; here, that it is looked at."""
    index, extents, _ = one_matrix(3, 20)
    with opened(assemble(index, extents)) as file:
        tree = file.dictionaries[0].tree
    extents[1] = change(tree) if change else tree
    record = index["dictionaries"][0] | {"bytes": len(extents[1]), "encoding": "raw"} | keys
    code = code_of(assemble({**index, "dictionaries": [record]}, extents))
    assert code == expected if expected else code is not None, requirement


def test_a_dictionary_that_no_matrix_uses_is_verified_too() -> None:
    index, extents, _ = one_matrix(3, 20)
    second = index["dictionaries"][0] | {"extent": 2, "max_length": 99}
    data = assemble(
        {**index, "dictionaries": [*index["dictionaries"], second]}, [*extents, extents[1]]
    )
    assert code_of(data) == "malformed"
    with opened(data) as file:
        file.read("w")
        with pytest.raises(QMoEError, match="dictionary 1"):
            _ = file.dictionaries
