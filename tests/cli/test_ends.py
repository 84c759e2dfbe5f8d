"""How a command ends that something from outside ends."""

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

from qmoe_format.cli import convert as commands


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell's background jobs, such as these tests may be, are started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def raised() -> None:
    pass


def as_another_error() -> None:
    raise ValueError("what native code makes of an exception in what it calls")


def code_of(qmoe: Any, path: Path) -> object:
    try:
        return qmoe("verify", path).code
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("after", [raised, as_another_error])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_told_whatever_becomes_of_its_exception(
    number: int,
    code: int,
    after: Callable[[], None],
    qmoe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def verify(options: object) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(after)
            os.kill(os.getpid(), number)
            pytest.fail("the signal was not seen")

    before = signal.getsignal(number)
    monkeypatch.setattr(commands, "verify", verify)
    assert code_of(qmoe, tmp_path) == code
    assert signal.getsignal(number) == before


TWICE = """
import os, signal, time
from qmoe_format.cli import interruption
with interruption.interruptible():
    try:
        signal.raise_signal({number})
    finally:
        signal.raise_signal({number})
        interruption.PATIENCE = {patience}
        time.sleep(0.01)
        signal.raise_signal({number})
        print("unwound", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("patience", [0, 1000])
def test_signals_while_it_ends(number: int, patience: int) -> None:
    """What comes at once is the same one, handed on; later it is meant."""
    code = TWICE.format(number=int(number), patience=patience)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if patience:
        assert done.stdout == "unwound\n"
        assert done.returncode == (128 + number if number == signal.SIGTERM else -number)
    else:
        assert (done.stdout, done.returncode) == ("", -number)


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_are_ignored_stay_so(
    ignored: int, qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "verify", lambda options: os.kill(os.getpid(), ignored))
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        assert code_of(qmoe, tmp_path) == 0
        assert signal.getsignal(ignored) == signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def too_much() -> None:
    raise MemoryError


def too_much_for_torch() -> None:
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def too_much_for_a_gpu() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("allocate", [too_much, too_much_for_torch, too_much_for_a_gpu])
def test_out_of_memory(
    allocate: Callable[[], None], qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "verify", lambda options: allocate())
    done = qmoe("verify", tmp_path)
    assert done.code == 1
    assert done.err.startswith("error[memory]: ")
    assert done.err.count("\n") == 1


def test_bugs_are_shown(qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands, "verify", verify)
    with pytest.raises(RuntimeError, match="a bug"):
        qmoe("verify", tmp_path)
