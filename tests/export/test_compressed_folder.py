"""The folder with compressed experts: what is in it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format
from qmoe_format.codec import encode_matrix
from qmoe_format.export import unpack
from tests.refusals import refusal


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """Shards: two stacks, one of them int-dict, and another tensor."""
    path = tmp_path / "layer.qmoe.json"
    scales = np.full((3, 2), [0xBF80, 0x3F80], np.uint16)
    with qmoe_format.Writer(path, shard_bytes=1) as writer:
        writer.add_attachment("config.json", b'{"model_type": "mixtral"}')
        writer.add_attachment("tokenizer.json", b"{}")
        writer.add_tensor("norm", np.array([0x3F80, 0x4000], np.uint16), "BF16")
        with writer.add_stack("w1", (2, 3, 3), "F32", "int-dict", "e.{}.w1") as stack:
            for e in range(2):
                stack.append(encode_matrix(np.roll(np.eye(3, dtype=np.int8), e, 0), scales))
        with writer.add_stack("w2", (2, 3, 64), "F32", "zstd", transposed=True) as stack:
            for e in range(2):
                stack.append(np.full((3, 64), e, np.float32))
    return path


def test_contents(layer: Path, tmp_path: Path) -> None:
    folder = unpack(layer, tmp_path / "folder", compressed=True)
    names = ["config.json", "experts.qmoe", "model.dense.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert config["quantization_config"] == {"quant_method": "qmoe", "file": "experts.qmoe"}
    assert not config["transformers_weights"].endswith((".safetensors", ".json"))
    with qmoe_format.open(layer) as before, qmoe_format.open(folder / "experts.qmoe") as after:
        after.verify()
        assert [entry.transposed for entry in after.tensors.values()] == [False, True]
        assert list(after.tensors) == ["w1", "w2"]
        assert after.attachment("config.json") == before.attachment("config.json")
        for name, entry in after.tensors.items():
            known = before.tensors[name]
            assert entry == replace(known, extent=entry.extent)
            for e in range(2):
                assert np.array_equal(after.read_expert(name, e), before.read_expert(name, e))
    path = folder / "model.dense.safetensors"
    tensors = pytest.importorskip("safetensors.torch").load_file(path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"norm": [1.0, 2.0]}


@pytest.mark.parametrize("compressed", [False, True])
def test_needs_no_optional_package(layer: Path, tmp_path: Path, compressed: bool) -> None:
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, safetensors=None);"
    call = f"import qmoe_format; qmoe_format.unpack(*sys.argv[1:], compressed={compressed});"
    unknown = "assert 'qmoe_format.checkpoints' not in sys.modules"  # no model family
    folder = str(tmp_path / "folder")
    subprocess.run([sys.executable, "-c", blocked + call + unknown, str(layer), folder], check=True)


def test_progress_ends_with_all_bytes(layer: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    unpack(layer, tmp_path / "folder", compressed=True, progress=lambda *at: seen.append(at))
    assert len(seen) == 5
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == 4 + sum(stored_bytes(layer))


def stored_bytes(path: Path) -> list[int]:
    with qmoe_format.open(path) as file:
        return [entry.stored_bytes for entry in file.tensors.values() if entry.stack]


def test_without_a_configuration(tmp_path: Path) -> None:
    for number, attached in enumerate([None, b"{", b"[]"]):
        path = tmp_path / f"{number}.qmoe"
        with qmoe_format.Writer(path) as writer:
            if attached is not None:
                writer.add_attachment("config.json", attached)
        code = "checkpoint" if attached else "not-found"
        call = partial(unpack, path, tmp_path / "folder", compressed=True)
        assert "config.json" in refusal(call, code)
        assert not (tmp_path / "folder").exists()
        assert not list(tmp_path.glob(".*"))


def test_other_weights_that_are_quantized(tmp_path: Path) -> None:
    """Transformers would take their codes for numbers."""
    with qmoe_format.Writer(tmp_path / "m.qmoe") as writer:
        writer.add_attachment("config.json", b'{"quantization_config": {"quant_method": "fp8"}}')
    call = partial(unpack, tmp_path / "m.qmoe", tmp_path / "folder", compressed=True)
    assert "--keep-native" in refusal(call, "argument")
    assert not (tmp_path / "folder").exists()
    unpack(tmp_path / "m.qmoe", tmp_path / "folder")


def test_names_that_would_collide(tmp_path: Path) -> None:
    def tensor(writer: Any) -> None:
        writer.add_tensor("__metadata__", np.zeros(1, np.float32), "F32")

    def dense(writer: Any) -> None:
        writer.add_attachment("model.dense.safetensors", b"{}")

    def experts(writer: Any) -> None:
        writer.add_attachment("experts.qmoe", b"{}")

    for number, fill in enumerate([tensor, dense, experts]):
        path = tmp_path / f"{number}.qmoe"
        with qmoe_format.Writer(path) as writer:
            writer.add_attachment("config.json", b"{}")
            fill(writer)
        refusal(partial(unpack, path, tmp_path / "folder", compressed=True), "duplicate")
        assert not (tmp_path / "folder").exists()
