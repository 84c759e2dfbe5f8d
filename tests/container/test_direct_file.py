"""Reads past the page cache return what is in the file, with and without help by the system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_format.container import direct_file
from qmoe_format.container.direct_file import DirectFile
from qmoe_format.container.file_source import FileSource
from tests.refusals import refusal

DATA = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
WAYS = {
    "as it is": (),
    "blocks of 4096 bytes": (4096,),
    "no O_DIRECT": None,
}


@pytest.fixture(scope="module", params=WAYS)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DirectFile]:
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    blocks = WAYS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        if blocks is None:
            patch.delattr(os, "O_DIRECT", raising=False)
        elif blocks:
            patch.setattr(direct_file, "_BLOCKS", blocks)
        file = DirectFile(fd)
    yield file
    file.close()
    os.close(fd)


@settings(deadline=None)
@given(st.data())
def test_any_range(opened: DirectFile, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, len(DATA)))
    length = data.draw(st.integers(0, len(DATA) - offset))
    found, count = opened.read(offset, length)
    assert found.tobytes() == DATA[offset : offset + length]
    assert not found.flags.writeable
    assert length <= count < length + 2 * 4096


def test_a_range_beyond_the_end(opened: DirectFile) -> None:
    for offset, length in ((0, len(DATA) + 1), (len(DATA) - 1, 2), (len(DATA) + 9000, 1)):
        refusal(lambda o=offset, n=length: opened.read(o, n), "truncated")  # type: ignore[misc]


@pytest.mark.parametrize("positional", [True, False])
def test_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positional: bool) -> None:
    """Also on systems without such reads."""
    if not positional:
        monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    source = FileSource(path)
    found, count = source.read(100, 5000)
    assert found.tobytes() == DATA[100:5100]
    assert count >= 5000
    with path.open("ab") as longer:
        longer.write(b"x")
    refusal(lambda: source.read(100, 5000), "trailing")
    os.truncate(path, 4000)
    refusal(lambda: source.read(100, 5000), "truncated")
    source.close()
    assert found.tobytes() == DATA[100:5100]
    refusal(lambda: source.read(100, 5000), "argument")
