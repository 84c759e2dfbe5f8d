"""Running ``qmoe``, in this process and in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmoe_format.cli import main


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def qmoe(capsys: pytest.CaptureFixture[str]) -> Run:
    """``qmoe("verify", path)`` in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return Outcome(code, output.out, output.err)

    return run


@pytest.fixture(scope="session")
def qmoe_process() -> Run:
    """``qmoe("verify", path)`` in a process of its own."""

    def run(*arguments: str | Path) -> Outcome:
        command = [sys.executable, "-m", "qmoe_format.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
