"""Dictionaries: stored trees are checked, fitted ones are complete and near the entropy."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from qmoe_format.codec import Dictionary, encode, fit_dictionary, standard_dictionary
from qmoe_format.errors import QMoEError

from .strategies import random_levels


def entropy(zero_fraction: float) -> float:
    """Bits per level, signs even."""
    q = 1 - zero_fraction
    return -zero_fraction * math.log2(zero_fraction) - q * math.log2(q) + q


@pytest.mark.parametrize("width", range(8, 17))
def test_a_fitted_dictionary_survives_storing(width: int) -> None:
    fitted = fit_dictionary(0.885, width)
    assert Dictionary.from_tree(width, fitted.tree) == fitted


def test_a_comb() -> None:
    """The dictionary that section 6 draws, with 255 inner nodes: entries 000..., ..., 01, 1."""
    bits = "1" * 255 + "0" * 256
    comb = Dictionary.from_tree(8, int(bits[::-1], 2).to_bytes(64, "little"))
    assert (comb.max_length, comb.max_ones) == (255, 1)


@given(st.binary(max_size=80), st.sampled_from([8, 9, 16]))
def test_any_bytes_are_a_dictionary_or_a_coded_error(tree: bytes, width: int) -> None:
    try:
        Dictionary.from_tree(width, tree)
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
        Dictionary.from_tree(8, change(tree))  # type: ignore[operator]
    assert error.value.code == code


@pytest.mark.parametrize(("width", "within"), [(8, 1.045), (12, 1.033), (16, 1.028)])
def test_rate_is_near_the_entropy(width: int, within: float) -> None:
    levels = random_levels(200, 3072, 0.885)
    encoded = encode(levels, dictionary=standard_dictionary(0.885, width))
    assert encoded.payload_bits_per_weight < within * entropy(encoded.zero_fraction)


@pytest.mark.parametrize(("width", "within"), [(12, 1.02), (16, 1.015)])
@pytest.mark.parametrize("step", [1.7, 1.2, 0.9])
def test_rate_of_levels_is_near_the_entropy(width: int, within: float, step: float) -> None:
    """Of normal weights, rounded to multiples of ``step`` standard deviations."""
    weights = np.random.default_rng(0).standard_normal((200, 3072))
    levels = np.rint(weights / step).astype(np.int8)
    _, counts = np.unique(levels, return_counts=True)
    shares = counts / levels.size
    encoded = encode(levels, width=width)
    limit = -float((shares * np.log2(shares)).sum())
    assert limit < encoded.payload_bits_per_weight < within * limit


@pytest.mark.parametrize(("zero_fraction", "width"), [(0.25, 8), (0.3, 12), (0.5, 14)])
def test_where_ones_prevail_codewords_are_narrow(zero_fraction: float, width: int) -> None:
    """They take less space than 14 bits would."""
    assert standard_dictionary(zero_fraction, 14).width == width
    levels = random_levels(50, 3072, zero_fraction)
    wide = encode(levels, dictionary=fit_dictionary(zero_fraction, 14)).mask.segment_bytes
    assert encode(levels, width=14).mask.segment_bytes <= wide


@pytest.mark.parametrize("zero_fraction", [0.0, 1e-12, 0.5, 1 - 1e-12, 1.0])
def test_there_is_a_standard_dictionary_for_any_share_of_zeros(zero_fraction: float) -> None:
    assert standard_dictionary(zero_fraction, 8).width == 8


def test_the_grid_of_standard_dictionaries_costs_little() -> None:
    for zero_fraction in (0.62, 0.873, 0.934):
        levels = random_levels(100, 3072, zero_fraction)
        fitted = encode(levels, dictionary=fit_dictionary(zero_fraction, 12))
        assert encode(levels).mask.segment_bytes < 1.003 * fitted.mask.segment_bytes


def test_impossible_limits_are_refused() -> None:
    for arguments in (
        {"zero_fraction": 1.0},
        {"zero_fraction": 0.9, "width": 7},
        {"zero_fraction": 0.9, "max_ones": 17},
        {"zero_fraction": 0.9, "width": 16, "max_ones": 1},
    ):
        with pytest.raises(QMoEError) as error:
            fit_dictionary(**arguments)  # type: ignore[arg-type]
        assert error.value.code == "argument"
