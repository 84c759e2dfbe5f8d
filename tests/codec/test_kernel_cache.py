"""Compiled kernels are used again, until a source that became part of them changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import qmoe_format

ENCODE = """
import numpy as np
from qmoe_format.codec import encode, standard_dictionary
from qmoe_format.codec.kernels.encode import encode_segments
encoded = encode(np.eye(3, dtype=np.int8), standard_dictionary(0.5, 8))
print(encoded.segments.tobytes().hex(), sum(encode_segments.stats.cache_hits.values()))
"""


def encoded_by(folder: Path) -> list[str]:
    """Bytes of segments, and how many kernels came from the cache, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if "NUMBA" not in name}
    command = [sys.executable, "-c", ENCODE]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def test_a_change_of_an_inlined_source_is_noticed(tmp_path: Path) -> None:
    package, copy = Path(qmoe_format.__file__).parent, tmp_path / "qmoe_format"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package / "codec", copy / "codec", ignore=ignored)
    for file in package.glob("*.py"):
        shutil.copy(file, copy)
    segments, hits = encoded_by(tmp_path)
    assert hits == "0"
    assert encoded_by(tmp_path) == [segments, "1"]
    inlined = copy / "codec" / "kernels" / "unaligned.py"
    source = inlined.read_text()
    changed = source.replace("builder.store(value,", "builder.store(builder.not_(value),")
    assert changed != source
    inlined.write_text(changed)
    other, hits = encoded_by(tmp_path)
    assert other != segments
    assert hits == "0"
