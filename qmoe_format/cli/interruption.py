"""Let SIGINT and SIGTERM unwind a command, so that it removes its partial files."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(patience: float = 1.0) -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGINT, and ``SystemExit`` (128 + its number) on SIGTERM.

    After a signal, any error that leaves the block becomes that exception. It is raised wherever
    the main thread happens to be, even where native code calls back into Python and turns it into
    an error of its own: torch into a ``ValueError``, for example, while it looks up the shape of a
    storage. Unwinding may take as long as one expert; another signal kills the process.

    Args:
        patience: seconds in which another signal counts as the same one, because some programs
            pass theirs on to their children.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    since = 0.0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if received:
            if time.monotonic() - since > patience:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        since = time.monotonic()
        received.append(number)
        raise _exception(number)

    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        # A shell starts its background jobs with SIGINT ignored.
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
