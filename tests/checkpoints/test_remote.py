"""Checkpoints at URLs: the same tensors as here, and no more of them than is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
pytest.importorskip("fsspec", reason="needs the extra 'remote'")
import fsspec
import torch
from torch import Tensor

from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.checkpoints.weight_files import open_shard
from qmoe_format.errors import QMoEError
from qmoe_format.remote import RemotePath
from tests.conftest import MIXTRAL, copy_elsewhere, random_state, write_checkpoint
from tests.refusals import refusal

Make = Callable[..., Path]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each request asked for."""
    lengths: list[int] = []
    method = RemotePath.read

    def noting(self: RemotePath, offset: int, length: int) -> bytes:
        lengths.append(length)
        return method(self, offset, length)

    monkeypatch.setattr(RemotePath, "read", noting)
    return lengths


def bits(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_as_here(switch: Make, elsewhere: str, shards: int) -> None:
    def extra(state: dict[str, Tensor]) -> None:
        state |= {
            "extra.scalar": torch.tensor(3.5),
            "extra.empty": torch.empty(0, 5),
            "extra.flags": torch.tensor([True, False]),
            "extra.scale": torch.full((2,), 2.0).to(torch.float8_e8m0fnu),
        }

    folder = switch(extra, shards=shards)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "README.md").write_text("no")
    (folder / "code.py").write_text("")
    url = copy_elsewhere(folder, elsewhere)
    with open_checkpoint(folder) as here, open_checkpoint(url) as there:
        assert there.tensors == here.tensors
        for name in here.tensors:
            ours, theirs = there.read(name), here.read(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert bits(ours) == bits(theirs)
        for stack in here.stacks:
            for expert in range(stack.experts):
                assert there.read_expert(stack, expert).equal(here.read_expert(stack, expert))
        names = [[p.relative_to(c.folder) for p in c.attachments] for c in (here, there)]
        assert names[0] == names[1]
        there.check_complete()
        copies = there.folder
        assert not list(copies.glob("*.safetensors"))
    assert not copies.exists()


def test_an_expert_of_a_fused_tensor_is_one_request(elsewhere: str, read: list[int]) -> None:
    memory = fsspec.filesystem("memory")
    state = random_state(MIXTRAL, new_names=True)
    from safetensors.torch import save

    memory.pipe_file("/elsewhere/config.json", json.dumps(MIXTRAL).encode())
    memory.pipe_file("/elsewhere/model.safetensors", save(state))
    with open_checkpoint(elsewhere) as checkpoint:
        assert read[0] == 8
        assert len(read) == 2, "the header is read once"
        (fused,) = [stack for stack in checkpoint.stacks if stack.name.endswith("down_proj")]
        assert not fused.members
        name = fused.member(0)
        for expert in range(fused.experts):
            read.clear()
            assert checkpoint.read_expert(fused, expert).equal(state[name][expert])
            assert read == [4 * fused.rows * fused.columns]


def test_quantized_experts(elsewhere: str, tmp_path: Path, read: list[int]) -> None:
    """Codes and scales of one expert, each by one request; a scale for all of them, too."""
    e4m3 = torch.float8_e4m3fn
    state = random_state(MIXTRAL, new_names=True)
    fused = {name: tensor for name, tensor in state.items() if tensor.ndim == 3}
    state |= {name: tensor.to(e4m3) for name, tensor in fused.items()}
    state |= {
        f"{name}_scale_inv": torch.rand(len(tensor), 1, 1) if "down" in name else torch.rand(1)
        for name, tensor in fused.items()
    }
    config = MIXTRAL | {"quantization_config": {"quant_method": "fp8"}}
    folder = write_checkpoint(tmp_path / "fp8", state, config)
    url = copy_elsewhere(folder, elsewhere)
    with open_checkpoint(folder) as here, open_checkpoint(url) as there:
        assert len(there.packed) == len(fused) == 2
        for stack in here.stacks:
            for expert in range(stack.experts):
                read.clear()
                ours = there.read_expert(stack, expert)
                assert sorted(read) == [4, stack.rows * stack.columns]
                assert ours.equal(here.read_expert(stack, expert))
        for name in here.packed:
            assert there.read(name).equal(here.read(name))


def test_what_cannot_be_read(switch: Make, elsewhere: str) -> None:
    url = copy_elsewhere(switch(kind="bin"), f"{elsewhere}/bin")
    assert "only safetensors" in refusal(lambda: open_checkpoint(url), "checkpoint")
    assert "no such folder" in refusal(lambda: open_checkpoint(f"{elsewhere}/no"), "not-found")
    message = refusal(lambda: open_checkpoint(f"{url}/config.json"), "argument")
    assert f"{url}/config.json: is a file" in message
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/elsewhere/other/README.md", b"")
    message = refusal(lambda: open_checkpoint(f"{elsewhere}/other"), "checkpoint")
    assert f"{elsewhere}/other/config.json: missing" in message


def test_messages_name_the_url(
    switch: Make, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = copy_elsewhere(
        switch(lambda state: state.pop("encoder.final_layer_norm.weight")), elsewhere
    )
    with open_checkpoint(url) as checkpoint:
        message = refusal(checkpoint.check_complete, "checkpoint")
    assert message.startswith(f"{url}: ")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/elsewhere/a\\b.model", b"")
    message = refusal(lambda: open_checkpoint(url), "checkpoint")
    assert message.startswith(f"{url}/a")
    assert "characters other than" in message
    memory.rm("/elsewhere/a\\b.model")
    monkeypatch.setattr("qmoe_format.checkpoints.attachments.MAX_BYTES", 5)
    message = refusal(lambda: open_checkpoint(url), "checkpoint")
    assert message.startswith(f"{url}/config.json: ")


def test_the_connection_breaks(
    switch: Make, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = copy_elsewhere(switch(), elsewhere)
    with open_checkpoint(url) as checkpoint:

        def broken(*_: object, **__: object) -> bytes:
            raise ConnectionResetError("reset by peer")

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", broken)
        message = refusal(lambda: checkpoint.read("shared.weight"), "io")
    assert f"cannot read {url}/model.safetensors: reset by peer" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": {"data_offsets": [8, 16]}}, "begins at byte"),
        ({"b": {"data_offsets": [0, 8]}}, "begins at byte"),
        ({"b": {"data_offsets": [8, 12]}}, "has 4 bytes, not those of F32 [2]"),
        ({"b": {"shape": [3]}}, "has 8 bytes, not those of F32 [3]"),
        ({"b": {"shape": [2, 1.0]}}, "the entry of 'b' is wrong"),
        ({"b": {"shape": [-2, -1]}}, "the entry of 'b' is wrong"),
        ({"b": {"shape": [True, 2]}}, "the entry of 'b' is wrong"),
        ({"b": {"dtype": 4}}, "the entry of 'b' is wrong"),
        ({"b": {"data_offsets": [8]}}, "not enough values"),
        ({"b": {"dtype": "F4"}}, "is of type F4"),
        ({"c": {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]}}, "the file at"),
    ],
)
def test_wrong_headers(elsewhere: str, change: dict[str, dict[str, object]], words: str) -> None:
    def entry(first: int) -> dict[str, object]:
        return {"dtype": "F32", "shape": [2], "data_offsets": [first, first + 8]}

    entries = {"a": entry(0), "b": entry(8)}
    header = json.dumps(entries | {name: entries.get(name, {}) | change[name] for name in change})
    path = RemotePath(f"{elsewhere}/a.safetensors")
    path.fs.pipe_file(path.key, len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    message = refusal(lambda: list(open_shard(path).tensors()), "checkpoint")
    assert str(path) in message
    assert words in message


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_headers(elsewhere: str, data: st.DataObject) -> None:
    """As the library refuses them."""
    from safetensors.torch import save

    good = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int8)})
    at = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        bad = good[:at]
    else:
        bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    path = RemotePath(f"{elsewhere}/a.safetensors")
    path.fs.pipe_file(path.key, bad)

    def contents() -> dict[str, bytes]:
        shard = open_shard(path)
        return {name: bits(shard.read(name)) for name, _, _ in shard.tensors()}

    from safetensors.torch import load

    try:
        expected = {name: bits(tensor) for name, tensor in load(bad).items()}
    except Exception:
        expected = None
    try:
        found = contents()
    except QMoEError as error:
        assert error.code == "checkpoint"
        assert expected is None or set(expected) != {"a", "b"} or "type" in str(error)
    else:
        assert found == expected or expected is None
