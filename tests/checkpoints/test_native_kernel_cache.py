"""Compiled kernels outside of the codec are used again, until a source beside them changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INNER = """
from qmoe_format.codec.kernels.jit import inlined

@inlined
def inner(x):
    return x + {}
"""
OUTER = """
from inner import inner
from qmoe_format.codec.kernels.jit import kernel

@kernel
def outer(x):
    return inner(x)

print(outer(1), sum(outer.stats.cache_hits.values()))
"""


def test_a_change_beside_a_kernel_is_noticed(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "NUMBA" not in name}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])

    def run(added: int) -> list[str]:
        (tmp_path / "inner.py").write_text(INNER.format(added))
        command = [sys.executable, "outer.py"]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).split()

    (tmp_path / "outer.py").write_text(OUTER)
    assert run(2) == ["3", "0"]
    assert run(2) == ["3", "1"]
    assert run(5) == ["6", "0"]
