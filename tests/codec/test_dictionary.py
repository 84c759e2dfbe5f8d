"""Dictionaries: stored trees are checked, fitted ones are complete and near the entropy."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from qmoe_format.codec import Dictionary, encode, fit_dictionary, standard_dictionary
from qmoe_format.codec.kernels.tables import tables
from qmoe_format.errors import QMoEError

from .strategies import random_trits


def entropy(zero_fraction: float) -> float:
    """Bits per trit, signs even."""
    q = 1 - zero_fraction
    return -zero_fraction * math.log2(zero_fraction) - q * math.log2(q) + q


@pytest.mark.parametrize("signs", ["plane", "codeword"])
@pytest.mark.parametrize("width", range(8, 17))
def test_a_fitted_dictionary_survives_storing(width: int, signs: str) -> None:
    fitted = fit_dictionary(0.885, width, signs)
    assert Dictionary.from_tree(width, signs, fitted.tree) == fitted
    used = tables(fitted).used
    assert used == 1 << width if signs == "plane" else used <= 1 << width


def test_the_tree_of_the_specification() -> None:
    """Section 6 draws a dictionary of width 2; here it is with the last entry made 253 times as
    deep, since 8 bits are the least: entries 000..., ..., 01, 1."""
    bits = "1" * 255 + "0" * 256  # preorder of a comb: always split the all-zero leaf
    tree = int(bits[::-1], 2).to_bytes(64, "little")
    comb = Dictionary.from_tree(8, "plane", tree)
    assert (comb.max_length, comb.max_nonzeros) == (255, 1)
    look_up = tables(comb)
    assert look_up.steps[0] & 0xFFFF == 255
    assert look_up.nonzeros[0] == 0
    # Codeword c > 0 is 256 - c weights long, and the last of them is not zero.
    assert [int(step) & 0xFFFF for step in look_up.steps[1:]] == list(range(255, 0, -1))
    assert [int(p) & 0xFFFF for p in look_up.positions[1:, 0]] == list(range(254, -1, -1))


@given(st.binary(max_size=80), st.sampled_from([8, 9, 16]), st.sampled_from(["plane", "codeword"]))
def test_any_bytes_are_a_dictionary_or_a_coded_error(tree: bytes, width: int, signs: str) -> None:
    try:
        Dictionary.from_tree(width, signs, tree)
    except QMoEError as error:
        assert error.code in ("malformed", "limit", "padding")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tree: tree[:-1], "malformed"),
        (lambda tree: tree + b"\0", "malformed"),
        (lambda tree: tree[:-1] + bytes([tree[-1] | 0x80]), "padding"),
        (lambda tree: b"\0" + tree[1:], "malformed"),
        (lambda tree: b"", "malformed"),
    ],
)
def test_damaged_trees(change: object, code: str) -> None:
    tree = fit_dictionary(0.885, 8).tree
    with pytest.raises(QMoEError) as error:
        Dictionary.from_tree(8, "plane", change(tree))  # type: ignore[operator]
    assert error.value.code == code


@pytest.mark.parametrize(("width", "within"), [(8, 1.045), (12, 1.033), (16, 1.028)])
def test_rate_is_near_the_entropy(width: int, within: float) -> None:
    trits = random_trits(200, 3072, 0.885)
    encoded = encode(trits, standard_dictionary(0.885, width))
    assert encoded.payload_bits_per_weight < within * entropy(encoded.zero_fraction)


@pytest.mark.parametrize("zero_fraction", [0.0, 1e-12, 0.5, 1 - 1e-12, 1.0])
def test_there_is_a_standard_dictionary_for_any_share_of_zeros(zero_fraction: float) -> None:
    assert standard_dictionary(zero_fraction, 8).width == 8


def test_the_grid_of_standard_dictionaries_costs_little() -> None:
    for zero_fraction in (0.62, 0.873, 0.934):
        trits = random_trits(100, 3072, zero_fraction)
        fitted = encode(trits, fit_dictionary(zero_fraction, 12)).segment_bytes
        assert encode(trits, standard_dictionary(zero_fraction, 12)).segment_bytes < 1.003 * fitted


def test_impossible_limits_are_refused() -> None:
    for arguments in (
        {"zero_fraction": 1.0},
        {"zero_fraction": 0.9, "width": 7},
        {"zero_fraction": 0.9, "max_nonzeros": 17},
        {"zero_fraction": 0.9, "width": 16, "max_length": 12},
    ):
        with pytest.raises(QMoEError) as error:
            fit_dictionary(**arguments)  # type: ignore[arg-type]
        assert error.value.code == "argument"


def test_tables_agree_with_the_tree_read_weight_by_weight() -> None:
    """Every codeword, decoded by walking its path, against the look-up tables."""
    chosen = fit_dictionary(0.8, 9, "codeword")
    bits = np.unpackbits(np.frombuffer(chosen.tree, np.uint8), bitorder="little")
    place = 0
    entries: list[str] = []

    def walk(path: str) -> None:
        nonlocal place
        inner = bits[place]
        place += 1
        if inner:
            walk(path + "0")
            walk(path + "1")
        else:
            entries.append(path)

    walk("")
    look_up = tables(chosen)
    codeword = 0
    for entry in entries:
        nonzero = [c for c, weight in enumerate(entry) if weight == "1"]
        for signs in range(1 << len(nonzero)):
            assert int(look_up.steps[codeword]) & 0xFFFF == len(entry)
            assert look_up.nonzeros[codeword] == len(nonzero)
            lanes = look_up.positions[codeword : codeword + 1].view(np.uint16)[0]
            expected = [c | (signs >> k & 1) << 15 for k, c in enumerate(nonzero)]
            assert lanes[: len(nonzero)].tolist() == expected
            codeword += 1
    assert codeword == look_up.used
