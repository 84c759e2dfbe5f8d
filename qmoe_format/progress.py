"""How far a long operation has come, for whoever wants to be told."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback of ``verify``, ``unpack``, ``convert`` and ``evaluate``.

    A calibrated conversion counts twice, first while it surveys the model, then again from zero;
    where a block is done again, it goes back to where that block began.
    """

    def __call__(self, done: int, total: int, stage: str = "", /) -> None:
        """
        Args:
            done: units of work done so far: bytes, weights or tokens.
            total: units of work in all.
            stage: which part of the work this is, where there are several.
        """


class Counter:
    """Adds up the units of work that are ``done`` and reports them to a callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self.done = 0
        self.stage = ""

    def enter(self, stage: str) -> None:
        """Name the part of the work that begins now."""
        self.stage = stage
        self.add(0)

    def back_to(self, done: int) -> None:
        """Take back what was added since ``done``: it has to be done again."""
        self.done = done

    def add(self, units: int) -> None:
        """Count ``units`` more as done."""
        self.done += units
        if self._progress:
            self._progress(self.done, self._total, *([self.stage] if self.stage else []))
