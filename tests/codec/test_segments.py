"""Segments: what is encoded comes back, byte for byte as specified, and damage is reported."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from qmoe_format.codec import Dictionary, EncodedLevels, decode, encode, fit_dictionary
from qmoe_format.errors import QMoEError

from .strategies import dictionaries, dictionary, levels, random_levels


@given(levels(), dictionaries, st.sampled_from([None, 1, 2, 7, 1000]))
@settings(deadline=None)
def test_round_trip(matrix: npt.NDArray[np.int8], chosen: Dictionary, together: int | None) -> None:
    encoded = encode(matrix, chosen, rows_per_segment=together)
    assert np.array_equal(decode(encoded), matrix)
    assert encoded.nonzeros == np.count_nonzero(matrix)
    assert int(encoded.lengths.min(initial=0)) == 0


@pytest.mark.parametrize("columns", [32511, 32512, 32513, 32767, 65600, 100_001])
@pytest.mark.parametrize("signs", ["plane", "codeword"])
def test_rows_longer_than_a_chunk(columns: int, signs: str) -> None:
    for zero_fraction in (0.1, 0.9, 1.0):
        matrix = random_levels(3, columns, zero_fraction)
        assert np.array_equal(decode(encode(matrix, dictionary(0.885, 12, signs))), matrix)


@pytest.mark.parametrize("width", [8, 12, 15, 16])
@pytest.mark.parametrize("signs", ["plane", "codeword"])
def test_threads_do_not_change_the_bytes(width: int, signs: str) -> None:
    matrix = random_levels(1000, 3000, 0.885)
    chosen = fit_dictionary(0.885, width, signs)
    one, two = encode(matrix, chosen), encode(matrix, chosen, threads=2)
    assert one.segments.tobytes() == two.segments.tobytes()
    assert one.block_offsets.tobytes() == two.block_offsets.tobytes()
    assert one.lengths.tobytes() == two.lengths.tobytes()
    assert np.array_equal(decode(one, threads=2), matrix)


def test_rows_together_are_one_long_row() -> None:
    """A segment of k rows is the segment of one row k times as long."""
    matrix = random_levels(7, 100, 0.885)
    chosen = dictionary(0.885, 8, "plane")
    together = encode(matrix, chosen, rows_per_segment=7)
    assert together.segments.tobytes() == encode(matrix.reshape(1, 700), chosen).segments.tobytes()
    in_threes = encode(matrix, chosen, rows_per_segment=3)
    last = encode(matrix[6:], chosen).segments.tobytes()
    assert in_threes.count == 3
    assert in_threes.segments[in_threes.offsets()[2] :].tobytes() == last


def test_a_segment_is_laid_out_as_specified() -> None:
    """By hand, with the comb of 8 bits: codeword c > 0 is 255 - c zeros and a non-zero."""
    bits = "1" * 255 + "0" * 256
    comb = Dictionary.from_tree(8, "plane", int(bits[::-1], 2).to_bytes(64, "little"))
    row = np.zeros((1, 12), np.int8)
    row[0, [0, 3, 4]] = [1, -1, -1]
    encoded = encode(row, comb)
    # One codeword each for  +    0 0 -  -    0 0 0 0 0 0 0 ...    signs, lowest first: 0 1 1
    #                        255  253    255  0                    from the end of the segment down
    assert encoded.segments[:5].tolist() == [0b110, 0, 255, 253, 255]
    assert encoded.segment_bytes == 5
    assert encoded.segments[5:].tolist() == [0] * 8


def entries_of(tree: bytes) -> list[tuple[int, ...]]:
    """The entries of a dictionary in the order of their codewords, 1 for a non-zero."""
    bits = iter(np.unpackbits(np.frombuffer(tree, np.uint8), bitorder="little"))

    def below(path: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [*below((*path, 0)), *below((*path, 1))] if next(bits) else [path]

    return below(())


@pytest.mark.parametrize("signs", ["plane", "codeword"])
def test_segments_read_by_the_letter(signs: str) -> None:
    """Codewords from the end, weight by weight, as SPEC.md section 7.2 has it."""
    chosen = dictionary(0.6, 9, signs)
    book = [
        [-1 if weight and next(minus) else weight for weight in entry]
        for entry in entries_of(chosen.tree)
        for code in range(1 << sum(entry) if signs == "codeword" else 1)
        for minus in [iter([code >> k & 1 for k in range(sum(entry))])]
    ]
    matrix = random_levels(1, 500, 0.6)
    encoded = encode(matrix, chosen)
    number = int.from_bytes(encoded.segments[: encoded.segment_bytes].tobytes(), "little")
    place = 8 * encoded.segment_bytes
    levels: list[int] = []
    while len(levels) < 500:
        place -= 9
        levels += book[number >> place & 511]
    if signs == "plane":
        plane = iter([number >> k & 1 for k in range(sum(levels[:500]))])
        levels = [-1 if level and next(plane) else level for level in levels]
    assert levels[:500] == matrix[0].tolist()
    assert not any(levels[500:])


def damaged(encoded: EncodedLevels, row: int, change: Any) -> EncodedLevels:
    """``encoded``, of one row a segment, with one segment replaced by ``change`` of it."""
    offsets = encoded.offsets()
    parts = [encoded.segments[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
    parts[row] = change(parts[row])
    lengths = np.array([len(part) for part in parts])
    joined = b"".join(parts)
    return dataclasses.replace(
        encoded,
        length_base=0,
        lengths=lengths.astype(np.uint32),
        segments=np.frombuffer(joined + bytes(8), np.uint8),
        segment_bytes=len(joined),
    )


def widened(segment: bytes, signs: int) -> bytes:
    """The same codewords and signs, with eight more padding bits between them."""
    number = int.from_bytes(segment, "little")
    low = number & ((1 << signs) - 1)
    high = number >> signs << (signs + 8)
    return (high | low).to_bytes(len(segment) + 1, "little")


def test_damage_is_named() -> None:
    chosen = dictionary(0.885, 8, "plane")
    encoded = encode(random_levels(40, 300, 0.885), chosen, rows_per_segment=1)
    offsets = encoded.offsets()
    with_gap = next(  # a row whose codewords and signs leave padding bits
        row for row in range(40) if np.count_nonzero(decode(encoded)[row]) % 8 in range(1, 7)
    )
    nonzeros = np.count_nonzero(decode(encoded), axis=1).tolist()
    signs = nonzeros[with_gap]

    def set_padding(segment: bytes) -> bytes:
        changed = bytearray(segment)
        changed[signs // 8] |= 0x80
        return bytes(changed)

    for row, change, code, words in (
        (7, lambda s: s[1:], "malformed", "segment 7"),
        (7, lambda s: s[:-1], "malformed", "segment 7"),
        (39, lambda s: b"", "malformed", "ends before"),
        (0, lambda s: b"\0" + s, "malformed", "segment 0"),
        (with_gap, set_padding, "padding", f"segment {with_gap}"),
    ):
        with pytest.raises(QMoEError, match=words) as error:
            decode(damaged(encoded, row, change))
        assert error.value.code == code
    for row in range(40):  # eight bits too many, with any number of padding bits before
        with pytest.raises(QMoEError, match="longer than"):
            decode(damaged(encoded, row, partial(widened, signs=nonzeros[row])))
    with pytest.raises(QMoEError, match="header says"):
        decode(dataclasses.replace(encoded, nonzeros=encoded.nonzeros + 1))
    with pytest.raises(QMoEError, match="add up to"):
        dataclasses.replace(encoded, segment_bytes=int(offsets[-1]) - 1)


def test_a_nonzero_beyond_the_row_is_refused() -> None:
    chosen = dictionary(0.885, 8, "plane")
    longer = encode(np.array([[0] * 10 + [1]], np.int8), chosen)
    with pytest.raises(QMoEError, match="beyond"):
        decode(dataclasses.replace(longer, columns=10))


def test_a_codeword_that_the_dictionary_lacks_is_refused() -> None:
    chosen = dictionary(0.885, 8, "codeword")
    encoded = encode(np.zeros((2, 100), np.int8), chosen, rows_per_segment=1)
    unused = damaged(encoded, 1, lambda segment: segment + b"\xff")
    with pytest.raises(QMoEError, match="lacks"):
        decode(unused)


@given(
    st.integers(0, 50).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    st.integers(0, 70_000),
    dictionaries,
)
@settings(deadline=None)
def test_any_bytes_decode_or_are_refused(data: bytes, columns: int, chosen: Dictionary) -> None:
    """No crash, no write outside: and what decodes is canonical, so it encodes to the same."""
    encoded = EncodedLevels(
        rows=1,
        columns=columns,
        rows_per_segment=1,
        dictionary=chosen,
        nonzeros=0,
        length_base=len(data),
        lengths=np.zeros(1, np.uint8),
        block_offsets=np.zeros(1, np.uint32),
        segments=np.frombuffer(data + bytes(8), np.uint8),
        segment_bytes=len(data),
    )
    try:
        matrix = decode(encoded)
    except QMoEError as error:
        assert error.code in ("malformed", "padding")
        return
    assert encode(matrix, chosen).segments.tobytes() == encoded.segments.tobytes()


@pytest.mark.parametrize(
    "matrix",
    [np.zeros((2, 2), np.int16), np.zeros(4, np.int8), np.full((2, 2), 2, np.int8)],
)
def test_what_is_not_levels_is_refused(matrix: npt.NDArray[Any]) -> None:
    with pytest.raises(QMoEError) as error:
        encode(matrix, dictionary(0.885, 8, "plane"))
    assert error.value.code == "argument"


@pytest.mark.parametrize("together", [0, -1])
def test_a_segment_has_a_row(together: int) -> None:
    matrix = np.zeros((2, 2), np.int8)
    chosen = dictionary(0.885, 8, "plane")
    with pytest.raises(QMoEError) as error:
        encode(matrix, chosen, rows_per_segment=together)
    assert error.value.code == "argument"
    with pytest.raises(QMoEError) as error:
        dataclasses.replace(encode(matrix, chosen), rows_per_segment=together)
    assert error.value.code == "argument"
