"""Dictionaries: complete, prefix-free sets of short strings of bits (SPEC.md section 6).

A dictionary is a binary tree over "the next bit is 0 / is 1". Pure Python: reading a file's
dictionaries does not load Numba.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

from qmoe_format.codec.profiles import FAST
from qmoe_format.errors import QMoEError

MIN_WIDTH, MAX_WIDTH = 8, 16
MAX_LENGTH = 255
MAX_ONES = 16


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A dictionary as stored, with the two numbers that size a decoder's buffers.

    Attributes:
        width: bits in a codeword, 8 to 16.
        tree: preorder bits, 1 for an inner node.
        max_length: bits of the longest entry.
        max_ones: the most ones in an entry.
    """

    width: int
    tree: bytes
    max_length: int
    max_ones: int

    @classmethod
    def from_tree(cls, width: int, tree: bytes) -> Dictionary:
        """Check a stored tree.

        Raises:
            QMoEError: ``limit``, ``malformed`` or ``padding``.
        """
        if not MIN_WIDTH <= width <= MAX_WIDTH:
            raise QMoEError("limit", f"codeword width is {width}, not 8 to 16")  # [D-1]
        if len(tree) > 2 << (MAX_WIDTH - 3):
            raise QMoEError("malformed", f"a tree of {len(tree)} bytes has too many entries")
        codewords, max_length, max_ones = _measure(tree)
        if codewords != 1 << width:
            raise QMoEError(  # [D-4]
                "malformed", f"dictionary has {codewords} codewords, its width makes {1 << width}"
            )
        return cls(width, tree, max_length, max_ones)


def _measure(tree: bytes) -> tuple[int, int, int]:
    """Count codewords, the bits of the longest entry, and the most ones in an entry."""
    bits = int.from_bytes(tree, "little")
    text = f"{bits:0{8 * len(tree)}b}"[::-1]
    codewords = max_length = max_ones = used = 0
    pending = [(0, 0)]  # (length, ones) of the nodes still to come, the next one last
    for bit in text:
        used += 1
        length, ones = pending.pop()
        if bit == "1":
            if length == MAX_LENGTH:
                raise QMoEError("limit", "a dictionary entry has more than 255 bits")  # [D-3]
            pending.append((length + 1, ones + 1))
            pending.append((length + 1, ones))
            continue
        if ones > MAX_ONES:
            raise QMoEError("limit", "a dictionary entry has more than 16 ones")  # [D-3]
        codewords += 1
        max_length = max(max_length, length)
        max_ones = max(max_ones, ones)
        if not pending:
            break
    if pending:
        raise QMoEError("malformed", "the dictionary's tree is cut off")  # [D-2]
    if max_length == 0:
        raise QMoEError("malformed", "the dictionary's root is a leaf")  # [D-3]
    rest = text[used:]
    if len(rest) >= 8:
        raise QMoEError("malformed", "bytes follow the dictionary's tree")  # [D-2]
    if "1" in rest:
        raise QMoEError("padding", "the bits after the dictionary's tree are not zero")  # [D-2]
    return codewords, max_length, max_ones


def fit_dictionary(
    zero_fraction: float, width: int = FAST.width, max_ones: int | None = None
) -> Dictionary:
    """Fit the best dictionary for independent bits: Tunstall's construction.

    It splits the most probable leaf until the codewords are used up.

    Args:
        zero_fraction: share of the bits that are 0, between 0 and 1.
        width: bits in a codeword, 8 to 16.
        max_ones: per entry, 1 to 16; by default the least of 4, 8 and 16 that costs at most 0.1 %
            of the mean entry, since decoders move four positions at a time. With 3, GPU kernels
            need one word per entry instead of two.

    Raises:
        QMoEError: ``argument``.

    Example:
        >>> from qmoe_format.codec import fit_dictionary
        >>> dictionary = fit_dictionary(0.9, width=8)
        >>> dictionary.max_length, dictionary.max_ones
        (42, 2)
    """
    if not 0.0 < zero_fraction < 1.0:
        raise QMoEError("argument", f"zero fraction is {zero_fraction}, not between 0 and 1")
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise QMoEError(
            "argument",
            f"dictionaries cannot have width {width}",
            f"use a width of {MIN_WIDTH} to {MAX_WIDTH}",
        )
    if not 1 <= (max_ones or 1) <= MAX_ONES:
        raise QMoEError("argument", f"max_ones is {max_ones}, not 1 to {MAX_ONES}")
    mean, tree = _grow(zero_fraction, width, max_ones or MAX_ONES)
    best = Dictionary.from_tree(width, tree)
    for fewer in () if max_ones else (4, 8):
        if fewer < best.max_ones:
            fewer_mean, tree = _grow(zero_fraction, width, fewer)
            if fewer_mean >= 0.999 * mean:
                return Dictionary.from_tree(width, tree)
    return best


