"""The runner itself: what it accepts, rejects and prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qmoe_format.conformance import second_reader
from qmoe_format.conformance.runner import (
    HERE,
    EmptyCorpus,
    Result,
    Vector,
    corpus,
    difference,
    judge,
    main,
    program,
    run,
)

VECTORS = {vector.id: vector for vector in corpus()}


def named(*names: str) -> list[Vector]:
    return [VECTORS[name] for name in names]


def test_an_empty_corpus_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EmptyCorpus):
        corpus(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(SystemExit) as caught:
        main(["--corpus", str(tmp_path)])
    assert caught.value.code == 2
    assert "no vectors" in capsys.readouterr().err


def test_a_changed_vector_is_refused(tmp_path: Path) -> None:
    entry = {"id": "a", "file": "a.qmoe", "sha256": "0", "requirements": [], "description": ""}
    (tmp_path / "manifest.json").write_text(json.dumps([entry | {"outcome": "accept"}]))
    (tmp_path / "a.qmoe").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["--corpus", str(tmp_path)])


def test_a_program_is_a_reader() -> None:
    reader = program([sys.executable, second_reader.__file__])
    for vector in named("whole-file", "shards-two", "index-crc", "zstd-bomb", "shards-missing"):
        assert judge(vector, reader(vector.path)) is None


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print('{}')", "accept"),
        ("print('hello')", "exit code 0, but no JSON"),
        ("print('error[limit]: x'); raise SystemExit(1)", "reject:limit"),
        ("print('x\\nerror[limit]: x'); raise SystemExit(1)", "reject:limit"),
        ("print('error[limit]: x')", "exit code 0, but no JSON"),
        ("print('error[limit]: x'); raise SystemExit(3)", "exit code 3: error[limit]: x"),
        ("raise SystemExit('an error[limit]')", "exit code 1: an error[limit]"),
        ("1 / 0", "exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_answers_of_a_program(code: str, outcome: str) -> None:
    assert program([sys.executable, "-c", code])(Path("x")).outcome == outcome


def test_failures_name_the_requirements(capsys: pytest.CaptureFixture[str]) -> None:
    vectors = named("index-crc", "whole-file")
    assert run("nothing", lambda path: Result("reject:limit"), vectors) == 2
    text = capsys.readouterr().out
    assert "FAIL index-crc: reject:checksum expected, reject:limit" in text
    assert "[P-9] `index_crc32` is right" in text
    assert "nothing: 0 of 2 vectors, broken: " in text


def test_the_stage_is_compared_if_the_reader_gives_it() -> None:
    vector = VECTORS["extent-crc-raw"]
    assert judge(vector, Result("reject:checksum", "verify")) is None
    assert judge(vector, Result("reject:checksum")) is None
    assert judge(vector, Result("reject:checksum", "open")) is not None


def test_the_first_difference_is_reported() -> None:
    expected = {"parts": [{"sha256": "a", "levels": "b"}], "shape": [2, 3]}
    found = {"parts": [{"sha256": "x", "levels": "y"}], "shape": [2, 3]}
    assert difference(expected, expected) is None
    text = difference(expected, found)
    assert text == 'contents.parts[0].levels: "b" expected, "y"'
    assert difference({"stack": False}, {"stack": 0}) is not None


def test_the_command(tmp_path: Path) -> None:
    lines = (HERE / "manifest.json").read_text().splitlines()
    chosen = [line.rstrip(",") for line in lines if '"index-crc"' in line or '"one-raw"' in line]
    (tmp_path / "manifest.json").write_text(f"[{','.join(chosen)}]")
    (tmp_path / "vectors").symlink_to(HERE / "vectors")
    command = [sys.executable, "-m", "qmoe_format.conformance", "--corpus", str(tmp_path)]
    for arguments, code, last in (
        ([], 0, "second reader: 2 of 2 vectors\n"),
        (["--reader", sys.executable, second_reader.__file__], 0, ": 2 of 2 vectors\n"),
        (["--reader", sys.executable, "-c", "1 / 0"], 1, " P-9 R-1\n"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.endswith(last)
