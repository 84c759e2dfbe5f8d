"""Which files of a checkpoint travel, and that they are where they were after ``unpack``."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest

import qmoe_format
from qmoe_format.checkpoints.attachments import find_attachments, tokenizer_code
from qmoe_format.container.attachment_files import (
    TEMPLATE_FOLDER,
    attached_files,
    attachment_name,
    file_path,
)
from tests.refusals import refusal

TRAVEL = [
    "LICENSE",
    "LICENSE-MODEL.md",
    "Notice.txt",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
]
STAY = [
    ".hidden.json",
    ".vocab.json",
    "README.md",
    "additional_chat_templates/README.md",
    "all_results.json",
    "corpus.txt",
    "model.safetensors.index.json",
    "notes about the data.txt",
    "other/tokenizer.json",
    "quality.json",
    "tokenization_own.py",
    "tokenizer.quality.json",
    "train.txt",
    "trainer_state.json",
    "training_args.bin",
]


def write(folder: Path, *names: str, content: str = "{}") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def found(folder: Path, **options: bool) -> list[str]:
    paths = find_attachments(folder, **options)
    return [path.relative_to(folder).as_posix() for path in paths]


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_what_from_pretrained_reads_travels_and_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path, *TRAVEL, *STAY)
    (folder / "vocab.d.json").mkdir()
    assert found(folder) == TRAVEL


def test_the_vocabularies_of_all_classes_travel(tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
    families = ("switch_transformers", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "llama")
    classes = [auto.TOKENIZER_MAPPING_NAMES.get(family) for family in families]
    kinds = [auto.tokenizer_class_from_name(name) for name in (*classes, "GPT2Tokenizer") if name]
    read = {name for kind in kinds if kind for name in kind.vocab_files_names.values()}
    assert len(read) > 4
    assert found(write(tmp_path, *read)) == sorted(read)


def test_there_and_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number, name in enumerate(TRAVEL):
        write(source, name, content=f"{number}")
    with qmoe_format.Writer(tmp_path / "m.qmoe") as writer:
        for path in find_attachments(source):
            writer.add_attachment(attachment_name(path.relative_to(source)), path.read_bytes())
    folder = qmoe_format.unpack(tmp_path / "m.qmoe", tmp_path / "unpacked")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").unlink()
    with qmoe_format.open(tmp_path / "m.qmoe") as file, attached_files(file) as temporary:
        for copy in (folder, temporary):
            assert names(copy) == TRAVEL
            assert all((copy / name).read_text() == (source / name).read_text() for name in TRAVEL)


@pytest.mark.parametrize(
    "name", ["additional_chat_templates--..", "additional_chat_templates--", "a--b.jinja", "--"]
)
def test_no_other_name_leads_elsewhere(name: str) -> None:
    assert file_path(name) == PurePosixPath(name)


def test_names_that_cannot_be_attached(tmp_path: Path) -> None:
    message = refusal(lambda: find_attachments(write(tmp_path, "LICENSE (1)")), "checkpoint")
    assert "LICENSE (1)" in message
    assert "rename" in message
    folder = write(tmp_path / "b", "additional_chat_templates/käse.jinja")
    assert "käse.jinja" in refusal(lambda: find_attachments(folder), "checkpoint")


def test_a_link_to_a_device(tmp_path: Path) -> None:
    """Some tokenizers would read it without end."""
    (tmp_path / "tekken.json").symlink_to("/dev/zero")
    message = refusal(lambda: find_attachments(tmp_path), "checkpoint")
    assert "tekken.json: not an ordinary file" in message


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "vocab.txt").open("wb") as file:
        file.truncate((1 << 28) + 1)
    message = refusal(lambda: find_attachments(tmp_path), "checkpoint")
    assert "vocab.txt: 268,435,457 bytes" in message


def test_a_file_that_git_lfs_did_not_fetch(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    folder = write(tmp_path, "config.json", "tokenizer.json")
    write(folder, "tokenizer.model", content=pointer)
    message = refusal(lambda: find_attachments(folder), "checkpoint")
    assert "tokenizer.model" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/a.jinja"])
def test_a_link_to_nothing(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "config.json") / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "blob")
    message = refusal(lambda: find_attachments(tmp_path), "checkpoint")
    assert f"{path}: a link" in message
    (tmp_path / "blob").write_text("{}")
    assert found(tmp_path) == sorted(["config.json", name])


def test_code_travels_if_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("tokenization_own", "helpers", "more_helpers", "modeling_own", "unused", "deep"):
        write(tmp_path, f"{name}.py", content="import json\n")
    write(tmp_path, "tokenization_own.py", content="from .helpers import a\nfrom . import deep\n")
    write(tmp_path, "helpers.py", content="if True:\n    from .more_helpers import a\n")
    write(tmp_path, "more_helpers.py", content="from .helpers import a\nfrom .absent import a")
    write(tmp_path, "broken.py", content="def")
    write(tmp_path.parent, "outside.py")
    own = {"AutoTokenizer": ["broken.Slow", "tokenization_own.Own"]}
    write(tmp_path, "tokenizer_config.json", content=json.dumps({"auto_map": own}))
    model = {
        "AutoConfig": "org/other--configuration_other.Other",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoModel": "../outside.Own",
    }
    write(tmp_path, "config.json", content=json.dumps({"auto_map": model}))
    assert found(tmp_path) == ["config.json", "tokenizer_config.json"]
    code = ["broken", "deep", "helpers", "modeling_own", "more_helpers", "tokenization_own"]
    assert [name for name in found(tmp_path, code=True) if name.endswith(".py")] == [
        f"{name}.py" for name in code
    ]


@pytest.mark.parametrize(
    ("auto_map", "expected"),
    [
        ({"AutoTokenizer": ["a.A", "b.B"]}, "b.py"),
        ({"AutoTokenizer": ["a.A", None]}, "a.py"),
        ({"AutoTokenizer": "a.A"}, "a.py"),
        (["a.A", None], "a.py"),  # as it once was
        ({"AutoTokenizer": ["org/name--a.A", None]}, "org/name--a.py"),
        ({"AutoProcessor": "a.A"}, None),
        (None, None),
    ],
)
def test_where_a_tokenizer_is_code(tmp_path: Path, auto_map: object, expected: str | None) -> None:
    write(tmp_path, "tokenizer_config.json", content=json.dumps({"auto_map": auto_map}))
    assert tokenizer_code(tmp_path) == expected


def test_an_attachment_with_the_name_of_a_folder(tmp_path: Path) -> None:
    with qmoe_format.Writer(tmp_path / "m.qmoe") as writer:
        for name in (TEMPLATE_FOLDER, f"{TEMPLATE_FOLDER}--rag.jinja"):
            writer.add_attachment(name, b"")
    with qmoe_format.open(tmp_path / "m.qmoe") as file:
        message = refusal(lambda: attached_files(file).__enter__(), "duplicate")
    assert TEMPLATE_FOLDER in message
    refusal(lambda: qmoe_format.unpack(tmp_path / "m.qmoe", tmp_path / "out"), "duplicate")
    assert [path.name for path in tmp_path.iterdir()] == ["m.qmoe"]
