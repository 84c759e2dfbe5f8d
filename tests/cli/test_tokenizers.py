"""Models whose tokenizer is missing or is code, and special tokens, on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qmoe_format
from qmoe_format.conversion.report import read_report

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
from transformers import AutoTokenizer

from tests.conftest import Outcome
from tests.tiny_models import WORDS, save_model

Run = Callable[..., Outcome]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 2))
    return path


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model whose tokenizer is code, which writes ``ran`` beside the folder when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = save_model(tmp_path / "checkpoint", "deepseek_v3")
    (folder / "tokenization_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "configuration_own.py").write_text("raise AssertionError('was run')")
    for name, own in {
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        },
        "config.json": {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
    }.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_code_is_not_run_and_nobody_is_asked(
    qmoe: Run, own_code: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[object] = []
    monkeypatch.setattr("builtins.input", questions.append)
    file = tmp_path / "m.qmoe"
    done = qmoe("convert", own_code, file, "--calibration", text)
    assert done.code == 1
    assert done.err.startswith(f"error[checkpoint]: {own_code}: its tokenizer is code, ")
    assert "tokenization_own.py" in done.err
    assert "--trust-remote-code" in done.err

    done = qmoe("convert", own_code, file)
    assert done.code == 0
    assert done.err.startswith("warning: the file cannot generate text: ")
    assert "tokenization_own.py" in done.err
    assert done.err.count("\n") == 1
    for options in ([], ["--trust-remote-code"]):
        done = qmoe("generate", file, "w1", *options)
        assert done.code == 1
        assert "convert with --trust-remote-code" in done.err
    assert not questions
    assert not (tmp_path / "ran").exists()


def test_trusted_code_is_run_and_travels(
    qmoe: Run, own_code: Path, text: Path, tmp_path: Path
) -> None:
    file, trust = tmp_path / "m.qmoe", "--trust-remote-code"
    done = qmoe("convert", own_code, file, "--calibration", text, trust)
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "ran").exists()
    with qmoe_format.open(file) as opened:
        assert {"tokenization_own.py", "configuration_own.py"} <= opened.attachments.keys()
    for arguments in (
        ["generate", file, "w1 w2", "--max-new-tokens", "2"],
        ["eval", file, "--text", text, "--against", own_code],
    ):
        (tmp_path / "ran").unlink()
        done = qmoe(*arguments, trust)
        assert (done.code, done.err) == (0, "")
        assert (tmp_path / "ran").exists()


def test_a_missing_tokenizer(qmoe: Run, text: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "checkpoint", "switch_transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    file = tmp_path / "m.qmoe"
    done = qmoe("convert", folder, file, "--calibration", text)
    assert done.code == 1
    assert done.err.startswith(f"error[not-found]: {folder}: there is no tokenizer; ")
    assert not file.exists()
    done = qmoe("convert", folder, file)
    assert done.code == 0
    assert done.err.startswith(
        f"warning: the file cannot generate text: {folder}: there is no tokenizer"
    )


def test_special_tokens_in_calibration_text(qmoe: Run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "checkpoint", "mixtral")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    *words, mark = WORDS  # the last becomes special
    tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    tokenizer.chat_template = f"{{% for m in messages %}}{mark} {{{{ m.content }}}} {{% endfor %}}"
    tokenizer.save_pretrained(folder)
    content = " ".join(words)
    texts = {
        "plain.jsonl": {"text": f"{mark} {content}"},
        "chat.jsonl": {"messages": [{"role": "user", "content": content}]},
    }
    for name, line in texts.items():
        (tmp_path / name).write_text(json.dumps(line))
    recorded: list[bool | None] = []
    for name, *options in (
        ("plain.jsonl",),
        ("plain.jsonl", "--parse-special-tokens"),
    ):
        file = tmp_path / "m.qmoe"
        done = qmoe("convert", folder, file, "--force", "--calibration", tmp_path / name, *options)
        assert done.code == 0
        warned = f"{mark!r}, are read as text (1 in all)" in done.err
        assert warned == (not recorded)
        with qmoe_format.open(file) as opened:
            settings = read_report(opened)["settings"]
        recorded.append(settings["parse_special_tokens"])
    assert recorded == [False, True]
    done = qmoe("eval", file, "--text", tmp_path / "chat.jsonl")
    assert (done.code, done.err) == (0, "")
