"""The machine code of a kernel, as nvdisasm lists it: what it counts, and its loops.

Needs nvdisasm, CUDA's or that of the package ``nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata


def disassembled(code: bytes) -> Listing:
    """The machine code of a kernel."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            files = metadata.files("nvidia-cuda-nvdisasm") or ()
        except metadata.PackageNotFoundError:
            sys.exit("there is no nvdisasm: run pip install nvidia-cuda-nvdisasm")
        found = next(str(file.locate()) for file in files if file.name == "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [found, "-c", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Listing(done.stdout)


class Listing:
    """Instructions, numbered from 0 on; a part of them is a range.

    Attributes:
        loops: the smallest first.
    """

    def __init__(self, text: str) -> None:
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                instructions.append(found[1].strip())
        self._instructions = instructions
        self._targets = {
            place: labels[branch[1]]
            for place, text in enumerate(instructions)
            if (branch := re.search(r"\bBRA (?:.*, )?`\((\.L_x_\d+)\)", text))
        }
        backward = (range(to, at + 1) for at, to in self._targets.items() if to < at)
        self.loops = sorted(backward, key=len)

    def places(self, opcode: str, part: range) -> list[int]:
        """Where the instructions are that begin like this, a regular expression."""
        pattern = re.compile(rf"(?:@!?U?P\d+ )?(?:{opcode})\b")
        return [at for at in part if pattern.match(self._instructions[at])]

    def count(self, opcode: str, part: range) -> int:
        """How many instructions begin like this."""
        return len(self.places(opcode, part))

    def loop(self, opcode: str, times: int = 1, inner: range = range(0)) -> range:
        """The smallest loop around ``inner`` with at least so many instructions like this."""
        return next(
            loop
            for loop in self.loops
            if self.count(opcode, loop) >= times
            and (not inner or (loop.start < inner.start and loop.stop > inner.stop))
        )

    def longest(self, begin: int, end: int) -> int:
        """Most instructions from one to the other by branches forward."""
        ways = {end: 0}
        for place in reversed(range(begin, end)):
            text = self._instructions[place]
            after = [self._targets[place]] if place in self._targets else []
            if not re.match(r"(BRA(?!\.DIV)|EXIT|RET)\b", text) or re.search(r"BRA.* U?P\d,", text):
                after.append(place + 1)
            lengths = [ways[each] for each in after if each > place and each in ways]
            if lengths:
                ways[place] = 1 + max(lengths)
        return ways[begin]
