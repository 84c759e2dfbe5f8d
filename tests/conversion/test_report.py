"""The quality report: its text, and others' texts under its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qmoe_format
from qmoe_format.conversion.report import (
    FewTokens,
    Quality,
    StackQuality,
    dump_report,
    few_tokens,
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
    "kurtosis": 3,
    "levels": 5,
    "zeros": 0.25,
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
    for report in (quality(), quality(relative_error=0.1, kurtosis=None, levels=255, zeros=0)):
        text = dump_report(report)
        assert json.loads(text) == report
        assert text.count(b"\n") == 8
        with qmoe_format.open(file_with(text, tmp_path / "m.qmoe")) as file:
            assert read_report(file) == report


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
                {"kurtosis": "heavy"},
                {"levels": 3.5},
                {"zeros": None},
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


def stack(name: str, *tokens: int) -> StackQuality:
    experts: Any = [EXPERT | {"tokens": each} for each in tokens]
    return StackQuality({"name": name, "lambda": None, "experts": experts})


def few(*stacks: StackQuality, **columns: int) -> FewTokens | None:
    named = {stack["name"]: columns[stack["name"].rpartition(".")[2]] for stack in stacks}
    return few_tokens(Quality(settings={}, totals={}, stacks=list(stacks)), named)


def test_few_tokens() -> None:
    """An expert counts once, whichever of its matrices have more columns than it has tokens."""
    encoder, decoder = "encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"
    stacks = [
        stack(f"{part}.{matrix}", *tokens)
        for part, tokens in ((encoder, (9, 5, 0)), (decoder, (8, 100, 7)))
        for matrix in ("wi", "wo")
    ]
    assert few(*stacks, wi=6, wo=8) == FewTokens(experts=3, of=6, fewest=0)
    assert few(*stacks, wi=8, wo=6) == FewTokens(experts=3, of=6, fewest=0)
    assert few(*stacks, wi=1, wo=1) == FewTokens(experts=1, of=6, fewest=0)
    assert few(*stacks, wi=0, wo=0) is None


def test_experts_that_the_model_does_not_run_cannot_see_more_tokens() -> None:
    run, idle = stack("model.layers.1.experts.w1", 9, 5), stack("model.layers.2.experts.w1", 0, 0)
    assert few(run, idle, w1=8) == FewTokens(experts=1, of=2, fewest=5)
    assert few(idle, w1=8) is None


def test_names_and_digits() -> None:
    assert report_path(Path("a/model.qmoe")) == Path("a/model.quality.json")
    assert report_path(Path("model.qmoe.json")) == Path("model.quality.json")
    assert rounded(1 / 3) == 0.333333
    assert rounded(None) is None
