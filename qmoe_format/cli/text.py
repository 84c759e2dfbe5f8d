"""Numbers, sizes and tables for people."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence

_UNITS = {"": 1, **{c: 1000**i for i, c in enumerate("kmgt", 1)}}
_UNITS |= {f"{c}i": 1024**i for i, c in enumerate("kmgt", 1)}


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``300 MB``, ``1.5GiB`` or ``1000``, for argparse."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return size


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def positive_real(text: str) -> float:
    """A number above zero, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def natural(text: str) -> int:
    """A whole number, zero or above, for argparse."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def count(number: float) -> str:
    """``1234567`` as ``1.23 M``: at most three digits that matter."""
    units = ["", " k", " M", " G", " T"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    unit = units[0]
    digits = 0 if number >= 99.5 or not unit else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f}{unit}"


def size(bytes_: float) -> str:
    """``1234567`` as ``1.23 MB``."""
    text = count(bytes_)
    return f"{text}B" if " " in text else f"{text} B"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of aligned columns, the first ``left`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
