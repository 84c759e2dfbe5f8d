"""Let SIGINT and SIGTERM unwind a command, so that it removes its partial files."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

REMINDER_S = 0.1


@contextmanager
def interruptible(patience: float = 1.0) -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGINT, and ``SystemExit`` (128 + its number) on SIGTERM.

    It is raised wherever the main thread happens to be. That may be a ``__del__`` or a callback of
    a weak reference, which swallow it: as long as nothing is unwinding, it is raised again every
    ``REMINDER_S`` seconds, and at the end of the block. Or native code that calls back into Python
    turns it into an error of its own: torch into a ``ValueError``, for example, while it looks up
    the shape of a storage. After a signal, any error that leaves the block becomes that exception.
    Unwinding may take as long as one expert; another signal kills the process.

    Args:
        patience: seconds in which another signal counts as the same one, because some programs
            pass theirs on to their children.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    since = 0.0
    ended = False
    timed = hasattr(signal, "setitimer")  # not on Windows

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if received:
            if time.monotonic() - since > patience:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        since = time.monotonic()
        received.append(number)
        if timed:
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, remind)
            signal.setitimer(signal.ITIMER_REAL, REMINDER_S, REMINDER_S)
        raise _exception(number)

    def remind(number: int, frame: FrameType | None) -> None:
        if not ended and sys.exception() is None:
            raise _exception(received[0])

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        if not received or not isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
            report_before(unraisable)

    before: dict[int, Any] = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        # A shell starts its background jobs with SIGINT ignored.
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, receive)
    report_before, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield
        if received:
            raise _exception(received[0])
    except BaseException as error:
        if received and not isinstance(error, KeyboardInterrupt | SystemExit):
            raise _exception(received[0]) from error
        raise
    finally:
        ended = True
        if received and timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report_before
        for number, handler in before.items():
            signal.signal(number, handler)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
