"""Exit codes and messages of commands that signals, a lack of memory or bugs end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmoe_format.cli import verify


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Undo what a shell does to its background jobs, which may include these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def unchanged() -> None:
    pass


def as_another_error() -> None:
    raise ValueError("native code may turn an exception in a callback into another one")


def code_of(qmoe: Any, path: Path) -> object:
    try:
        return qmoe("verify", path).code
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("after", [unchanged, as_another_error])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_decides_the_exit_code_whatever_its_exception_turns_into(
    number: int,
    code: int,
    after: Callable[[], None],
    qmoe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(options: object) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(after)
            os.kill(os.getpid(), number)
            pytest.fail("the signal was not seen")

    before = signal.getsignal(number)
    monkeypatch.setattr(verify, "run", run)
    assert code_of(qmoe, tmp_path) == code
    assert signal.getsignal(number) == before


TWICE = """
import os, signal, time
from qmoe_format.cli.interruption import interruptible
with interruptible(patience={patience}):
    try:
        signal.raise_signal({number})
    finally:
        signal.raise_signal({number})
        time.sleep(0.01)
        signal.raise_signal({number})
        print("unwound", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("patience", [0, 1000])
def test_a_second_signal(number: int, patience: int) -> None:
    """Shortly after the first it counts as the same one; later it kills the process."""
    code = TWICE.format(number=int(number), patience=patience)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if patience:
        assert done.stdout == "unwound\n"
        assert done.returncode == (128 + number if number == signal.SIGTERM else -number)
    else:
        assert (done.stdout, done.returncode) == ("", -number)


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_ignored_signals_stay_ignored(
    ignored: int, qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "run", lambda options: os.kill(os.getpid(), ignored))
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        assert code_of(qmoe, tmp_path) == 0
        assert signal.getsignal(ignored) == signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def fail_in_python() -> None:
    raise MemoryError


def fail_on_cpu() -> None:
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def fail_on_gpu() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("allocate", [fail_in_python, fail_on_cpu, fail_on_gpu])
def test_out_of_memory(
    allocate: Callable[[], None], qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "run", lambda options: allocate())
    done = qmoe("verify", tmp_path)
    assert done.code == 1
    assert done.err.startswith("error[memory]: ")
    assert done.err.count("\n") == 1


def test_a_bug_shows_its_traceback(
    qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(verify, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        qmoe("verify", tmp_path)
