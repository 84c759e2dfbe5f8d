"""Numbers, sizes and tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: float) -> str:
    """Format ``1234567`` as ``1.23 M``, with up to three significant digits."""
    units = ["", " k", " M", " G", " T"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    unit = units[0]
    digits = 0 if number >= 99.5 or not unit else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f}{unit}"


def size(byte_count: float) -> str:
    """Format ``1234567`` as ``1.23 MB``."""
    text = count(byte_count)
    return f"{text}B" if " " in text else f"{text} B"


def duration(seconds: float) -> str:
    """Format 75 seconds as ``1:15``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table, with the first ``left`` columns left-aligned and the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
