"""Exit codes and messages of commands that signals, a lack of memory or bugs end."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmoe_format.cli import verify
from qmoe_format.cli.interruption import REMINDER_S


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


class Cyclic:
    """Garbage that only ``gc.collect`` finds."""

    def __init__(self) -> None:
        self.itself = self


def in_a_finalizer(number: int) -> None:
    class Finalized(Cyclic):
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    Finalized()
    gc.collect()


def in_a_callback(number: int) -> None:
    owner = Cyclic()
    reference = weakref.ref(owner, lambda _: os.kill(os.getpid(), number))
    del owner
    gc.collect()
    assert reference() is None


def in_a_careless_block(number: int) -> None:
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), number)


SWALLOWED = [in_a_finalizer, in_a_callback, in_a_careless_block]


@pytest.mark.parametrize("swallow", SWALLOWED)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("further_s", [0, 60])
def test_a_signal_where_its_exception_is_swallowed(
    swallow: Callable[[int], None],
    number: int,
    code: int,
    further_s: float,
    qmoe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends the command soon, at the latest when that ends by itself, and without a report."""

    def run(options: object) -> None:
        swallow(number)
        time.sleep(further_s)

    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    monkeypatch.setattr(verify, "run", run)
    before = time.monotonic()
    assert code_of(qmoe, tmp_path) == code
    assert time.monotonic() - before < 30
    assert not reported
    time.sleep(2 * REMINDER_S)  # and nothing is raised after the end


def test_other_errors_in_finalizers_are_reported(
    qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Cyclic):
        def __del__(self) -> None:
            raise ValueError("in a finalizer")

    def run(options: object) -> None:
        Failing()
        gc.collect()
        os.kill(os.getpid(), signal.SIGINT)

    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    monkeypatch.setattr(verify, "run", run)
    assert code_of(qmoe, tmp_path) == 130
    assert [each.exc_type for each in seen] == [ValueError]
    assert sys.unraisablehook == seen.append


@pytest.mark.parametrize("after", [unchanged, as_another_error])
def test_cleaning_up_is_not_disturbed(
    after: Callable[[], None], qmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned = []

    def clean_up() -> None:
        time.sleep(3 * REMINDER_S)
        cleaned.append(True)

    def run(options: object) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(clean_up)
            stack.callback(after)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(verify, "run", run)
    assert code_of(qmoe, tmp_path) == 130
    assert cleaned


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
