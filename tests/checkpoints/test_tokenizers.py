"""Tokenizers as they come: what loads, and what an error says about the others."""

from __future__ import annotations

import base64
import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import qmoe_format
from qmoe_format.errors import QMoEWarning

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
from tokenizers import Tokenizer, models, pre_tokenizers

from qmoe_format.checkpoints import tokenizers
from qmoe_format.checkpoints.attachments import find_attachments
from qmoe_format.checkpoints.tokenizers import load_tokenizer, warn_without_tokenizer
from qmoe_format.container.attachment_files import attachment_name
from tests.refusals import refusal

TIKTOKEN = "".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from .own_helpers import note
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
note()
"""


def fast_tokenizer() -> str:
    words = {word: number for number, word in enumerate(["<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(tokenizer.to_str())


normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
PANIC = json.dumps(json.loads(fast_tokenizer()) | {"normalizer": normalizer})


def sentencepiece_model() -> bytes:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    lines = iter(["a mixture of experts is a sparse model", "each token sees few experts"] * 20)
    trainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2
    )
    return model.getvalue()


def make(
    folder: Path, model_type: str, config: dict[str, Any] | None = None, **files: str | bytes
) -> Path:
    """A folder without weights; in the names of ``files``, ``__`` stands for a dot."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def attach(folder: Path, path: Path, code: bool = False) -> Path:
    with qmoe_format.Writer(path) as writer:
        for each in find_attachments(folder, code=code):
            writer.add_attachment(attachment_name(each.relative_to(folder)), each.read_bytes())
    return path


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a tokenizer that is code; it writes ``ran`` beside the folder when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    note = f"def note():\n    open({str(tmp_path / 'ran')!r}, 'w')\n"
    own = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    yield make(
        tmp_path / "own",
        "deepseek_v3",
        own,
        tokenizer__json=fast_tokenizer(),
        tokenization_own__py=CODE,
        own_helpers__py=note,
    )
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "switch_transformers", "olmoe"])
@pytest.mark.parametrize("named", ["tokenizer.model", "spiece.model"])
def test_only_a_sentencepiece_model(tmp_path: Path, model_type: str, named: str) -> None:
    t5 = named == "spiece.model"
    if t5 and model_type == "mixtral":
        pytest.skip("transformers itself does not look for this name")
    config = {"tokenizer_class": "T5Tokenizer" if t5 else "LlamaTokenizer"}
    files = {named.replace(".", "__"): sentencepiece_model()}
    folder = make(tmp_path / "a", model_type, config, **files)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("each token", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert tokenizer.unk_token_id not in ids
    attached = qmoe_format.load_tokenizer(attach(folder, tmp_path / "m.qmoe"))
    assert attached("each token", add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize("named", ["tokenizer.model", "tiktoken.model"])
def test_only_a_tiktoken_vocabulary(tmp_path: Path, named: str) -> None:
    pytest.importorskip("tiktoken")
    folder = make(tmp_path / "a", "deepseek_v3", None, **{named.replace(".", "__"): TIKTOKEN})
    assert load_tokenizer(folder)("ab").input_ids == [97, 98]
    # tiktoken would give the old file, which it remembers by its path.
    more = f"{base64.b64encode(b'ab').decode()} 256\n"
    (folder / named).write_text(TIKTOKEN + more)
    assert load_tokenizer(folder)("ab").input_ids == [256]


@pytest.mark.parametrize(
    ("content", "missing", "advice"),
    [
        ("sentencepiece", "sentencepiece", "pip install sentencepiece"),
        ("sentencepiece", "google.protobuf", "pip install protobuf"),
        ("tiktoken", "tiktoken", "pip install tiktoken"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, missing: str, advice: str
) -> None:
    vocabulary = TIKTOKEN if content == "tiktoken" else sentencepiece_model()
    folder = make(tmp_path / "a", "qwen3_moe", None, tokenizer__model=vocabulary)

    def cannot(*arguments: Any, **options: Any) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file")

    monkeypatch.setattr(tokenizers, "_installed", lambda module: module != missing)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", cannot)
    message = refusal(lambda: load_tokenizer(folder), "dependency")
    assert "tokenizer.model needs the package" in message
    assert advice in message


def test_packages_are_looked_for() -> None:
    assert tokenizers._installed("transformers.models")
    assert not tokenizers._installed("google.no_such_package")
    assert not tokenizers._installed("no_such_package.inside")


@pytest.mark.parametrize(
    ("model_type", "config", "files", "code", "expected"),
    [
        # Switch has T5's tokenizer, which knows <unk> and a space when its files are not there.
        ("switch_transformers", None, {}, "not-found", "there is no tokenizer"),
        ("mixtral", {}, {}, "not-found", "there is no tokenizer"),
        ("qwen3_moe", None, {"merges__txt": "h e\n"}, "not-found", "there is no tokenizer"),
        ("qwen3_moe", None, {"tokenizer__json": ""}, "not-found", "there is no tokenizer"),
        (
            "deepseek_v3",
            {"tokenizer_class": "LlamaTokenizer"},
            {"vocab__json": "{}"},
            "checkpoint",
            "LlamaTokenizer found no tokenizer.json or tokenizer.model",
        ),
        (
            "switch_transformers",
            None,
            {"vocab__json": "{}"},
            "checkpoint",
            "T5Tokenizer found no spiece.model or tokenizer.json",
        ),
        ("mixtral", None, {"tokenizer__json": "{"}, "checkpoint", "cannot load its tokenizer"),
        ("mixtral", None, {"tokenizer__json": PANIC}, "checkpoint", "cannot load its tokenizer"),
        ("mixtral", None, {"tokenizer__model": POINTER}, "checkpoint", "git lfs pull"),
    ],
)
def test_no_vocabulary(
    tmp_path: Path,
    model_type: str,
    config: dict[str, str] | None,
    files: dict[str, str],
    code: str,
    expected: str,
) -> None:
    folder = make(tmp_path / "a", model_type, config, **files)
    message = refusal(lambda: load_tokenizer(folder), code)
    assert message.startswith(f"{folder}: ")
    assert expected in message
    with pytest.warns(QMoEWarning, match="cannot generate text"):
        warn_without_tokenizer(folder)


def test_no_warning_for_a_tokenizer_that_loads(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "mixtral", None, tokenizer__json=fast_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error", QMoEWarning)
        warn_without_tokenizer(folder)


def test_code_is_not_run_and_nobody_is_asked(
    own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[object] = []
    monkeypatch.setattr("builtins.input", questions.append)
    path = attach(own_code, tmp_path / "m.qmoe", code=True)
    for where, call in (
        (own_code, lambda: load_tokenizer(own_code)),
        (path, lambda: qmoe_format.load_tokenizer(path)),
    ):
        message = refusal(call, "checkpoint")
        assert f"{where}: its tokenizer is code, tokenization_own.py" in message
        assert "--trust-remote-code" in message
    assert not questions
    assert not (tmp_path / "ran").exists()


def test_trusted_code_is_run_from_the_folder_and_from_the_file(
    own_code: Path, tmp_path: Path
) -> None:
    path = attach(own_code, tmp_path / "m.qmoe", code=True)
    loads: list[Callable[[], Any]] = [
        lambda: load_tokenizer(own_code, trust_remote_code=True),
        lambda: qmoe_format.load_tokenizer(path, trust_remote_code=True),
    ]
    for load in loads:
        (tmp_path / "ran").unlink(missing_ok=True)
        tokenizer = load()
        assert (tmp_path / "ran").exists()
        assert type(tokenizer).__name__ == "OwnTokenizer"
        assert tokenizer("a b").input_ids == [1, 2]


def test_code_of_the_configuration_is_not_run_for_a_tokenizer(
    own_code: Path, tmp_path: Path
) -> None:
    config = {
        "model_type": "deepseek_v3",
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig"},
    }
    (own_code / "config.json").write_text(json.dumps(config))
    (own_code / "configuration_own.py").write_text("raise AssertionError('was run')")
    assert load_tokenizer(own_code, trust_remote_code=True)("a").input_ids == [1]


def test_code_that_did_not_travel(own_code: Path, tmp_path: Path) -> None:
    path = attach(own_code, tmp_path / "m.qmoe")
    for trusted in (False, True):
        load = partial(qmoe_format.load_tokenizer, path, trust_remote_code=trusted)
        message = refusal(load, "checkpoint")
        assert "tokenization_own.py, which is not there" in message
        assert "convert with --trust-remote-code" in message


def test_a_package_that_the_code_needs(own_code: Path) -> None:
    (own_code / "own_helpers.py").write_text("import no_such_package\n")
    message = refusal(lambda: load_tokenizer(own_code, trust_remote_code=True), "dependency")
    assert "no_such_package" in message


def test_chat_templates_travel(tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    folder = make(tmp_path / "a", "mixtral", None, tokenizer__json=fast_tokenizer())
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {
        "default": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        "tool_use": "{% for m in messages %}<tool>{{ m.content }}{% endfor %}",
    }
    tokenizer.save_pretrained(folder)
    path = attach(folder, tmp_path / "m.qmoe")
    unpacked = qmoe_format.unpack(path, tmp_path / "unpacked")
    again = transformers.AutoTokenizer.from_pretrained(unpacked)
    for loaded in (qmoe_format.load_tokenizer(path), again):
        chat = [{"role": "user", "content": "a"}]
        assert loaded.apply_chat_template(chat, tokenize=False) == "[user]a"
        assert (
            loaded.apply_chat_template(chat, chat_template="tool_use", tokenize=False) == "<tool>a"
        )
