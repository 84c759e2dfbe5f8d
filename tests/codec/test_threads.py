"""Threads share out segments, also in a child that was forked while they were there."""

from __future__ import annotations

import os
import signal

import pytest

from qmoe_format.codec import threads
from qmoe_format.codec.threads import in_parts


@pytest.fixture(params=["torch's", "its own"], autouse=True)
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    if request.param == "its own":
        monkeypatch.setattr(threads, "_torchs_threads", lambda: None)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_parts_cover_the_range_in_order(count: int, number: int) -> None:
    parts = in_parts(count, number, lambda first, last: (first, last))
    assert [i for part in parts for i in range(*part)] == list(range(count))


def test_an_error_is_raised_here() -> None:
    def work(first: int, last: int) -> int:
        if first == 3:
            raise KeyboardInterrupt
        return last

    with pytest.raises(KeyboardInterrupt):
        in_parts(5, 5, work)
    assert in_parts(2, 5, work) == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    in_parts(2, 2, lambda first, last: first)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a wait for threads that are not there would have no end
        os._exit(0 if in_parts(2, 2, lambda first, last: first) == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
