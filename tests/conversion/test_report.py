"""The quality report: its text, and others' texts under its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qmoe_format
from qmoe_format.conversion.report import (
    Quality,
    StackQuality,
    dump_report,
    read_report,
    report_path,
    rounded,
)
from qmoe_format.errors import QMoEError

EXPERT: dict[str, Any] = {
    "tokens": 3,
    "damping": 0.1,
    "fallback": None,
    "relative_error": None,
    "bits": 0.5,
}


def quality(**changes: Any) -> Quality:
    experts = [EXPERT | {"fallback": 'a "reason"'}, EXPERT | changes]
    stack: Any = {"name": "layer.experts.wi", "lambda": 0.05, "experts": experts}
    empty = StackQuality({"name": "other", "lambda": None, "experts": []})
    return Quality(settings={"seed": 0}, totals={"tokens": 7}, stacks=[stack, empty])


def file_with(text: bytes, path: Path) -> Path:
    with qmoe_format.Writer(path) as writer:
        writer.add_attachment("quality.json", text)
    return path


def test_there_and_back(tmp_path: Path) -> None:
    text = dump_report(quality())
    assert json.loads(text) == quality()
    assert text.count(b"\n") == 8
    with qmoe_format.open(file_with(text, tmp_path / "m.qmoe")) as file:
        assert read_report(file) == quality()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        *(
            dump_report(quality(**change))
            for change in (
                {"tokens": 1.5},
                {"tokens": True},
                {"bits": None},
                {"fallback": 1},
                {"relative_error": "small"},
            )
        ),
        dump_report(quality()).replace(b'"layer.experts.wi"', b"7"),
        dump_report(quality()).replace(b'"damping"', b'"dampness"'),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: bytes, qmoe: Any) -> None:
    path = file_with(text, tmp_path / "m.qmoe")
    with qmoe_format.open(path) as file, pytest.raises(QMoEError) as caught:
        read_report(file)
    assert caught.value.code == "malformed"
    assert qmoe("inspect", path, "--quality").code == 1
    assert qmoe("verify", path).code == 0


def test_names_and_digits() -> None:
    assert report_path(Path("a/model.qmoe")) == Path("a/model.quality.json")
    assert report_path(Path("model.qmoe.json")) == Path("model.quality.json")
    assert rounded(1 / 3) == 0.333333
    assert rounded(None) is None
