"""Write the conformance vectors and their manifest.

    python -m tools.conformance_vectors [DIR]

writes ``DIR/manifest.json`` and ``DIR/vectors/`` (by default those of the package), the same bytes
each time. Each module ``*_vectors.py`` has the vectors of some sections of SPEC.md. What a reader
has to find in an accepted file is computed from what was put in, not by a reader. Each rejected
file has one defect and is otherwise right, checksums included; where one has two (those named
``order-...``, a few of [N-2], [S-1] and [S-2]), a rule says which comes first.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmoe_format.conformance.runner import HERE
from tools.conformance_vectors import (
    file_vectors,
    index_vectors,
    int_dict_vectors,
    int_group_vectors,
    shard_vectors,
    tensor_vectors,
)
from tools.conformance_vectors.file_builder import canonical, sha256
from tools.conformance_vectors.vector import Vector

SPEC_VERSION = "0.2"
MODULES = (
    file_vectors,
    index_vectors,
    tensor_vectors,
    int_dict_vectors,
    int_group_vectors,
    shard_vectors,
)


def vectors() -> Iterator[Vector]:
    """Those of all functions ``section_...``, in the order of their definition."""
    for module in MODULES:
        for name, section in vars(module).items():
            if name.startswith("section_"):
                yield from section()


def manifest_entry(vector: Vector, files: dict[str, bytes]) -> dict[str, Any]:
    """A line of the manifest; ``files`` by their paths in the corpus."""
    file, *others = files
    entry: dict[str, Any] = {
        "description": vector.description,
        "file": file,
        "id": vector.id,
        "outcome": vector.outcome,
        "requirements": vector.requirements.split(),
        "sha256": sha256(files[file]),
        "spec": SPEC_VERSION,
    }
    if others:
        entry["others"] = {name: sha256(files[name]) for name in others}
    if vector.stage:
        return entry | {"stage": vector.stage}
    return entry | {"contents": vector.contents}


def write(folder: Path) -> None:
    """Replace the vectors and the manifest in ``folder``."""
    shutil.rmtree(folder / "vectors", ignore_errors=True)
    lines: dict[str, bytes] = {}
    for vector in vectors():
        assert vector.id not in lines, vector.id
        kind = vector.outcome.partition(":")[0]
        files = {f"vectors/{kind}/{name}": data for name, data in vector.files.items()}
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        lines[vector.id] = canonical(manifest_entry(vector, files))
    # One vector a line, so that a change of one is a change of one line.
    (folder / "manifest.json").write_bytes(b"[\n" + b",\n".join(lines.values()) + b"\n]\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
