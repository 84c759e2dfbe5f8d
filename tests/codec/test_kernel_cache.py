"""Compiled kernels are used again, until a source that became part of them changes.

They are compiled, too, where they cannot be kept.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import qmoe_format
from qmoe_format.codec import encode

ENCODE = """
import numpy as np
from qmoe_format.codec import encode
from qmoe_format.codec.kernels.encode import encode_masks
encoded = encode(np.eye(3, dtype=np.int8), width=8)
print(encoded.mask.segments.tobytes().hex(), sum(encode_masks.stats.cache_hits.values()))
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """The folder of the kernels in a copy of the package, which has no caches."""
    package, copy = Path(qmoe_format.__file__).parent, tmp_path / "qmoe_format"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package / "codec", copy / "codec", ignore=ignored)
    for file in package.glob("*.py"):
        shutil.copy(file, copy)
    return copy / "codec" / "kernels"


def encoded_by(folder: Path, prepare: Callable[[], None] = lambda: None, **more: str) -> list[str]:
    """Bytes of segments, and how many kernels came from the cache, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if "NUMBA" not in name} | more
    result = subprocess.run(
        [sys.executable, "-c", ENCODE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=prepare,
    )
    return result.stdout.split()


def test_a_change_of_an_inlined_source_is_noticed(tmp_path: Path, kernels: Path) -> None:
    segments, hits = encoded_by(tmp_path)
    assert hits == "0"
    assert encoded_by(tmp_path) == [segments, "1"]
    inlined = kernels / "unaligned.py"
    source = inlined.read_text()
    changed = source.replace("builder.store(value,", "builder.store(builder.not_(value),")
    assert changed != source
    inlined.write_text(changed)
    other, hits = encoded_by(tmp_path)
    assert other != segments
    assert hits == "0"


SEGMENTS = encode(np.eye(3, dtype=np.int8), width=8).mask.segments.tobytes().hex()


def test_no_place_for_a_cache(tmp_path: Path, kernels: Path) -> None:
    """A file where a folder is needed stops even the superuser, whom permissions do not."""
    (kernels / "__pycache__").touch()
    (tmp_path / "home").touch()
    home = str(tmp_path / "home")
    assert encoded_by(tmp_path, HOME=home, XDG_CACHE_HOME=home) == [SEGMENTS, "0"]
    cache = str(tmp_path / "cache")
    for hits in "01":
        assert encoded_by(tmp_path, HOME=home, NUMBA_CACHE_DIR=cache) == [SEGMENTS, hits]


def test_a_disk_that_is_full(tmp_path: Path, kernels: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    assert encoded_by(tmp_path, limit, PYTHONDONTWRITEBYTECODE="1") == [SEGMENTS, "0"]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_caches(tmp_path: Path, kernels: Path, kind: str) -> None:
    encoded_by(tmp_path)
    caches = list(kernels.glob(f"__pycache__/*.{kind}"))
    assert caches
    for path in caches:
        path.write_bytes(path.read_bytes()[:20])
    for hits in "01":
        assert encoded_by(tmp_path) == [SEGMENTS, hits]
