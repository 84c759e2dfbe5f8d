"""Quantized stacks on their way into the file: each lies in a ``.qmoe`` file of its own.

A block's stacks are made together, a few experts of each at a time, but the final file holds one
stack after the other. Of several ranks, each stages the experts that it has quantized.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from heapq import merge
from pathlib import Path
from typing import TypeAlias

from qmoe_format import container
from qmoe_format.calibration.ranks import ALONE, Ranks
from qmoe_format.checkpoints import ExpertStack
from qmoe_format.container.writer import StackWriter, Writer
from qmoe_format.conversion.encoding import begin_stack
from qmoe_format.conversion.methods import Methods
from qmoe_format.progress import Counter

Parts: TypeAlias = dict[str, list[int]]
"""The experts, in order, in each of the files that a stack is staged in, by the end of its name."""


class Staging:
    """The staged files of ``stacks``, in a folder."""

    def __init__(
        self,
        folder: Path,
        stacks: Sequence[ExpertStack],
        methods: Methods,
        ranks: Ranks = ALONE,
    ) -> None:
        self._folder = folder
        self._methods = methods
        self._names = {stack.name: f"stack-{number:04}" for number, stack in enumerate(stacks)}
        # A rank on a machine that was lost may still be at work when others have taken over: the
        # names of its files are not theirs.
        run = ranks.share(lambda: secrets.token_hex(4))
        self._end = f"-{run}-{ranks.rank:04}" if ranks.count > 1 else ""

    @contextmanager
    def writing(
        self, stacks: Mapping[str, ExpertStack], experts: Sequence[int]
    ) -> Iterator[dict[str, StackWriter]]:
        """Yield a writer for each stack, by the same key; complete files appear at the end.

        Args:
            experts: the numbers of those that will be written.
        """
        with ExitStack() as opened:
            writers = {}
            for key, stack in stacks.items():
                writer = opened.enter_context(Writer(self._path(stack, self._end)))
                writers[key] = self._begin(writer, replace(stack, experts=len(experts)))
            yield writers

    def parts(self, experts: Sequence[int]) -> Parts:
        """What this rank has staged of a block."""
        return {self._end: list(experts)}

    def copy(self, stack: ExpertStack, parts: Parts, writer: Writer, counter: Counter) -> None:
        """Copy a stack into another file."""
        with ExitStack() as opened:
            files = {
                end: opened.enter_context(container.open(self._path(stack, end), memory_map=False))
                for end in parts
            }
            places = (
                [(e, place, end) for place, e in enumerate(own)] for end, own in parts.items()
            )
            experts = opened.enter_context(self._begin(writer, stack))
            for _, place, end in merge(*places):
                experts.append(files[end].encoded(stack.name, place))
                counter.add(stack.rows * stack.columns)

    def clean(self, staged: Mapping[str, Parts]) -> None:
        """Delete files that are not of the ``staged`` stacks: other ranks began them."""
        paths = {self._folder / f"{self._names[n]}{e}.qmoe" for n in staged for e in staged[n]}
        for path in self._folder.glob("stack-*.qmoe"):
            if path not in paths:
                path.unlink()

    def _path(self, stack: ExpertStack, end: str) -> Path:
        return self._folder / f"{self._names[stack.name]}{end}.qmoe"

    def _begin(self, writer: Writer, stack: ExpertStack) -> StackWriter:
        return begin_stack(writer, stack, self._methods.of(stack.name).recipe.encoding)
