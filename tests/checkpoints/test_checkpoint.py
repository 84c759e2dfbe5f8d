"""Reading Hugging Face folders: what is found in good ones, how bad ones are refused."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from safetensors.torch import load_file, save_file

from qmoe_format.checkpoints import Checkpoint, open_checkpoint
from qmoe_format.checkpoints.torch_dtypes import TORCH_DTYPES, to_storage
from qmoe_format.checkpoints.weight_files import Shard, open_shard
from qmoe_format.dtypes import STORAGE
from tests import refusals

Make = Callable[..., Path]
PREFIX = "encoder.block.1.layer.1.mlp.experts."


def refusal(folder: Path) -> str:
    return refusals.refusal(partial(open_checkpoint, folder), "checkpoint")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_and_stacks_of_every_layout(switch: Make, kind: str, shards: int) -> None:
    kept: dict[str, Any] = {}
    folder = switch(kept.update, kind=kind, shards=shards)
    with open_checkpoint(folder) as checkpoint:
        assert [stack.name for stack in checkpoint.stacks] == [PREFIX + "wi", PREFIX + "wo"]
        wi, wo = checkpoint.stacks
        assert (wi.experts, wi.rows, wi.columns, wi.dtype) == (4, 6, 10, "BF16")
        assert wi.members == PREFIX + "expert_{}.wi.weight"
        assert (wo.rows, wo.columns) == (10, 6)
        assert sorted(checkpoint.others) == sorted(n for n in kept if ".experts." not in n)
        assert list(checkpoint.tensors) == sorted(kept)
        for name, tensor in kept.items():
            assert torch.equal(checkpoint.read(name), tensor)
        for e in range(4):
            assert torch.equal(
                checkpoint.read_expert(wi, e), kept[PREFIX + f"expert_{e}.wi.weight"]
            )
        names = [path.name for path in checkpoint.attachments]
        assert names == ["config.json", "tokenizer_config.json"]


def test_mixtral(mixtral: Path) -> None:
    with open_checkpoint(mixtral) as checkpoint:
        prefix = "model.layers.0.block_sparse_moe.experts."
        names = [stack.name for stack in checkpoint.stacks]
        assert names == [prefix + matrix for matrix in ("w1", "w2", "w3")]
        assert {stack.experts for stack in checkpoint.stacks} == {3}
        assert checkpoint.stacks[0].member(2) == prefix + "2.w1.weight"


@pytest.mark.parametrize(
    ("folder", "stacks", "experts"), [("switch-mini", 8, 16), ("mixtral-mini", 12, 8)]
)
def test_real_checkpoints(shared_data: Path, folder: str, stacks: int, experts: int) -> None:
    with open_checkpoint(shared_data / folder) as checkpoint:
        assert len(checkpoint.stacks) == stacks
        assert {stack.experts for stack in checkpoint.stacks} == {experts}
        assert not any(".experts." in name for name in checkpoint.others)
        assert "lm_head.weight" not in checkpoint.tensors  # tied: not on disk, not invented


def test_reading_much_drops_the_maps(switch: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("safetensors", "bin"):
        folder = switch(kind=kind, name=kind)
        with open_checkpoint(folder) as opened:
            config, tensors = opened.config, opened.tensors
            shard = open_shard(*opened.weight_files)
        released: list[Shard] = []
        monkeypatch.setattr(shard, "release", partial(released.append, shard))
        with Checkpoint(folder, config, [shard], tensors, release_after=500) as checkpoint:
            first = checkpoint.read("shared.weight")
            before = first.clone()
            for name in checkpoint.tensors:
                checkpoint.read(name)
            assert released
            assert torch.equal(first, before)  # a view outlives its handle


def test_every_element_type_keeps_its_bits(tmp_path: Path, switch: Make) -> None:
    bits = torch.arange(64, dtype=torch.uint8)
    extra = {
        f"extra.{name}": (bits % 2).bool() if name == "BOOL" else bits.view(dtype).clone()
        for name, dtype in TORCH_DTYPES.items()
    } | {"extra.scalar": torch.tensor(3.0), "extra.empty": torch.zeros(0, 5)}
    with open_checkpoint(switch(lambda state: state.update(extra))) as checkpoint:
        for name in TORCH_DTYPES:
            array = to_storage(checkpoint.read(f"extra.{name}"))
            assert checkpoint.tensors[f"extra.{name}"].dtype == name
            assert array.dtype == STORAGE[name]
            assert array.tobytes() == extra[f"extra.{name}"].view(torch.uint8).numpy().tobytes()
        assert to_storage(checkpoint.read("extra.scalar")).shape == ()
        assert to_storage(checkpoint.read("extra.empty")).shape == (0, 5)


def test_all_small_files_travel_and_no_weights(switch: Make) -> None:
    folder = switch(shards=2)
    for name in (
        "tokenizer.json",
        "spiece.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
    ):
        (folder / name).write_text("x")
    (folder / ".hidden.json").write_text("x")
    (folder / "directory.json").mkdir()
    with open_checkpoint(folder) as checkpoint:
        assert [path.name for path in checkpoint.attachments] == [
            "chat_template.jinja",
            "config.json",
            "merges.txt",
            "spiece.model",
            "tokenizer.json",
            "tokenizer_config.json",
        ]


def test_a_name_that_cannot_be_attached(switch: Make) -> None:
    folder = switch()
    (folder / "my vocab.txt").write_text("x")
    assert "my vocab.txt" in refusal(folder)


def test_a_huge_text_file_is_no_tokenizer(switch: Make) -> None:
    folder = switch()
    with (folder / "vocab.txt").open("wb") as file:
        file.truncate((1 << 28) + 1)
    assert "vocab.txt" in refusal(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    refusals.refusal(lambda: open_checkpoint(tmp_path / "nowhere"), "not-found")


def test_a_file_is_no_folder(switch: Make) -> None:
    weights = switch() / "model.safetensors"
    said = refusals.refusal(lambda: open_checkpoint(weights), "argument")
    assert "GGUF files cannot be converted" in said


def test_a_folder_of_compressed_experts(switch: Make) -> None:
    quantization = {"quant_method": "qmoe", "file": "experts.qmoe"}
    assert "experts.qmoe" in refusal(switch(config={"quantization_config": quantization}))


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", '{"a":' * 100_000])
def test_config_that_is_no_json(switch: Make, text: str) -> None:
    folder = switch()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(folder)


def test_no_config(switch: Make) -> None:
    folder = switch()
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_config_that_is_no_file(switch: Make) -> None:
    """Reading a pipe, or a link to /dev/zero, would not end."""
    path = switch() / "config.json"
    path.unlink()
    os.mkfifo(path)
    assert "config.json: not a file" in refusal(path.parent)


def test_no_weights(switch: Make) -> None:
    folder = switch()
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_missing_shard(switch: Make, kind: str) -> None:
    folder = switch(kind=kind, shards=3)
    victim = next(folder.glob("*-00002-of-00003.*"))
    victim.unlink()
    assert victim.name in refusal(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 100, -1, -100])
def test_truncated_shard(switch: Make, kind: str, keep: int) -> None:
    folder = switch(kind=kind, shards=3)
    victim = next(folder.glob("*-00002-of-00003.*"))
    victim.write_bytes(victim.read_bytes()[:keep])
    assert victim.name in refusal(folder)


def test_shard_without_a_tensor_of_the_index(switch: Make) -> None:
    folder = switch(shards=2)
    path = folder / "model-00001-of-00002.safetensors"
    state = load_file(path)
    del state["shared.weight"]
    save_file(state, path)
    assert "shared.weight" in refusal(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_index_decides_about_a_tensor_in_two_shards(switch: Make, kind: str) -> None:
    kept: dict[str, Any] = {}
    folder = switch(kept.update, kind=kind, shards=2)
    load, save = (load_file, save_file) if kind == "safetensors" else (torch.load, torch.save)
    paths = sorted(folder.glob("*-of-00002.*"))
    states = [load(path) for path in paths]
    for path, own, other in zip(paths, states, reversed(states), strict=True):
        save({name: torch.zeros_like(tensor) for name, tensor in other.items()} | own, path)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == kept.keys()
        for name, tensor in kept.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_a_tensor_that_the_index_has_elsewhere(switch: Make) -> None:
    folder = switch(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = "shared.weight"
    index["weight_map"][name] = files[1 - files.index(index["weight_map"][name])]
    path.write_text(json.dumps(index))
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "config.json"}, {"a": ".."}],
)
def test_broken_index(switch: Make, weight_map: object) -> None:
    folder = switch(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index.json" in refusal(folder)


def test_control_characters_of_a_name_are_escaped(switch: Make) -> None:
    folder = switch(shards=2)
    weight_map = {"a": "\n\x1b[2J.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert r"\x1b[2J.safetensors: this weight file is missing" in refusal(folder)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model": {"a": torch.zeros(2)}}, {1: 2}])
def test_bin_that_is_no_state_dict(switch: Make, content: object) -> None:
    folder = switch(kind="bin")
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)


def test_bin_that_is_compressed(switch: Make) -> None:
    """Its pickle could expand to a thousand times its size."""
    path = switch(kind="bin") / "pytorch_model.bin"
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            deflated = zipfile.ZIP_DEFLATED if name.endswith(".pkl") else zipfile.ZIP_STORED
            file.writestr(name, content, deflated)
    assert "(it is compressed)" in refusal(path.parent)


def test_bin_that_makes_no_sense_to_torch(switch: Make) -> None:
    path = switch(kind="bin") / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", "3")
        file.writestr("archive/data.pkl", b"\x80\x02ctorch\nFloatStorage\n)\x81.")
    assert "pytorch_model.bin: torch.load cannot map it" in refusal(path.parent)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(1 << 40), torch.empty(1 << 40, device="meta")]
)
def test_bin_with_a_tensor_that_is_larger_than_the_file(switch: Make, tensor: Any) -> None:
    folder = switch(lambda state: state.update(huge=tensor), kind="bin")
    assert "'huge' has fewer elements than its shape" in refusal(folder)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor(switch: Make) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    folder = switch(lambda state: state.update(strange=nested), kind="bin")
    assert "'strange' is of type torch.float32, nested" in refusal(folder)


def test_more_dimensions_than_the_format_has(switch: Make) -> None:
    folder = switch(lambda state: state.update(deep=torch.zeros([1] * 70)))
    assert "'deep' has 70 dimensions" in refusal(folder)


def test_bin_with_code_in_it_is_not_run(switch: Make, tmp_path: Path) -> None:
    folder = switch(kind="bin")
    torch.save({"a": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_bin_of_the_old_kind_is_refused_with_advice(switch: Make) -> None:
    folder = switch(kind="bin")
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "save the model as safetensors" in refusal(folder)
