"""What it costs to import the package, and to open a file and take one expert out of 2048.

    python -m benchmarks.opening

Writes benchmarks/results/opening.json: milliseconds (medians, file in the page cache) beside
safetensors doing the same with dense experts, and how many bytes the reader looked at, noted where
all its accesses pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qmoe_format
from benchmarks import report
from qmoe_format import Writer
from qmoe_format.codec import encode_matrix
from qmoe_format.container.file_source import FileSource
from qmoe_format.dtypes import Bytes

EXPERTS, ROWS, COLUMNS = 2048, 256, 768


@contextmanager
def noting_accesses() -> Iterator[set[tuple[int, int]]]:
    """The offsets and lengths of what the reader asks for: whole extents, or headers."""
    asked: set[tuple[int, int]] = set()
    view = FileSource.view

    def noting(self: FileSource, offset: int, length: int) -> Bytes:
        asked.add((offset, length))
        return view(self, offset, length)

    with patch.object(FileSource, "view", noting):
        yield asked


def count(asked: set[tuple[int, int]]) -> int:
    """Bytes asked for, once each."""
    return len({byte for first, length in asked for byte in range(first, first + length)})


def write(path: Path) -> None:
    """One stack of 2048 experts, all alike."""
    levels = np.random.default_rng(0).choice([0, 1, -1], (ROWS, COLUMNS), p=[0.885, 0.0575, 0.0575])
    scales = np.full((ROWS, 2), 0x3C00, np.uint16)
    matrix = encode_matrix(levels.astype(np.int8), scales)
    with (
        Writer(path) as writer,
        writer.add_stack("wi", (EXPERTS, ROWS, COLUMNS), "BF16", "int-dict") as experts,
    ):
        for _ in range(EXPERTS):
            experts.append(matrix)


def open_and_take(path: Path) -> None:
    """The encoded form of one expert, its checksum and structure checked."""
    with qmoe_format.open(path) as file:
        file.encoded("wi", 1234)


def open_and_decode(path: Path) -> None:
    """One expert as numbers."""
    with qmoe_format.open(path) as file:
        file.read_expert("wi", 1234)


def safetensors(path: Path) -> None:
    """One dense expert of as many."""
    with safe_open(path, "pt") as file:
        file.get_tensor("wi.1234").clone()


def import_seconds(module: str) -> float:
    """Seconds that ``import module`` takes in a fresh interpreter, by its own clock."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    run = partial(subprocess.check_output, [sys.executable, "-c", code], text=True)
    return float(np.median([float(run()) for _ in range(7)]))


def main() -> None:
    """Run everything."""
    with tempfile.TemporaryDirectory() as folder:
        path, dense = Path(folder) / "stack.qmoe", Path(folder) / "dense.safetensors"
        write(path)
        save_file(
            {f"wi.{e}": torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) for e in range(EXPERTS)},
            dense,
        )
        seconds = report.medians(
            {
                "open and take an expert": partial(open_and_take, path),
                "open and decode an expert": partial(open_and_decode, path),
                "safetensors: open and copy a dense expert": partial(safetensors, dense),
            },
            rounds=50,
        )
        with noting_accesses() as asked, qmoe_format.open(path) as file:
            opening = count(asked)
            file.encoded("wi", 1234)
            figures = {
                "shape": [EXPERTS, ROWS, COLUMNS],
                "bytes_of_file": file.file_length,
                "bytes_seen_by_open": opening,
                "bytes_seen_for_expert_and_dictionary": count(asked) - opening,
                "bytes_of_expert": file.tensors["wi"].stored_bytes // EXPERTS,
                "bytes_of_dictionary": file.dictionary_bytes,
                "milliseconds": {
                    name: {key: 1000 * value for key, value in taken.items()}
                    for name, taken in seconds.items()
                },
                "import_milliseconds": {
                    module: 1000 * import_seconds(module) for module in ("qmoe_format", "numpy")
                },
            }
    print(json.dumps(figures, indent=1))
    report.save("opening", figures)


if __name__ == "__main__":
    main()
