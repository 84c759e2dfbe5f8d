"""Unpacking what conversions do not make, and folders that are in the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format
from qmoe_format.codec import encode_matrix
from qmoe_format.errors import QMoEError
from qmoe_format.export.unpacking import unpack


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """A stack that was one tensor, tensors of many sizes of elements, and a scalar."""
    path = tmp_path / "fused.qmoe"
    with qmoe_format.Writer(path) as writer:
        writer.add_attachment("config.json", b"{}")
        writer.add_tensor("a.scalar", np.array(7, np.int64), "I64")
        writer.add_tensor("b.bytes", np.arange(5, dtype=np.uint8), "U8")
        writer.add_tensor("c.halves", np.arange(3, dtype=np.uint16), "BF16")
        writer.add_tensor("d.empty", np.zeros((0, 3), np.float32), "F32")
        with writer.add_stack("e.experts", (2, 2, 3), "F32", "zstd") as stack:
            for e in range(2):
                stack.append(np.full((2, 3), e, np.float32))
    return path


def test_all_elements_are_aligned_and_the_library_reads_them(fused: Path, tmp_path: Path) -> None:
    folder = unpack(fused, tmp_path / "unpacked")
    path = folder / "model-00001-of-00001.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    sizes = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0
    tensors = pytest.importorskip("safetensors.torch").load_file(path)
    assert tensors["a.scalar"].item() == 7
    assert tensors["b.bytes"].tolist() == [0, 1, 2, 3, 4]
    assert tensors["d.empty"].shape == (0, 3)
    assert tensors["e.experts"].tolist() == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]


def test_experts_in_one_tensor_need_a_config_that_can_be_read(tmp_path: Path) -> None:
    """It alone says whether they have to be transposed."""
    path = tmp_path / "broken.qmoe"
    with qmoe_format.Writer(path) as writer:
        writer.add_attachment("config.json", b'{"model_type": "gpt_oss"')
        with writer.add_stack("experts", (1, 2, 3), "F32", "zstd") as stack:
            stack.append(np.zeros((2, 3), np.float32))
    with pytest.raises(QMoEError, match="not JSON") as error:
        unpack(path, tmp_path / "unpacked")
    assert error.value.code == "checkpoint"
    assert not (tmp_path / "unpacked").exists()


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(fused: Path, tmp_path: Path) -> None:
    folder = unpack(fused, tmp_path / "unpacked", shard_bytes=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(list(folder.glob("*.safetensors"))) == len(set(index["weight_map"].values())) == 5


def test_an_empty_folder_is_used_and_others_are_not(fused: Path, tmp_path: Path, qmoe: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert qmoe("unpack", fused, folder).code == 0
    before = sorted(path.name for path in folder.iterdir())
    done = qmoe("unpack", fused, folder)
    assert done.code == 1
    assert done.err.startswith("error[argument]: ")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert qmoe("unpack", fused, tmp_path / "no" / "where").err.startswith("error[not-found]: ")


def test_the_folder_one_is_in(
    fused: Path, tmp_path: Path, qmoe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert qmoe("unpack", fused, ".").code == 0
    assert (folder / "config.json").is_file()


def test_a_folder_that_cannot_be_written(fused: Path, tmp_path: Path, qmoe: Any) -> None:
    folder = tmp_path / ("long" * 100)
    done = qmoe("unpack", fused, folder)
    assert done.code == 1
    assert done.err.startswith("error[io]: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_interrupted(fused: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        if done > 20:
            raise error

    before = sorted(tmp_path.iterdir())
    with pytest.raises(QMoEError if error is OSError else error):
        unpack(fused, tmp_path / "unpacked", shard_bytes=1, progress=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_damage_leaves_nothing(fused: Path, tmp_path: Path, qmoe: Any) -> None:
    data = bytearray(fused.read_bytes())
    with qmoe_format.open(fused) as file:
        assert file.read("b.bytes").tolist() == [0, 1, 2, 3, 4]
    data[64 + 1] ^= 1
    bad = tmp_path / "bad.qmoe"
    bad.write_bytes(data)
    done = qmoe("unpack", bad, tmp_path / "unpacked")
    assert done.code == 1
    assert done.err.startswith("error[checksum]: ")
    assert sorted(tmp_path.iterdir()) == sorted([fused, bad])


def test_names_that_would_collide(tmp_path: Path, qmoe: Any) -> None:
    one = np.zeros((1, 1), np.float32)

    def tensor_like_a_member(writer: Any) -> None:
        writer.add_tensor("x.1.w", one, "F32")
        with writer.add_stack("x.w", (2, 1, 1), "F32", "raw", "x.{}.w") as stack:
            stack.append(one)
            stack.append(one)

    def metadata(writer: Any) -> None:
        writer.add_tensor("__metadata__", one, "F32")

    def index_attached(writer: Any) -> None:
        writer.add_attachment("model.safetensors.index.json", b"{}")

    def weights_attached(writer: Any) -> None:
        writer.add_tensor("a", one, "F32")
        writer.add_attachment("model-00001-of-00001.safetensors", b"{}")

    for number, fill in enumerate(
        [tensor_like_a_member, metadata, index_attached, weights_attached]
    ):
        path = tmp_path / f"{number}.qmoe"
        with qmoe_format.Writer(path) as writer:
            fill(writer)
        done = qmoe("unpack", path, tmp_path / "unpacked")
        assert done.code == 1
        assert done.err.startswith("error[duplicate]: "), done.err
        assert not (tmp_path / "unpacked").exists()
        assert not list(tmp_path.glob(".*"))


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """Shards: two stacks, one of them ternary, and what is none."""
    path = tmp_path / "layer.qmoe.json"
    scales = np.full((3, 1, 2), [0xBF80, 0x3F80], np.uint16)
    with qmoe_format.Writer(path, shard_bytes=1) as writer:
        writer.add_attachment("config.json", b'{"model_type": "mixtral"}')
        writer.add_attachment("tokenizer.json", b"{}")
        writer.add_tensor("norm", np.array([0x3F80, 0x4000], np.uint16), "BF16")
        with writer.add_stack("w1", (2, 3, 3), "F32", "ternary-dict", "e.{}.w1") as stack:
            for e in range(2):
                stack.append(encode_matrix(np.roll(np.eye(3, dtype=np.int8), e, 0), scales))
        with writer.add_stack("w2", (2, 3, 64), "F32", "zstd") as stack:
            for e in range(2):
                stack.append(np.full((3, 64), e, np.float32))
    return path


def test_compressed(layer: Path, tmp_path: Path, qmoe: Any) -> None:
    folder = tmp_path / "folder"
    done = qmoe("unpack", layer, folder, "--compressed")
    assert done.code == 0, done.err
    assert "after import qmoe_format.runtime" in done.out
    names = ["config.json", "experts.qmoe", "model.dense.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert config["quantization_config"] == {"quant_method": "qmoe", "file": "experts.qmoe"}
    assert not config["transformers_weights"].endswith((".safetensors", ".json"))
    with qmoe_format.open(layer) as before, qmoe_format.open(folder / "experts.qmoe") as after:
        after.verify()
        assert list(after.tensors) == ["w1", "w2"]
        assert after.attachment("config.json") == before.attachment("config.json")
        for name, entry in after.tensors.items():
            known = before.tensors[name]
            assert (entry.encoding, entry.members) == (known.encoding, known.members)
            assert (entry.parameters, entry.stored_bytes) == (known.parameters, known.stored_bytes)
            for e in range(2):
                assert np.array_equal(after.read_expert(name, e), before.read_expert(name, e))
    path = folder / "model.dense.safetensors"
    tensors = pytest.importorskip("safetensors.torch").load_file(path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"norm": [1.0, 2.0]}


def test_compressed_needs_no_optional_package(layer: Path, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, safetensors=None);"
    call = "import qmoe_format; qmoe_format.unpack(*sys.argv[1:], compressed=True)"
    folder = str(tmp_path / "folder")
    subprocess.run([sys.executable, "-c", blocked + call, str(layer), folder], check=True)


def test_compressed_progress_ends_with_all_bytes(layer: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    unpack(layer, tmp_path / "folder", compressed=True, progress=lambda *at: seen.append(at))
    assert len(seen) == 5
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == 4 + sum(stored_bytes(layer))


def stored_bytes(path: Path) -> list[int]:
    with qmoe_format.open(path) as file:
        return [entry.stored_bytes for entry in file.tensors.values() if entry.stack]


def test_compressed_without_a_configuration(tmp_path: Path, qmoe: Any) -> None:
    for number, attached in enumerate([None, b"{", b"[]"]):
        path = tmp_path / f"{number}.qmoe"
        with qmoe_format.Writer(path) as writer:
            if attached is not None:
                writer.add_attachment("config.json", attached)
        done = qmoe("unpack", path, tmp_path / "folder", "--compressed")
        assert done.code == 1
        assert done.err.startswith(f"error[{'checkpoint' if attached else 'not-found'}]: "), done
        assert "config.json" in done.err
        assert not (tmp_path / "folder").exists()
        assert not list(tmp_path.glob(".*"))


def test_compressed_names_that_would_collide(tmp_path: Path, qmoe: Any) -> None:
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
        done = qmoe("unpack", path, tmp_path / "folder", "--compressed")
        assert done.code == 1
        assert done.err.startswith("error[duplicate]: "), done.err
        assert not (tmp_path / "folder").exists()
