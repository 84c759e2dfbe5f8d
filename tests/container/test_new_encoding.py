"""A new encoding is a class and an entry in the registry: all else works with it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qmoe_format import container
from qmoe_format.container.encodings import ENCODINGS, RAW, Encoding, GetDictionary, Payload, Sink
from qmoe_format.container.entries import Item
from qmoe_format.container.inspection import describe
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError
from qmoe_format.export import unpack
from tests.refusals import refusal


class Xor(Encoding):
    """Every byte with the bits of ``mask`` flipped, after a header of one byte."""

    name = "xor"
    defaults = {"mask": 255}  # noqa: RUF012
    header_bytes = 1

    def check_entry(self, item: Item) -> None:
        if int(item.parameters["mask"]) > 255:
            raise QMoEError("limit", "mask is above 255")

    def decode(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> npt.NDArray[Any]:
        return RAW.decode(stored[1:] ^ np.uint8(item.parameters["mask"]), item, dictionary)

    def payload(self, header: Bytes, item: Item) -> Payload:
        return Payload(0, int(header[0]))

    def encode(self, value: npt.NDArray[Any], item: Item, sink: Sink) -> None:
        sink.write(bytes([np.count_nonzero(value)]))
        sink.write((value.view(np.uint8).reshape(-1) ^ np.uint8(item.parameters["mask"])).tobytes())


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ENCODINGS, "xor", Xor())
    path = tmp_path / "model.qmoe"
    with (
        container.Writer(path) as writer,
        writer.add_stack("experts", (2, 2, 2), "I16", "xor", "experts.{}", mask=15) as stack,
    ):
        for expert in range(2):
            stack.append(np.array([[expert, 2], [0, 3]], np.int16))
    return path


def test_it_is_written_read_and_inspected(path: Path) -> None:
    with container.open(path) as file:
        file.verify()
        assert file.tensors["experts"].parameters == {"mask": 15}
        assert file.read_expert("experts", 1).tolist() == [[1, 2], [0, 3]]
        assert file.encoded("experts", 1).tolist() == [[1, 2], [0, 3]]
        assert describe(file)["tensors"][0]["zero_fraction"] == 1 - 5 / 8


def test_it_is_copied_and_unpacked(path: Path, tmp_path: Path) -> None:
    with container.Writer(path.with_name("with-config.qmoe")) as writer:
        with (
            container.open(path) as file,
            writer.add_stack("experts", (2, 2, 2), "I16", "xor", "experts.{}", mask=15) as stack,
        ):
            for expert in range(2):
                stack.append(file.encoded("experts", expert))
        writer.add_attachment("config.json", b"{}")
    folder = unpack(path.with_name("with-config.qmoe"), tmp_path / "compressed", compressed=True)
    with container.open(folder / "experts.qmoe") as file:
        assert file.tensors["experts"].encoding == "xor"
    assert (unpack(path, tmp_path / "dense") / "model.safetensors.index.json").exists()


def test_the_runtime_says_that_it_cannot_multiply(path: Path) -> None:
    lazy_stack = pytest.importorskip("qmoe_format.runtime.lazy_stack", reason="needs torch")
    with container.open(path) as file:
        assert "xor" in refusal(lambda: lazy_stack.LazyStack(file, "experts"), "argument")


def test_its_entries_are_checked(path: Path) -> None:
    def write() -> None:
        with container.Writer(path) as writer:
            writer.add_stack("experts", (0, 2, 2), "I16", "xor", mask=256)

    assert "mask" in refusal(write, "limit")
