"""Segments: what is encoded comes back, byte for byte as specified, and damage is reported."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import (
    Dictionary,
    EncodedBits,
    EncodedLevels,
    decode,
    encode,
    fit_dictionary,
)
from qmoe_format.errors import QMoEError

from .strategies import dictionaries, dictionary, levels, random_levels, with_string

Levels = npt.NDArray[np.int8]


@given(levels(), dictionaries, dictionaries, st.sampled_from([None, 1, 2, 7, 1000]))
@settings(deadline=None)
def test_round_trip(
    matrix: Levels, chosen: Dictionary, other: Dictionary, together: int | None
) -> None:
    encoded = encode(
        matrix, dictionary=chosen, refinement_dictionary=other, rows_per_segment=together
    )
    assert np.array_equal(decode(encoded), matrix)
    assert encoded.nonzeros == np.count_nonzero(matrix)
    assert (encoded.refinement is not None) == bool((np.abs(matrix) > 1).any())
    for bits in encoded.strings:
        assert int(bits.lengths.min(initial=0)) == 0
    if encoded.refinement:
        assert encoded.refinement.ones == int(np.abs(matrix.astype(int)).sum()) - encoded.nonzeros


@pytest.mark.parametrize("width", range(8, 17))
@pytest.mark.parametrize("most", [1, 2, 127])
def test_every_width(width: int, most: int) -> None:
    matrix = random_levels(9, 700, 0.6, most=most)
    encoded = encode(matrix, width=width)
    assert encoded.mask.dictionary.width == width
    assert np.array_equal(decode(encoded), matrix)


@pytest.mark.parametrize("columns", [32511, 32512, 32513, 32767, 65600, 100_001])
@pytest.mark.parametrize("most", [1, 3, 127])
def test_rows_longer_than_a_chunk(columns: int, most: int) -> None:
    for zero_fraction in (0.1, 0.9, 1.0):
        matrix = random_levels(3, columns, zero_fraction, most=most)
        chosen = dictionary(0.885, 12)
        encoded = encode(matrix, dictionary=chosen, refinement_dictionary=chosen)
        assert np.array_equal(decode(encoded), matrix)


@pytest.mark.parametrize("width", [8, 12, 15, 16])
def test_threads_do_not_change_the_bytes(width: int) -> None:
    matrix = random_levels(1000, 3000, 0.885, most=2)
    chosen = fit_dictionary(0.885, width)
    one, two = (
        encode(matrix, threads, dictionary=chosen, refinement_dictionary=chosen)
        for threads in (1, 2)
    )
    for mine, yours in zip(one.strings, two.strings, strict=True):
        assert mine.segments.tobytes() == yours.segments.tobytes()
        assert mine.block_offsets.tobytes() == yours.block_offsets.tobytes()
        assert mine.lengths.tobytes() == yours.lengths.tobytes()
    assert np.array_equal(decode(one, threads=2), matrix)


def test_rows_together_are_one_long_row() -> None:
    """A segment of k rows is the segment of one row k times as long."""
    matrix = random_levels(7, 100, 0.885, most=3)
    options = dict.fromkeys(("dictionary", "refinement_dictionary"), dictionary(0.885, 8))
    together = encode(matrix, rows_per_segment=7, **options)  # type: ignore[arg-type]
    long = encode(matrix.reshape(1, 700), **options)  # type: ignore[arg-type]
    in_threes = encode(matrix, rows_per_segment=3, **options)  # type: ignore[arg-type]
    last = encode(matrix[6:], **options)  # type: ignore[arg-type]
    assert in_threes.count == 3
    for number in range(2):
        assert (
            together.strings[number].segments.tobytes() == long.strings[number].segments.tobytes()
        )
        part = in_threes.strings[number]
        segment = part.segments[part.offsets()[2] :].tobytes()
        assert segment == last.strings[number].segments.tobytes()


COMB = int(("1" * 255 + "0" * 256)[::-1], 2).to_bytes(64, "little")


def test_a_segment_is_laid_out_as_specified() -> None:
    """By hand, with the comb of 8 bits: codeword c > 0 is 255 - c zeros and a one."""
    comb = Dictionary.from_tree(8, COMB)
    row = np.zeros((1, 12), np.int8)
    row[0, [0, 3, 4]] = [1, -3, -2]
    encoded = encode(row, dictionary=comb, refinement_dictionary=comb)
    # One codeword each for  +    0 0 -  -    0 0 0 0 0 0 0 ...    signs, lowest first: 0 1 1
    #                        255  253    255  0                    from the end of the segment down
    assert encoded.mask.segments[:5].tolist() == [0b110, 0, 255, 253, 255]
    assert encoded.mask.segment_bytes == 5
    assert encoded.mask.segments[5:].tolist() == [0] * 8
    # The refinement is 0 110 10:  01   1    01   0 ...
    #                              254  255  254  0
    assert encoded.refinement is not None
    assert encoded.refinement.segments[:4].tolist() == [0, 254, 255, 254]
    assert encoded.refinement.segment_bytes == 4
    assert encoded.refinement.segments[4:].tolist() == [0] * 8


# SPEC.md section 7.2 to the letter, bit by bit.


def entries_of(tree: bytes) -> list[tuple[int, ...]]:
    """The entries of a dictionary in the order of their codewords."""
    bits = iter(np.unpackbits(np.frombuffer(tree, np.uint8), bitorder="little"))

    def below(path: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [*below((*path, 0)), *below((*path, 1))] if next(bits) else [path]

    return below(())


def segment_of(string: Sequence[int], chosen: Dictionary, signs: Sequence[int] = ()) -> bytes:
    """Codewords of a string, zeros completing its last entry, above signs."""
    codewords = {entry: code for code, entry in enumerate(entries_of(chosen.tree))}
    rest, codes = list(string), []
    entry: tuple[int, ...] = ()
    while rest or entry:
        entry = (*entry, rest.pop(0) if rest else 0)
        if entry in codewords:
            codes.append(codewords[entry])
            entry = ()
    size = -(-(len(codes) * chosen.width + len(signs)) // 8)
    number = sum(sign << k for k, sign in enumerate(signs))
    for i, code in enumerate(codes, 1):
        number |= code << 8 * size - i * chosen.width
    return number.to_bytes(size, "little")


def refinement_of(row: Levels) -> list[int]:
    return [bit for level in row if level for bit in [1] * (abs(int(level)) - 1) + [0]]


@pytest.mark.parametrize("most", [1, 2, 127])
def test_segments_are_those_of_the_specification(most: int) -> None:
    """[E-10] to [E-13], bit by bit."""
    chosen, other = dictionary(0.6, 9), dictionary(0.3, 11)
    matrix = random_levels(5, 300, 0.6, most=most)
    matrix[3] = 0
    encoded = encode(matrix, dictionary=chosen, refinement_dictionary=other, rows_per_segment=1)
    masks = [
        segment_of((row != 0).tolist(), chosen, (row[row != 0] < 0).tolist()) for row in matrix
    ]
    refinements = [segment_of(refinement_of(row), other) for row in matrix]
    assert refinements[3] == b""
    for bits, segments in zip(encoded.strings, (masks, refinements), strict=False):
        assert bits.segments.tobytes() == b"".join(segments) + bytes(8)
        assert np.diff(bits.offsets()).tolist() == [len(segment) for segment in segments]


# Damage


def with_segments(bits: EncodedBits, segments: Sequence[bytes]) -> EncodedBits:
    """Other segments in place of those of ``bits``."""
    joined = b"".join(segments)
    return dataclasses.replace(
        bits,
        length_base=0,
        lengths=np.array([len(segment) for segment in segments], np.uint32),
        segments=np.frombuffer(joined + bytes(8), np.uint8),
        segment_bytes=len(joined),
    )


def damaged(
    encoded: EncodedLevels, what: str, row: int, change: Callable[[bytes], bytes]
) -> EncodedLevels:
    """``encoded``, of one row a segment, with one segment of a string replaced."""
    bits = getattr(encoded, what)
    parts = [bits.segments[a:b].tobytes() for a, b in itertools.pairwise(bits.offsets())]
    parts[row] = change(parts[row])
    return with_string(encoded, what, with_segments(bits, parts))


def widened(segment: bytes, signs: int) -> bytes:
    """The same codewords and signs, with eight more padding bits between them."""
    number = int.from_bytes(segment, "little")
    low = number & ((1 << signs) - 1)
    high = number >> signs << (signs + 8)
    return (high | low).to_bytes(len(segment) + 1, "little")


def replaced_by(segment: bytes, _: bytes) -> bytes:
    return segment


def refuse(code: str, words: str, encoded: EncodedLevels) -> None:
    with pytest.raises(QMoEError, match=words) as error:
        decode(encoded)
    assert error.value.code == code


def sample() -> tuple[EncodedLevels, list[int]]:
    """A matrix of segments of one row, whose refinements are not empty; their non-zeros."""
    matrix = random_levels(40, 300, 0.885, most=3)
    matrix[:, 0] = 2
    encoded = encode(matrix, width=8, rows_per_segment=1)
    return encoded, np.count_nonzero(matrix, axis=1).tolist()


def test_damage_of_a_mask_is_named() -> None:
    encoded, nonzeros = sample()
    with_gap = next(row for row in range(40) if nonzeros[row] % 8 in range(1, 7))

    def set_padding(segment: bytes) -> bytes:
        changed = bytearray(segment)
        changed[nonzeros[with_gap] // 8] |= 0x80
        return bytes(changed)

    for row, change, code, words in (
        (7, lambda s: s[1:], "malformed", "segment 7"),
        (7, lambda s: s[:-1], "malformed", "segment 7"),
        (39, lambda s: b"", "malformed", "segment 39 ends before"),
        (0, lambda s: b"\0" + s, "malformed", "segment 0"),
        (with_gap, set_padding, "padding", f"segment {with_gap}"),
    ):
        refuse(code, words, damaged(encoded, "mask", row, change))
    for row in range(40):  # eight bits too many, with any number of padding bits before
        change = partial(widened, signs=nonzeros[row])
        refuse("malformed", "longer than", damaged(encoded, "mask", row, change))


def test_damage_of_a_refinement_is_named() -> None:
    encoded, _ = sample()
    assert encoded.refinement is not None
    name = "the refinement of segment"
    for row, change, code, words in (
        (7, lambda s: s[1:], "malformed", f"{name} 7 ends before"),
        (39, lambda s: b"", "malformed", f"{name} 39 ends before"),
        (0, lambda s: b"\0" + s, "malformed", f"{name} 0 is longer"),
        (5, lambda s: b"\x80" + s, "malformed", f"{name} 5 is longer"),
    ):
        refuse(code, words, damaged(encoded, "refinement", row, change))

    chosen = fit_dictionary(0.8, 9)  # codewords that do not fill bytes
    matrix = decode(encoded)
    narrow = encode(matrix, refinement_dictionary=chosen, rows_per_segment=1)
    strings = [refinement_of(row) for row in matrix]
    good = [segment_of(string, chosen) for string in strings]
    with_gap = next(row for row in range(40) if good[row][0] & 1 == 0 and len(good[row]) % 9)

    def replaced(row: int, segment: bytes) -> EncodedLevels:
        return damaged(narrow, "refinement", row, partial(replaced_by, segment))

    segment = good[with_gap]
    assert np.array_equal(decode(replaced(with_gap, segment)), matrix)
    padded = bytes([segment[0] | 1]) + segment[1:]
    refuse("padding", f"{name} {with_gap} has padding", replaced(with_gap, padded))
    # One non-zero fewer than the mask has, and one more, where that takes a codeword.
    refuse("malformed", "ends before", replaced(3, segment_of(strings[3][:-1][:1], chosen)))
    more = segment_of(strings[3] + [0] * 300, chosen)
    refuse("malformed", f"{name} 3 is longer", replaced(3, more))


def test_a_one_beyond_the_end_is_refused() -> None:
    """[E-11]"""
    longer = encode(np.array([[0] * 10 + [1]], np.int8), width=8)
    refuse("malformed", "segment 0 has a one beyond", dataclasses.replace(longer, columns=10))
    chosen = dictionary(0.885, 8)
    row = np.array([[2, 0, 1]], np.int8)
    encoded = encode(row, refinement_dictionary=chosen)
    assert segment_of([1, 0, 0], chosen) == segment_of([1, 0, 0, 0, 0], chosen)
    for string in ([1, 0, 0, 1], [1, 0, 0, 0, 1]):
        beyond = segment_of(string, chosen)
        assert len(beyond) == len(segment_of([1, 0, 0], chosen))
        bad = damaged(encoded, "refinement", 0, partial(replaced_by, beyond))
        refuse("malformed", "refinement of segment 0 has a one beyond", bad)


@pytest.mark.parametrize("width", [8, 12, 16])
def test_the_largest_magnitude(width: int) -> None:
    """[E-15]"""
    chosen = dictionary(0.3, width)
    row = np.array([[3, -127, 0, 1]], np.int8)
    encoded = encode(row, refinement_dictionary=chosen)
    for most, code in ((127, None), (128, "limit"), (129, "limit"), (383, "limit")):
        string = [1, 1, 0] + [1] * (most - 1) + [0, 0]
        segment = segment_of(string, chosen)
        bad = damaged(encoded, "refinement", 0, partial(replaced_by, segment))
        if code is None:
            assert np.array_equal(decode(bad), row)
        else:
            refuse(code, "beyond 127", bad)


def test_the_number_of_ones() -> None:
    """[E-14] [E-16]"""
    encoded, _ = sample()
    for what in ("mask", "refinement"):
        bits = getattr(encoded, what)
        for wrong in (-1, 1):
            other = dataclasses.replace(bits, ones=bits.ones + wrong)
            refuse("malformed", "ones", with_string(encoded, what, other))
    assert encoded.refinement is not None
    with pytest.raises(QMoEError, match="refines nothing") as error:
        dataclasses.replace(encoded, refinement=dataclasses.replace(encoded.refinement, ones=0))
    assert error.value.code == "malformed"


def test_lengths_that_do_not_fit() -> None:
    encoded, _ = sample()
    for change in (
        {"segment_bytes": encoded.mask.segment_bytes - 1},
        {"segments": encoded.mask.segments[:-1]},
        {"segments": np.repeat(encoded.mask.segments, 2)[::2]},
        {"lengths": encoded.mask.lengths.astype(np.int64)},
        {"lengths": encoded.mask.lengths[None]},
    ):
        with pytest.raises(QMoEError) as error:
            dataclasses.replace(encoded.mask, **change)
        assert error.value.code == "malformed"
    assert encoded.refinement is not None
    few = with_segments(encoded.refinement, [b""] * 39)
    with pytest.raises(QMoEError, match="39 lengths for 40") as error:
        dataclasses.replace(encoded, refinement=few)


def levels_of(columns: int, chosen: Dictionary, mask: bytes, refinement: bytes) -> EncodedLevels:
    """One row, of these very bytes."""
    empty = encode(np.array([[2]], np.int8), dictionary=chosen, refinement_dictionary=chosen)
    assert empty.refinement is not None
    return EncodedLevels(
        rows=1,
        columns=columns,
        rows_per_segment=1,
        mask=dataclasses.replace(with_segments(empty.mask, [mask]), ones=0),
        refinement=with_segments(empty.refinement, [refinement]),
    )


@given(
    st.integers(0, 50).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    st.integers(0, 70_000),
    dictionaries,
)
@settings(deadline=None)
def test_any_bytes_are_a_mask_or_refused(data: bytes, columns: int, chosen: Dictionary) -> None:
    """No crash, no write outside: and what decodes is canonical, so it encodes to the same."""
    encoded = dataclasses.replace(levels_of(columns, chosen, data, b""), refinement=None)
    try:
        matrix = decode(encoded)
    except QMoEError as error:
        assert error.code in ("malformed", "padding")
        return
    again = encode(matrix, dictionary=chosen)
    assert again.mask.segments.tobytes() == encoded.mask.segments.tobytes()


@given(
    st.integers(0, 40),
    st.one_of(
        st.binary(max_size=50),
        # Codewords without a zero, and with nothing else: many times those that a list holds.
        st.builds(bytes.__mul__, st.sampled_from([b"\0", b"\xff"]), st.integers(0, 20_000)),
    ),
    dictionaries,
)
@settings(deadline=None)
def test_any_bytes_are_a_refinement_or_refused(
    nonzeros: int, data: bytes, chosen: Dictionary
) -> None:
    mask = encode(np.ones((1, nonzeros), np.int8), dictionary=chosen).mask
    encoded = dataclasses.replace(levels_of(nonzeros, chosen, b"", data), mask=mask)
    try:
        matrix = decode(encoded)
    except QMoEError as error:
        assert error.code in ("malformed", "padding", "limit")
        return
    again = encode(matrix, dictionary=chosen, refinement_dictionary=chosen).refinement
    assert again is not None
    assert again.segments[: again.segment_bytes].tobytes() == data


@given(levels(max_rows=3, max_columns=40), dictionaries, st.data())
@settings(deadline=None)
def test_a_changed_byte_is_other_levels_or_refused(
    matrix: Levels, chosen: Dictionary, data: st.DataObject
) -> None:
    """Two different encodings never stand for the same levels."""
    options: dict[str, Any] = {"dictionary": chosen, "refinement_dictionary": chosen}
    encoded = encode(matrix, rows_per_segment=1, **options)
    name = data.draw(st.sampled_from(["mask", "refinement"][: len(encoded.strings)]))
    bits: EncodedBits = getattr(encoded, name)
    segments = bits.segments.copy()
    if not bits.segment_bytes:
        return
    segments[data.draw(st.integers(0, bits.segment_bytes - 1))] ^= data.draw(st.integers(1, 255))
    changed = dataclasses.replace(bits, segments=segments)
    try:
        other = decode(with_string(encoded, name, changed))
    except QMoEError as error:
        assert error.code in ("malformed", "padding", "limit")
        return
    again = encode(other, rows_per_segment=1, **options)
    assert getattr(again, name).segments.tobytes() == segments.tobytes()


@pytest.mark.parametrize(
    "matrix",
    [np.zeros((2, 2), np.int16), np.zeros(4, np.int8), np.full((2, 2), -128, np.int8)],
)
def test_what_is_not_levels_is_refused(matrix: npt.NDArray[Any]) -> None:
    with pytest.raises(QMoEError) as error:
        encode(matrix)
    assert error.value.code == "argument"


@pytest.mark.parametrize("together", [0, -1])
def test_a_segment_has_a_row(together: int) -> None:
    matrix = np.zeros((2, 2), np.int8)
    with pytest.raises(QMoEError) as error:
        encode(matrix, rows_per_segment=together)
    assert error.value.code == "argument"
    with pytest.raises(QMoEError) as error:
        dataclasses.replace(encode(matrix), rows_per_segment=together)
    assert error.value.code == "argument"
