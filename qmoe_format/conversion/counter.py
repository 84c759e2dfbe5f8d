"""How far a conversion is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the weights done and to do; ``stage`` says where in the model that is.

    A calibrated conversion may count twice: first while it plans, then again from zero. Where a
    block is done again, it goes back to where that began.
    """

    def __call__(self, done: int, total: int, stage: str = "", /) -> None: ...


class Counter:
    """Adds up the weights that are ``done``; ``stage`` says where in the model that is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self.done = 0
        self.stage = ""

    def enter(self, stage: str) -> None:
        """Where in the model the work is now."""
        self.stage = stage
        self.add(0)

    def back_to(self, done: int) -> None:
        """What was added since then has to be done again."""
        self.done = done

    def add(self, weights: int) -> None:
        """This many more are done."""
        self.done += weights
        if self._progress:
            self._progress(self.done, self._total, *([self.stage] if self.stage else []))
