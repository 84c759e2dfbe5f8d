"""Folders with compressed experts: ``from_pretrained`` and ``save_pretrained``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import qmoe_format
from qmoe_format import load_model
from qmoe_format.container.preamble import Preamble
from qmoe_format.runtime import QMoEConfig
from tests.refusals import refusal
from tests.runtime.conftest import Converted
from tests.runtime.models import from_pretrained, generated, logits
from tests.tiny_models import save_model

WITHOUT_IMPORT = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
results = []
for path in map(Path, sys.argv[1:]):
    sparse = json.loads((path / "config.json").read_text())["model_type"]
    kind = AutoModelForSeq2SeqLM if sparse.startswith("switch") else AutoModelForCausalLM
    for options in ({}, {"ignore_mismatched_sizes": True}):
        try:
            kind.from_pretrained(path, **options)
            results.append("loaded")
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copied(model: Converted, tmp_path: Path) -> Path:
    return shutil.copytree(model.folder, tmp_path / "copied")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def stored(path: Path) -> dict[str, list[bytes]]:
    """The segments of every expert of every stack."""
    with qmoe_format.open(path) as file:
        return {
            name: [
                file.encoded(name, e).levels.mask.segments.tobytes() for e in range(entry.shape[0])
            ]
            for name, entry in file.tensors.items()
            if entry.stack
        }


def test_what_is_in_it(model: Converted) -> None:
    with qmoe_format.open(model.file) as file, qmoe_format.open(model.folder / "experts.qmoe") as e:
        e.verify()
        stacks = {name: entry for name, entry in file.tensors.items() if entry.stack}
        assert e.tensors.keys() == stacks.keys()
        for name, entry in stacks.items():
            assert e.tensors[name].stored_bytes == entry.stored_bytes
            assert e.tensors[name].members == entry.members
        assert e.attachment("config.json") == file.attachment("config.json")
        dense = load_file(model.folder / "model.dense.safetensors")
        assert dense.keys() == file.tensors.keys() - stacks.keys()
        assert {path.name for path in model.folder.iterdir()} == {
            *file.attachments,
            "experts.qmoe",
            "model.dense.safetensors",
        }
    assert stored(model.file) == stored(model.folder / "experts.qmoe")


def test_same_model_as_from_the_file(model: Converted) -> None:
    loaded = from_pretrained(model.folder)
    expected = load_model(model.file)
    assert torch.equal(logits(loaded), logits(expected))
    assert generated(loaded) == generated(expected)
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    assert AutoTokenizer.from_pretrained(model.folder)("w3 w5").input_ids == [6, 8]


def test_without_the_import_loading_ends_in_an_error(
    converted: Callable[[str], Converted], tmp_path: Path
) -> None:
    """Even where transformers ignores ``transformers_weights``, or it names another file."""
    folders = []
    for model_type in ("switch_transformers", "mixtral"):
        folder = converted(model_type).folder
        folders.append(folder)
        for name, weights in (("unmarked", None), ("named", "other.safetensors")):
            changed = shutil.copytree(folder, tmp_path / f"{model_type}-{name}")
            config = config_of(folder) | {"transformers_weights": weights}
            (changed / "config.json").write_text(json.dumps(config))
            folders.append(changed)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    results = json.loads(done.stdout)
    assert len(results) == 2 * len(folders)
    assert "loaded" not in results
    for number, folder in enumerate(folders):
        if folder.parent != tmp_path:
            assert "import qmoe_format.runtime" in results[2 * number]
            assert "import qmoe_format.runtime" in results[2 * number + 1]


@pytest.mark.parametrize("source", ["file", "folder"])
def test_round_trip(model: Converted, tmp_path: Path, source: str) -> None:
    loaded = load_model(model.file) if source == "file" else from_pretrained(model.folder)
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "saved")
    saved = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved), expected)
    assert stored(tmp_path / "saved" / "experts.qmoe") == stored(model.file)
    marks = ("quantization_config", "transformers_weights", "model_type", "architectures")
    before, after = config_of(model.folder), config_of(tmp_path / "saved")
    assert [after[key] for key in marks] == [before[key] for key in marks]
    assert not list((tmp_path / "saved").glob("model*.safetensors*.json"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    dense = load_file(tmp_path / "saved" / "model.dense.safetensors")
    assert dense.keys() == load_file(model.folder / "model.dense.safetensors").keys()

    # into the folder it came from, and from there on
    saved.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved), expected)
    again = from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again", max_shard_size="1KB", variant="other")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), expected)


def test_what_was_trained_is_saved(model: Converted, tmp_path: Path) -> None:
    loaded = load_model(model.file)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(1.5)
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(loaded))
    assert not torch.equal(logits(loaded), logits(load_model(model.file)))


def test_only_the_main_process_writes_experts(model: Converted, tmp_path: Path) -> None:
    load_model(model.file).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not list((tmp_path / "saved").iterdir())


def test_pushing_while_saving_is_refused(model: Converted, tmp_path: Path) -> None:
    loaded = load_model(model.file)
    message = refusal(lambda: loaded.save_pretrained(tmp_path / "x", push_to_hub=True), "argument")
    assert "push_to_hub" in message


def test_pushing_uploads_the_whole_folder(
    model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(model.file)
    uploaded = {}

    def upload(self: Any, folder: str, *arguments: Any, **options: Any) -> None:
        uploaded.update({path.name: path.stat().st_size for path in Path(folder).iterdir()})

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **o: Card())
    loaded.push_to_hub("someone/some-model")
    assert {"config.json", "experts.qmoe", "model.dense.safetensors"} <= uploaded.keys()


class Card:
    def save(self, path: str) -> None:
        pass


def test_from_a_hub(model: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers downloads only the files that it knows."""
    repository = tmp_path / "models--someone--some-model"
    snapshot = shutil.copytree(model.folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "experts.qmoe").unlink()
    asked = []

    def fetch(name: str, file: str, **options: Any) -> None:
        asked.append((name, file, options["revision"], options["cache_dir"]))
        shutil.copy(model.folder / file, snapshot)

    monkeypatch.setattr("qmoe_format.runtime.plugin.cached_file", fetch)
    kind = type(load_model(model.file))
    options = {"cache_dir": tmp_path, "local_files_only": True}
    for _ in range(2):  # downloaded, and from the cache
        loaded = kind.from_pretrained("someone/some-model", **options)
        assert torch.equal(logits(loaded), logits(load_model(model.file)))
        assert asked == [("someone/some-model", "experts.qmoe", COMMIT, tmp_path)]


def test_a_folder_without_its_experts(copied: Path) -> None:
    (copied / "experts.qmoe").unlink()
    assert "experts.qmoe" in refusal(lambda: from_pretrained(copied), "not-found")


def test_damaged_experts(copied: Path) -> None:
    path = copied / "experts.qmoe"
    data = bytearray(path.read_bytes())
    data[64::64] = bytes(each ^ 1 for each in data[64::64])
    index = Preamble.parse(bytes(data[:64]), len(data)).index_offset
    path.write_bytes(data[:index] + path.read_bytes()[index:])
    loaded = from_pretrained(copied)
    refusal(lambda: logits(loaded), "checksum")


def test_a_tensor_that_is_missing(copied: Path) -> None:
    path = copied / "model.dense.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "norm" in name)
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    assert gone in refusal(lambda: from_pretrained(copied), "checkpoint")


def test_other_checkpoints_are_not_compressed_while_loading(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "checkpoint", "mixtral")
    with pytest.raises(ValueError, match="pre-quantized"):
        from_pretrained(folder, quantization_config=QMoEConfig())
    assert from_pretrained(folder).model.layers[0].mlp.experts.gate_up_proj.ndim == 3