@lru_cache(maxsize=256)
def _on_grid(step: int, width: int) -> Dictionary:
    # Found by trying: from here down, these widths take the least space.
    most = 8 if step < -7 else 12 if step < -3 else MAX_WIDTH
    return fit_dictionary(1.0 / (1.0 + math.exp(-step / 8)), min(width, most))


def standard_dictionary(zero_fraction: float, width: int = FAST.width) -> Dictionary:
    """Fit a dictionary for the nearest point of a grid, so that experts share dictionaries.

    The grid has steps of 1/8 in ln(p / (1 - p)); being off by half a step costs less than 0.05 %
    of the bits. ``zero_fraction`` may be 0 or 1 (the grid ends at 0.018 and 0.9991).

    Args:
        zero_fraction: share of the bits that are 0.
        width: the most bits in a codeword. Where ones prevail there are only 12 or 8: an entry may
            have 16 ones, and with more bits most entries would need more.

    Example:
        >>> from qmoe_format.codec import standard_dictionary
        >>> standard_dictionary(0.885) is standard_dictionary(0.884)
        True
    """
    return _on_grid(round(on_grid(zero_fraction)), width)


def on_grid(zero_fraction: float) -> float:
    """The place of a share of zeros on that grid, in steps, not rounded."""
    clamped = min(max(zero_fraction, 1e-9), 1 - 1e-9)
    return min(max(8 * math.log(clamped / (1 - clamped)), -32.0), 56.0)


def _grow(zero_fraction: float, width: int, max_ones: int) -> tuple[float, bytes]:
    """Grow a tree; return its mean entry length in bits, and its preorder bits."""
    # Integer costs make ties exact; among equals the older node is split first.
    zero_cost = round(-math.log2(zero_fraction) * (1 << 24))
    one_cost = round(-math.log2(1 - zero_fraction) * (1 << 24))
    room = 1 << width
    codewords = 1
    mean = 0.0
    children: dict[int, int] = {}  # inner node -> its first child; the second is the next number
    nodes = 1
    leaves = [(0, 0, 0, 0)]  # (cost in bits * 2^24, node, length, ones)
    while leaves and codewords < room:
        cost, node, length, ones = heapq.heappop(leaves)
        if length >= MAX_LENGTH or ones >= max_ones:
            continue
        children[node] = nodes
        heapq.heappush(leaves, (cost + zero_cost, nodes, length + 1, ones))
        heapq.heappush(leaves, (cost + one_cost, nodes + 1, length + 1, ones + 1))
        nodes += 2
        codewords += 1
        mean += 2.0 ** -(cost / (1 << 24))
    if codewords != room:
        raise QMoEError(
            "argument",
            f"entries of at most {max_ones} ones make {codewords} codewords, not {room}",
            "allow more ones",
        )
    return mean, _preorder(children)


def _preorder(children: dict[int, int]) -> bytes:
    text = []
    pending = [0]
    while pending:
        node = pending.pop()
        first = children.get(node)
        text.append("0" if first is None else "1")
        if first is not None:
            pending += (first + 1, first)
    bits = int("".join(reversed(text)), 2)
    return bits.to_bytes((len(text) + 7) // 8, "little")
