"""Preamble and extent table: one test a requirement of SPEC.md section 2."""

from __future__ import annotations

from typing import Any

import pytest

from qmoe_format import QMoEError
from qmoe_format.container.preamble import Preamble
from tests.container.files import SIGNATURE, assemble, code_at_opening, code_of, index_of, tensor

GOOD: dict[str, Any] = {"index": index_of(tensors=[tensor(name="tt")]), "extents": [b"ab"]}


def code(**changes: Any) -> str | None:
    return code_at_opening(assemble(**{**GOOD, **changes}))


def test_the_file_without_changes_is_good() -> None:
    assert code_of(assemble(**GOOD)) is None


@pytest.mark.parametrize(
    ("requirement", "changes", "expected"),
    [
        ("P-1", {"signature": b"\x8fQMOE\n\x1a\0"}, "signature"),
        ("P-3", {"preamble_crc32": 1}, "checksum"),
        ("P-4", {"major": 1}, "version"),
        ("P-4", {"minor": 0}, "version"),
        ("P-4", {"minor": 1}, "version"),
        ("P-4", {"minor": 3}, "version"),
        ("P-5", {"required_features": 1}, "feature"),
        ("P-5", {"required_features": 1 << 31}, "feature"),
        ("P-5", {"optional_features": 0xFFFFFFFF}, None),
        ("P-6", {"reserved": b"\0\0\0\0\0\0\0\1"}, "padding"),
        ("P-7", {"file_length": 2**53 - 1}, "truncated"),
        ("P-7", {"file_length": 2**64 - 1}, "truncated"),
        ("P-7", {"file_length": 0}, "trailing"),
        ("P-7", {"file_length": 100}, "trailing"),
        ("P-8", {"index_length": 0}, "limit"),
        ("P-8", {"index_length": 1}, "limit"),
        ("P-8", {"index_length": 2**28}, "malformed"),
        ("P-8", {"index_length": 2**28 + 1}, "limit"),
        ("P-8", {"index_length": 2**64 - 1}, "limit"),
        ("P-8", {"extent_count": 2**24}, "malformed"),
        ("P-8", {"extent_count": 2**24 + 1}, "limit"),
        ("P-8", {"extent_count": 0}, "malformed"),
        ("P-8", {"index_offset": 0}, "malformed"),
        ("P-8", {"index_offset": 64}, "malformed"),
        ("P-8", {"index_offset": 127}, "malformed"),
        ("P-8", {"index_offset": 192}, "malformed"),
        ("N-2", {"index_offset": 2**63 - 2**9}, "malformed"),
        ("N-2", {"index_offset": 2**63 - 64}, "limit"),
        ("N-2", {"index_offset": 2**64 - 64}, "limit"),
        ("P-9", {"index_crc32": 1}, "checksum"),
        ("F-2", {"after_json": 1}, "padding"),
        ("F-3", {"tail": bytes(16)}, "malformed"),
        ("F-4", {"record_zero": 1}, "padding"),
        ("F-5", {"lengths": [65]}, "malformed"),
        ("F-5", {"lengths": [0]}, "malformed"),
        ("F-5", {"lengths": [2**52]}, "malformed"),
        ("N-2", {"lengths": [2**63 - 256]}, "malformed"),
        ("N-2", {"lengths": [2**63 - 64]}, "limit"),
        ("N-2", {"lengths": [2**64 - 1]}, "limit"),
    ],
)  # fmt: skip
def test_one_wrong_number(requirement: str, changes: dict[str, Any], expected: str | None) -> None:
    assert code(**changes) == expected, requirement


def test_lengths_whose_sum_wraps_around_to_the_right_one() -> None:
    """[N-2] Four lengths of 2^62 are 2^64 together, which is 0 to careless arithmetic."""
    index = index_of(tensors=[tensor(name=name, extent=i) for i, name in enumerate("abcd")])
    extents = [b"ab", b"", b"", b""]
    lengths = [2**62, 2**62, 2**62, 2**62 + 2]
    assert code_at_opening(assemble(index, extents, lengths=lengths)) == "limit"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"signature": b"PK\3\4\0\0\0\0"}, {"preamble_crc32": 1}, "signature"),
        ({"preamble_crc32": 1}, {"major": 9}, "checksum"),
        ({"major": 9}, {"required_features": 1}, "version"),
        ({"required_features": 1}, {"reserved": b"\1" * 8}, "feature"),
        ({"reserved": b"\1" * 8}, {"file_length": 1 << 40}, "padding"),
        ({"file_length": 1 << 40}, {"extent_count": 2**24 + 1}, "truncated"),
        ({"extent_count": 2**24 + 1}, {"index_crc32": 1}, "limit"),
        ({"index_offset": 192}, {"index_crc32": 1}, "malformed"),
        ({"index_crc32": 1}, {"after_json": 1}, "checksum"),
    ],
)
def test_of_two_defects_the_first_is_reported(
    first: dict[str, Any], second: dict[str, Any], expected: str
) -> None:
    """The order of section 2.1."""
    assert code(**first, **second) == expected


def test_padding_after_an_extent_is_found_by_verification_only() -> None:
    data = assemble(**GOOD, gap=7)
    assert code_at_opening(data) is None
    assert code_of(data) == "padding"


def test_limits_of_the_length() -> None:
    """No such file can be made: the numbers alone."""
    for length, expected in ((2**53 - 1, "malformed"), (2**53, "limit")):
        head = assemble(**GOOD, file_length=length)[:64]
        with pytest.raises(QMoEError) as caught:
            Preamble.parse(head, length)
        assert caught.value.code == expected


@pytest.mark.parametrize("length", range(8, 64))
def test_a_preamble_that_is_cut_off(length: int) -> None:
    """[P-2]"""
    assert code_at_opening(assemble(**GOOD)[:length]) == "truncated"


@pytest.mark.parametrize("length", range(8))
def test_a_beginning_of_the_signature_is_truncated(length: int) -> None:
    assert code_at_opening(SIGNATURE[:length]) == "truncated"
    assert code_at_opening(SIGNATURE[:length] + b"?") == "signature"
