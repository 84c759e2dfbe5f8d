"""Dictionaries: stored trees are checked, fitted ones are complete and near the entropy."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qmoe_format.codec import Dictionary, encode, fit_dictionary, standard_dictionary
from qmoe_format.errors import QMoEError

from .strategies import random_levels


def entropy(zero_fraction: float) -> float:
    """Bits per level, signs even."""
    q = 1 - zero_fraction
    return -zero_fraction * math.log2(zero_fraction) - q * math.log2(q) + q


@pytest.mark.parametrize("signs", ["plane", "codeword"])
@pytest.mark.parametrize("width", range(8, 17))
def test_a_fitted_dictionary_survives_storing(width: int, signs: str) -> None:
    fitted = fit_dictionary(0.885, width, signs)
    assert Dictionary.from_tree(width, signs, fitted.tree) == fitted


def test_a_comb() -> None:
    """The dictionary that section 6 draws, with 255 inner nodes: entries 000..., ..., 01, 1."""
    bits = "1" * 255 + "0" * 256
    comb = Dictionary.from_tree(8, "plane", int(bits[::-1], 2).to_bytes(64, "little"))
    assert (comb.max_length, comb.max_nonzeros) == (255, 1)


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
    levels = random_levels(200, 3072, 0.885)
    encoded = encode(levels, standard_dictionary(0.885, width))
    assert encoded.payload_bits_per_weight < within * entropy(encoded.zero_fraction)


@pytest.mark.parametrize("zero_fraction", [0.0, 1e-12, 0.5, 1 - 1e-12, 1.0])
def test_there_is_a_standard_dictionary_for_any_share_of_zeros(zero_fraction: float) -> None:
    assert standard_dictionary(zero_fraction, 8).width == 8


def test_the_grid_of_standard_dictionaries_costs_little() -> None:
    for zero_fraction in (0.62, 0.873, 0.934):
        levels = random_levels(100, 3072, zero_fraction)
        fitted = encode(levels, fit_dictionary(zero_fraction, 12)).segment_bytes
        assert encode(levels, standard_dictionary(zero_fraction, 12)).segment_bytes < 1.003 * fitted


def test_impossible_limits_are_refused() -> None:
    for arguments in (
        {"zero_fraction": 1.0},
        {"zero_fraction": 0.9, "width": 7},
        {"zero_fraction": 0.9, "max_nonzeros": 17},
        {"zero_fraction": 0.9, "width": 16, "max_nonzeros": 1},
    ):
        with pytest.raises(QMoEError) as error:
            fit_dictionary(**arguments)  # type: ignore[arg-type]
        assert error.value.code == "argument"
