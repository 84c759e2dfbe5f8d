"""The progress line: on terminals only, never where a program reads."""

from __future__ import annotations

import io

import pytest

from qmoe_format.cli.progress_line import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("qmoe_format.cli.progress_line.time.monotonic", lambda: now[0])
    return now


def test_percentage_rate_and_time_left(clock: list[float]) -> None:
    stream = Terminal()
    with ProgressLine("convert", "weights", stream) as progress:
        clock[0] += 2
        progress(4_000_000, 16_000_000)
        line = "convert  25%  0:06 left  2.00 M weights/s  4.00 M weights of 16.0 M weights"
        assert stream.getvalue() == f"\r{line}\x1b[K"
        progress(5_000_000, 16_000_000)  # too soon for another update
        assert stream.getvalue().count("\r") == 1
    assert stream.getvalue().endswith("\r\x1b[K"), "the line disappears at the end"


def test_nothing_done_and_nothing_to_do(clock: list[float]) -> None:
    stream = Terminal()
    with ProgressLine("verify", "B", stream) as progress:
        clock[0] += 1
        progress(0, 10)
        clock[0] += 1
        progress(0, 0)
    assert "verify   0%  -:-- left  0 B/s  0 B of 10 B" in stream.getvalue()


def test_nothing_is_written_without_a_terminal(clock: list[float]) -> None:
    stream = io.StringIO()
    with ProgressLine("verify", "B", stream) as progress:
        clock[0] += 5
        progress(1, 2)
    assert not stream.getvalue()


def test_after_a_step_back_the_rate_is_measured_anew(clock: list[float]) -> None:
    stream = Terminal()
    with ProgressLine("convert", "weights", stream) as progress:
        clock[0] += 100
        progress(900, 1000)
        clock[0] += 1
        progress(800, 1000)
        clock[0] += 10
        progress(850, 1000)
        assert "  0:30 left  5 weights/s  " in stream.getvalue().rpartition("\r")[2]


def test_what_comes_before_the_work_does_not_count(clock: list[float]) -> None:
    stream = Terminal()
    with ProgressLine("convert", "weights", stream) as progress:
        clock[0] += 1000  # a download
        progress(0, 1000)
        clock[0] += 10
        progress(500, 1000)
        assert "  0:10 left  50 weights/s  " in stream.getvalue().rpartition("\r")[2]


def test_the_line_does_not_wrap(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with ProgressLine("convert", "weights", stream) as progress:
        clock[0] += 2
        progress(4_000_000, 16_000_000, "encoder.block.1, expert 1 of 16")
        assert len(stream.getvalue().removeprefix("\r").removesuffix("\x1b[K")) == 39
