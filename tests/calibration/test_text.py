"""Calibration text: what is read from good files, how bad ones are refused."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qmoe_format.calibration.text import Chat, read_documents, text_sha256
from qmoe_format.errors import QMoEError, QMoEWarning

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]  # as ShareGPT has it


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    texts = []
    for (text,) in read_documents(path, column):
        assert isinstance(text, str)
        texts.append(text)
    return texts


def messages(path: str | Path, column: str = "text") -> list[Any]:
    """The documents; of chats, the messages."""
    return [
        document.messages if isinstance(document, Chat) else document
        for (document,) in read_documents(path, column)
    ]


def refusal(path: str | Path, column: str = "text", code: str = "argument") -> str:
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
        (("q", "target"), "line 1: no column 'target': there is 'q', 'id', 'answer'"),
        (("text", "answer"), "line 1: no column 'text'"),
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


def test_an_array_of_objects(tmp_path: Path) -> None:
    items = [{"text": "one\ntwo"}, {"text": " "}, {"text": "käse"}]
    path = tmp_path / "a.json"
    for content in (json.dumps(items, ensure_ascii=False), json.dumps(items, indent=2)):
        for text in (content, f"\ufeff\n {content}\n", content.replace("\n", "\r\n")):
            assert read_texts(write(path, text)) == ["one\ntwo", "käse"]
    assert "a.json: not JSON" in refusal(write(path, '[{"text": "a"}'))
    assert "item 2: not a JSON object" in refusal(write(path, '[{"text": "a"}, "b"]'))
    assert "item 1: 'text' is not text" in refusal(write(path, '[{"text": 1}]'))
    assert "has no text" in refusal(write(path, "[]"))
    assert "has no text" in refusal(write(path, ""))


def test_a_json_file_of_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n{"text": "a"}\n{"text": "b"}\n')
    assert read_texts(path) == ["a", "b"]
    assert "line 1: not JSON" in refusal(write(path, '{\n"text": "a"}'))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.JSON.GZ", "a.txt.gz"])
def test_compressed(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbfa\r\n\r\nb" if "txt" in name else b'{"text": "a"}\n{"text": "b"}\n'
    path = write(tmp_path / name, gzip.compress(content))
    assert read_texts(path) == ["a", "b"]
    assert text_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "not a gzip file" in refusal(write(path, content))
    assert "not a gzip file, or damaged" in refusal(write(path, gzip.compress(content)[:-9]))


def test_chats(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"text": "plain", "messages": None},
        {"messages": CHAT, "text": None},
        {"conversations": SHARED},
        {"text": CHAT},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"conversations": [{"from": "tool", "value": "c", "role": "user"}]},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    expected = ["plain", CHAT, CHAT, CHAT, *(next(iter(each.values())) for each in lines[5:])]
    assert messages(path) == expected
    with pytest.warns(QMoEWarning, match="4 of 7 documents have no 'messages'"):
        assert messages(path, "messages") == [CHAT, expected[4]]
    (chat,) = list(read_documents(path))[1]
    assert isinstance(chat, Chat)
    assert chat.where == f"{path}, line 2"


def test_a_chat_is_no_half_of_a_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT, "text": "a"}))
    with pytest.raises(QMoEError, match="line 1: 'messages' is not text"):
        list(read_documents(path, "messages", "text"))
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": "no", "target": "a"}))
    with pytest.raises(QMoEError, match="no column 'text'"):
        list(read_documents(path, "text", "target"))


def test_documents_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    good = '{"text": "a"}\n{"text": ""}\n'
    path = write(tmp_path / "a.jsonl", good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_texts(path) == ["a"]  # a blank one is not worth a word
    write(path, f'{{"text": null}}\n{{"body": "b"}}\n{{}}\n{good}')
    with pytest.warns(QMoEWarning) as caught:
        assert read_texts(path) == ["a"]
    (warning,) = caught
    assert str(warning.message) == f"{path}: 3 of 5 documents have no 'text' and are left out"
    write(path, '{"q": "a", "answer": null}\n{"q": "c", "answer": "d"}\n')
    with pytest.warns(QMoEWarning, match="1 of 2 documents have no 'q' or 'answer' and"):
        assert list(read_documents(path, "q", "answer")) == [("c", "d")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": null}', "has no text"),
        ('{"text": null}\n{"body": "b"}', "has no text"),
        ('{"body": "a", "id": 1}', "line 1: no column 'text': there is 'body', 'id'"),
        ("{}", "there is none"),
    ],
)
def test_nothing_is_left(tmp_path: Path, line: str, reason: str) -> None:
    assert reason in refusal(write(tmp_path / "a.jsonl", line))


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
        ('{"text": ["a"]}', "'text' is not text"),
        ('{"messages": "a\\ud800"}', "character 1 is half of a surrogate pair"),
        ('{"messages": {"role": "user"}}', "'messages' is not text"),
        ('{"messages": [{"content": "a"}]}', "'messages' is not text"),
        ('{"conversations": [{"role": "user", "content": "a"}, 1]}', "'conversations' is not"),
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
    assert "is not one of .jsonl, .json, .txt, .parquet" in refusal(csv)
    assert "is not one of" in refusal(write(tmp_path / "a.gz", ""))
    assert "is not one of" in refusal(write(tmp_path / "a.parquet.gz", ""))
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
    with pytest.warns(QMoEWarning, match="1 of 50 documents have no 'text'"):
        assert read_texts(store(text=[*texts[:41], None, *texts[42:]])) == texts[:41] + texts[42:]
    assert "has no text" in refusal(store(text=["", " "]))
    assert messages(store(id=[1], messages=[[*CHAT]])) == [CHAT]
    assert messages(store(text=["a", None], conversations=[None, [*SHARED]])) == ["a", CHAT]
    store(answer=["b"])
    with pytest.raises(QMoEError, match="no column 'text'"):
        list(read_documents(path, "text", "answer"))
    answers: list[object] = [str(i) for i in range(50)]
    store(answer=answers, text=[*texts])
    assert list(read_documents(path, "text", "answer")) == list(zip(texts, answers, strict=True))
    assert "not a parquet file" in refusal(write(path, b"PAR1 and so on"))
    store(text=pyarrow.array([2**31 - 1], pyarrow.date32()))  # later than Python's last day
    assert "not a parquet file of text" in refusal(path)


# --- data sets of the Hub -----------------------------------------------------------------------


class Rows:
    """What ``datasets.load_dataset`` returns."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])

    def select_columns(self, names: list[str]) -> Rows:
        return Rows([{name: row[name] for name in names} for row in self.rows])

    def __iter__(self) -> Iterator[dict[str, object]]:
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], list[Any]]:
    """Data sets by name, configuration and split."""
    data_sets: dict[tuple[str, str | None, str], list[Any]] = {}

    def load_dataset(path: str, name: str | None = None, *, split: str) -> Rows:
        return Rows(data_sets[path, name, split])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return data_sets


