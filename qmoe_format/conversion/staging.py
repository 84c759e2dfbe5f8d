"""Quantized stacks on their way into the file: each lies in a ``.qmoe`` file of its own.

A block's stacks are made together, a few experts of each at a time, but the final file holds one
stack after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qmoe_format import container
from qmoe_format.checkpoints import ExpertStack
from qmoe_format.container.writer import StackWriter, Writer
from qmoe_format.conversion.encoding import begin_stack
from qmoe_format.conversion.methods import Methods
from qmoe_format.progress import Counter


class Staging:
    """The staged files of ``stacks``, in a folder."""

    def __init__(self, folder: Path, stacks: Sequence[ExpertStack], methods: Methods) -> None:
        self._methods = methods
        self._paths = {
            stack.name: folder / f"stack-{number:04}.qmoe" for number, stack in enumerate(stacks)
        }

    @contextmanager
    def writing(self, stacks: Mapping[str, ExpertStack]) -> Iterator[dict[str, StackWriter]]:
        """Yield a writer for each stack, by the same key; complete files appear at the end."""
        with ExitStack() as opened:
            yield {
                key: self._begin(opened.enter_context(Writer(self._paths[stack.name])), stack)
                for key, stack in stacks.items()
            }

    def copy(self, stack: ExpertStack, writer: Writer, counter: Counter) -> None:
        """Copy a stack into another file."""
        path = self._paths[stack.name]
        with container.open(path, memory_map=False) as file, self._begin(writer, stack) as experts:
            for expert in range(stack.experts):
                experts.append(file.encoded(stack.name, expert))
                counter.add(stack.rows * stack.columns)

    def _begin(self, writer: Writer, stack: ExpertStack) -> StackWriter:
        return begin_stack(writer, stack, self._methods.of(stack.name).recipe.encoding)
