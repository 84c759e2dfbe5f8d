"""Calibration text: what is read from good files, how bad ones are refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from qmoe_format.calibration.text import read_documents, text_sha256
from qmoe_format.errors import QMoEError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    return [text for (text,) in read_documents(path, column)]


def refusal(path: Path, column: str = "text", code: str = "argument") -> str:
    with pytest.raises(QMoEError) as caught:
        read_texts(path, column)
    assert caught.value.code == code
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_json_lines(tmp_path: Path) -> None:
    texts = [
        "one",
        'a "quoted"\nsecond line',
        "käse 🧀",
        "\u2028\x85 are no ends of a line",
        " kept ",
    ]
    lines = [json.dumps({"source": 1, "text": t}, ensure_ascii=False) for t in texts]
    for content in ("\n".join(lines), "\r\n".join(lines) + "\r\n", "\n\n \n".join(lines) + "\n"):
        path = write(tmp_path / "some.JSONL", content)
        assert read_texts(path) == texts
        assert read_texts(str(path)) == texts
    write(path, b"\xef\xbb\xbf" + content.encode())  # a byte order mark
    assert read_texts(path) == texts


def test_another_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}\n')
    assert read_texts(path, "body") == ["yes"]


def test_pairs(tmp_path: Path) -> None:
    lines = [("a", "b"), (" ", "c"), ("d", ""), ("e\n", "f")]
    content = "\n".join(json.dumps({"q": q, "id": 1, "answer": a}) for q, a in lines)
    path = write(tmp_path / "a.jsonl", content)
    assert list(read_documents(path, "q", "answer")) == [("a", "b"), ("e\n", "f")]
    for columns, reason in [
        (("q", "target"), "no column 'target'"),
        (("text", "answer"), "no column 'text'"),
        (("q", "id"), "'id' is not text"),
        (("q", "q"), "both the column 'q'"),
    ]:
        with pytest.raises(QMoEError, match=reason) as caught:
            list(read_documents(path, *columns))
        assert caught.value.code == "argument"
    with pytest.raises(QMoEError, match="has no columns") as caught:
        read_documents(write(tmp_path / "a.txt", "a"), "q", "answer")
    assert caught.value.code == "argument"
    with pytest.raises(QMoEError, match="has no text"):
        list(read_documents(write(path, '{"q": "a", "answer": " "}'), "q", "answer"))


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": "a"}\n{"text": " \\n\\t"}\n')
    assert read_texts(path) == ["a"]


def test_blank_lines_separate_documents_of_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n\na\nb\n\n \t\r\n\nc  \r\n  d\r\n\r\ne")
    assert read_texts(path) == ["a\nb", "c  \n  d", "e"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', "not a JSON object"),
        ('{"text": 3}', "'text' is not text"),
        ('{"text": null}', "'text' is not text"),
        ('{"text": ["a"]}', "'text' is not text"),
        ('{"body": "a", "id": 1}', "no column 'text': there is 'body', 'id'"),
        ("{}", "there is none"),
        ('{"text": "a\\ud800"}', "character 1 is half of a surrogate pair"),
        (b'{"text": "k\xe4se"}', "not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str | bytes, reason: str) -> None:
    bad = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + bad + b'\n{"text": "good"}\n')
    message = refusal(path)
    assert f"{path}, line 3: " in message
    assert reason in message


def test_plain_text_has_to_be_utf8(tmp_path: Path) -> None:
    assert "line 2: not UTF-8" in refusal(write(tmp_path / "a.txt", b"a\n\xff\xfeb\n"))
    assert "line 1: not UTF-8" in refusal(write(tmp_path / "b.txt", "wide".encode("utf-16")))


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_no_text(tmp_path: Path, name: str, content: str) -> None:
    assert "has no text" in refusal(write(tmp_path / name, content))


def test_no_text_in_any_document(tmp_path: Path) -> None:
    assert "has no text" in refusal(write(tmp_path / "a.jsonl", '{"text": " "}\n'))


def test_not_a_file_of_text(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.jsonl", code="not-found")
    assert "is a folder" in refusal(tmp_path)
    csv = write(tmp_path / "a.csv", "text\na\n")
    assert "is not one of .jsonl, .txt, .parquet" in refusal(csv)
    with pytest.raises(QMoEError):
        read_documents(csv)  # at once, not when the first document is asked for


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_a_file_of_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert "is not an ordinary file" in refusal(tmp_path / "a.txt")


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    content = b"a\r\nb" * 100_000
    path = write(tmp_path / "a.txt", content)
    assert text_sha256(path) == hashlib.sha256(content).hexdigest()
    with pytest.raises(QMoEError, match="no such file") as caught:
        text_sha256(tmp_path / "none")
    assert caught.value.code == "not-found"


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(QMoEError, match=r"pip install 'qmoe-format\[parquet\]'") as caught:
        read_documents(path)
    assert caught.value.code == "dependency"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"document {i}\nkäse" for i in range(50)]

    def store(**columns: list[object]) -> Path:
        parquet.write_table(pyarrow.table(columns), path, row_group_size=20)
        return path

    store(id=list(range(50)), text=[*texts])
    assert read_texts(path) == texts
    assert "no column 'body': there is 'id', 'text'" in refusal(path, "body")
    assert "row 1: 'id' is not text" in refusal(path, "id")
    assert "row 42: 'text' is not text" in refusal(store(text=[*texts[:41], None, *texts[42:]]))
    assert "has no text" in refusal(store(text=["", " "]))
    answers: list[object] = [str(i) for i in range(50)]
    store(answer=answers, text=[*texts])
    assert list(read_documents(path, "text", "answer")) == list(zip(texts, answers, strict=True))
    assert "not a parquet file" in refusal(write(path, b"PAR1 and so on"))
