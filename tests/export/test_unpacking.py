"""Checkpoints from files that ``convert`` does not write, and folders that already exist."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qmoe_format
from qmoe_format.errors import QMoEError
from qmoe_format.export import unpack
from tests.refusals import refusal


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


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("members", ["", "e.{}.w"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 4, 5), (2, 0, 3)])
def test_the_index_alone_says_what_to_transpose(
    tmp_path: Path, shape: tuple[int, ...], members: str, transposed: bool
) -> None:
    """[T-3], whatever is attached."""
    experts = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    path = tmp_path / "model.qmoe"
    with qmoe_format.Writer(path) as writer:
        writer.add_attachment("config.json", b'{"model_type": "gpt_oss"')
        with writer.add_stack("e", shape, "F32", "raw", members, transposed=transposed) as stack:
            for expert in experts:
                stack.append(expert)
    file = unpack(path, tmp_path / "unpacked") / "model-00001-of-00001.safetensors"
    tensors = pytest.importorskip("safetensors.numpy").load_file(file)
    expected = experts.mT if transposed else experts
    stacks = {f"e.{number}.w": each for number, each in enumerate(expected)}
    for name, tensor in (stacks if members else {"e": expected}).items():
        np.testing.assert_array_equal(tensors.pop(name), tensor, strict=True)
    assert not tensors


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(fused: Path, tmp_path: Path) -> None:
    folder = unpack(fused, tmp_path / "unpacked", shard_bytes=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(list(folder.glob("*.safetensors"))) == len(set(index["weight_map"].values())) == 5


def test_an_empty_folder_is_used_and_others_are_not(fused: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert unpack(fused, folder) == folder
    before = sorted(path.name for path in folder.iterdir())
    refusal(lambda: unpack(fused, folder), "argument")
    assert sorted(path.name for path in folder.iterdir()) == before
    refusal(lambda: unpack(fused, tmp_path / "no" / "where"), "not-found")


def test_the_current_folder(fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    unpack(fused, ".")
    assert (folder / "config.json").is_file()


def test_a_folder_that_cannot_be_written(fused: Path, tmp_path: Path) -> None:
    refusal(lambda: unpack(fused, tmp_path / ("long" * 100)), "io")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_interrupted(fused: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, total: int, stage: str = "") -> None:
        if done > 20:
            raise error

    before = sorted(tmp_path.iterdir())
    with pytest.raises(QMoEError if error is OSError else error):
        unpack(fused, tmp_path / "unpacked", shard_bytes=1, progress=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_damage_leaves_nothing(fused: Path, tmp_path: Path) -> None:
    data = bytearray(fused.read_bytes())
    data[64 + 1] ^= 1
    bad = tmp_path / "bad.qmoe"
    bad.write_bytes(data)
    refusal(lambda: unpack(bad, tmp_path / "unpacked"), "checksum")
    assert sorted(tmp_path.iterdir()) == sorted([fused, bad])


def test_names_that_would_collide(tmp_path: Path) -> None:
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
        refusal(partial(unpack, path, tmp_path / "unpacked"), "duplicate")
        assert not (tmp_path / "unpacked").exists()
        assert not list(tmp_path.glob(".*"))
