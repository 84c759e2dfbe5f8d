"""Files of the Hub by their URLs, read by ranges instead of being downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub", reason="needs the extra 'convert'")
from huggingface_hub import HfFileSystem
from huggingface_hub.hf_file_system import HfFileSystemFile

import qmoe_format
from tests.hub_server import Hub
from tests.refusals import refusal


def test_one_tensor_of_a_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    HfFileSystem.clear_instance_cache()
    path = tmp_path / "m.qmoe"
    value = np.random.default_rng(0).random((4, 5000))
    with (
        qmoe_format.Writer(path) as writer,
        writer.add_stack("s", value.shape, "F64", "raw") as stack,
    ):
        for row in value:
            stack.append(row)
    hub.add("org/model", {"folder/m.qmoe": path.read_bytes()})
    ranges: list[tuple[int, int]] = []
    fetch = HfFileSystemFile._fetch_range

    def noting(self: HfFileSystemFile, start: int, end: int) -> bytes:
        ranges.append((start, end))
        return fetch(self, start, end)

    monkeypatch.setattr(HfFileSystemFile, "_fetch_range", noting)
    with qmoe_format.open("hf://org/model/folder/m.qmoe") as file:
        ranges.clear()
        assert np.array_equal(file.read_expert("s", 2), value[2])
        first = 64 + 2 * value[2].nbytes
        assert ranges == [(first, first + value[2].nbytes)], "nothing is read ahead"
    message = refusal(lambda: qmoe_format.open("hf://org/model/none.qmoe"), "not-found")
    assert message.startswith("cannot read hf://org/model/none.qmoe: ")
    refusal(lambda: qmoe_format.open("hf://org/none/none.qmoe"), "not-found")
