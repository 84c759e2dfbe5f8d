"""SIGINT and SIGTERM unwind what runs, so that half-written files are removed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 1.0  # seconds in which another signal is the same: some programs hand theirs on


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block SIGINT raises ``KeyboardInterrupt``, SIGTERM ``SystemExit`` (128 + its number).

    After a signal whatever error leaves the block becomes that exception. It is raised wherever the
    main thread is, also where native code looks something up in Python, and some makes an error of
    its own of it: torch a ``ValueError``, when it asks for a storage's shape. Unwinding may take as
    long as an expert; another signal kills the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    since = 0.0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if received:
            if time.monotonic() - since > PATIENCE:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        since = time.monotonic()
        received.append(number)
        raise _exception(number)

    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        # Those that a shell started in the background ignore SIGINT.
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, receive)
    try:
        yield
    except BaseException as error:
        if received and not isinstance(error, KeyboardInterrupt | SystemExit):
            raise _exception(received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
