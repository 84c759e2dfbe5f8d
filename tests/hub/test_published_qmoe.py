"""Repositories of QMoE's authors, by their names on the Hub."""

from __future__ import annotations

from pathlib import Path

from qmoe_format.hub import local_checkpoint
from tests.hub_server import Hub
from tests.refusals import refusal

PUBLISHED = {
    "config.json": b"{}",
    "noexp.pt": b"n" * 100,
    "exp00.pt": b"0" * 1000,
    "exp01.pt": b"1" * 1000,
    "sizes.pt": b"s",
}
OTHER = {"README.md": b"r", ".gitattributes": b"g", "exp.pt": b"e", "old/exp02.pt": b"o"}


def test_all_its_files_are_downloaded(hub: Hub) -> None:
    hub.add("org/switch_qmoe", PUBLISHED | OTHER)
    folder = local_checkpoint("org/switch_qmoe")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == PUBLISHED
    assert local_checkpoint("org/switch_qmoe") == folder
    assert len(hub.fetched) == len(PUBLISHED)


def test_weights_for_transformers_come_first(hub: Hub) -> None:
    hub.add("org/both", PUBLISHED | {"model.safetensors": b"m"})
    found = {path.name for path in local_checkpoint("org/both").iterdir()}
    assert found == {"config.json", "model.safetensors"}


def test_a_clone_without_git_lfs(tmp_path: Path) -> None:
    for name, data in PUBLISHED.items():
        (tmp_path / name).write_bytes(data)
    assert local_checkpoint(tmp_path) == tmp_path
    (tmp_path / "exp01.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    said = refusal(lambda: local_checkpoint(tmp_path), "checkpoint")
    assert said.startswith(f"{tmp_path / 'exp01.pt'}: a pointer of Git LFS")