def test_a_data_set(hub: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub["org/name", None, "train"] = [{"text": "a", "url": object()}, {"text": "b", "url": 1}]
    hub["org/name", None, "test[:10%]"] = [{"text": "c", "messages": None, "url": 1}]
    hub["org/na.me-2", "20231101.en", "train"] = [{"messages": CHAT, "url": object()}]
    hub["org/pairs", None, "train"] = [{"q": "d", "a": "e"}]
    assert read_texts("org/name") == ["a", "b"]
    assert read_texts(Path("org/name:train")) == ["a", "b"]
    assert read_texts("org/name:test[:10%]") == ["c"]
    assert messages("org/na.me-2:20231101.en:train") == [CHAT]
    assert list(read_documents("org/pairs", "q", "a")) == [("d", "e")]
    assert "no column 'body': there is 'text', 'url'" in refusal("org/name", "body")
    hub["org/name", None, "train"][0]["url"] = "text"
    assert "org/name, row 2: 'url' is not text" in refusal("org/name", "url")
    hashes = [text_sha256("org/name"), text_sha256("org/name:test[:10%]")]
    hub["org/name", None, "train"][1]["text"] = "B"
    hub["org/name", None, "test[:10%]"][0]["url"] = 2  # which nobody reads
    assert text_sha256("org/name") != hashes[0]
    assert text_sha256("org/name:test[:10%]") == hashes[1]


def test_no_such_data_set(hub: dict[Any, Any]) -> None:
    message = refusal("org/name:test", code="not-found")
    assert "no such file" in message
    assert "ORG/NAME:CONFIG:SPLIT" in message


def test_a_data_set_needs_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QMoEError, match=r"pip install 'qmoe-format\[datasets\]'") as caught:
        read_documents("org/name")  # at once
    assert caught.value.code == "dependency"
    assert "no such file" in str(caught.value)


@pytest.mark.usefixtures("hub")
def test_a_path_is_not_taken_for_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.jsonl", "data/a.txt.gz", "data", "a/b/c", "/data/train", "a/b:c:d:e"):
        message = refusal(name, code="not-found")
        assert "no such file" in message
        assert "data set" not in message
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert "org/name: is a folder" in refusal("org/name")
