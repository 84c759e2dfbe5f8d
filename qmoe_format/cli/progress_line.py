"""A line that shows the progress of a command, on a terminal only."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Self, TextIO

from qmoe_format.cli.formatting import count, duration, size

INTERVAL_S = 0.1


class ProgressLine:
    """A ``qmoe_format.progress.Progress`` that shows percentage, time left and rate on stderr.

    Use it as a context manager: the line disappears at the end. The rate is measured from when 0
    was done, and anew when less is done than before. Where stderr is not a terminal, nothing is
    written.
    """

    def __init__(self, label: str, unit: str, stream: TextIO | None = None) -> None:
        """
        Args:
            label: what is being done.
            unit: ``B`` for bytes, or the name of what is counted.
            stream: where to write; by default stderr.
        """
        self._stream = stream or sys.stderr
        self._label = label
        self._unit = unit
        self._started = self._shown = time.monotonic()
        self._done = self._done_at_start = 0
        self._visible = False
        self._enabled = self._stream.isatty()

    def __call__(self, done: int, total: int, stage: str = "", /) -> None:
        now = time.monotonic()
        if done < self._done or not done:
            self._started, self._done_at_start = now, done
        self._done = done
        if not self._enabled or now - self._shown < INTERVAL_S:
            return
        self._shown = now
        elapsed = now - self._started
        rate = (done - self._done_at_start) / elapsed if elapsed else 0
        left = duration((total - done) / rate) if rate else "-:--"
        share = done / total if total else 1
        parts = [
            f"{self._label} {share:4.0%}",
            f"{left} left",
            stage,
            f"{self._amount(rate)}/s",
            f"{self._amount(done)} of {self._amount(total)}",
        ]
        # A longer line would wrap, and its first part could not be overwritten.
        line = "  ".join(part for part in parts if part)[: self._width() - 1]
        self._stream.write(f"\r{line}\x1b[K")
        self._stream.flush()
        self._visible = True

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            return shutil.get_terminal_size().columns

    def _amount(self, number: float) -> str:
        return size(number) if self._unit == "B" else f"{count(number)} {self._unit}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
