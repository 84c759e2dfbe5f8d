"""Write the conformance vectors and their manifest.

    python -m tools.conformance_vectors [DIR]

writes ``DIR/manifest.json`` and ``DIR/vectors/`` (by default those of the package), the same bytes
each time. What a reader has to find in an accepted file is computed by ``file_builder`` from what
was put in, not by a reader.
"""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from qmoe_format.conformance.runner import HERE
from tools.conformance_vectors import file_vectors, tensor_vectors
from tools.conformance_vectors.file_builder import canonical, sha256
from tools.conformance_vectors.table import VECTORS, Vector

SPEC_VERSION = "0.1"


@cache
def vectors() -> list[Vector]:
    file_vectors.section_2()
    file_vectors.section_3()
    tensor_vectors.section_4_and_5()
    tensor_vectors.section_6()
    tensor_vectors.section_7()
    file_vectors.section_8()
    file_vectors.section_12()
    return VECTORS


def write(folder: Path) -> None:
    shutil.rmtree(folder / "vectors", ignore_errors=True)
    entries = []
    for vector in vectors():
        kind = vector.outcome.partition(":")[0]
        files = {f"vectors/{kind}/{name}": data for name, data in vector.files.items()}
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        file, *others = files
        entry: dict[str, Any] = {
            "description": vector.description,
            "file": file,
            "id": vector.id,
            "outcome": vector.outcome,
            "requirements": vector.requirements,
            "sha256": sha256(files[file]),
            "spec": SPEC_VERSION,
        }
        if others:
            entry["others"] = {name: sha256(files[name]) for name in others}
        if vector.stage:
            entry["stage"] = vector.stage
        else:
            entry["contents"] = vector.contents
        entries.append(canonical(entry))
    # One vector a line, so that a change of one is a change of one line.
    (folder / "manifest.json").write_bytes(b"[\n" + b",\n".join(entries) + b"\n]\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
