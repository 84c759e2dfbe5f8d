"""The commands with names instead of paths."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")

from qmoe_format import convert
from tests.conftest import Outcome
from tests.hub_server import TOKEN, Hub
from tests.tiny_models import save_model

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With files that a conversion has no use for."""
    folder = save_model(tmp_path_factory.mktemp("hub") / "checkpoint", "mixtral")
    for name in (
        "README.md",
        "modeling_org.py",
        "consolidated.safetensors",
        "original/params.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.fixture(scope="module")
def file(checkpoint: Path) -> Path:
    return convert(checkpoint, checkpoint.parent / "m.qmoe")


def test_convert(qmoe: Run, hub: Hub, checkpoint: Path, file: Path, tmp_path: Path) -> None:
    hub.add("org/model", checkpoint)
    (tmp_path / "taken.qmoe").touch()
    assert "already exists" in qmoe("convert", "org/model", tmp_path / "taken.qmoe").err
    assert hub.fetched == [], "everything else is checked before a long download"
    outcome = qmoe("convert", "org/model", tmp_path / "m.qmoe")
    assert (outcome.code, outcome.err) == (0, "")
    assert (tmp_path / "m.qmoe").read_bytes() == file.read_bytes()
    (snapshot,) = tmp_path.glob("cache/*/snapshots/*")
    assert convert(snapshot, tmp_path / "s.qmoe").read_bytes() == file.read_bytes()


def test_all_other_commands(
    qmoe: Run, hub: Hub, checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    hub.add("org/model", checkpoint)
    hub.add("org/model-qmoe", {file.name: file.read_bytes()}, "v1")
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8")
    for command, *rest in (
        ("inspect", "{file}"),
        ("generate", "{file}", "w1 w2", "--max-new-tokens", "4"),
        ("eval", "{file}", "--text", str(text), "--against", "{checkpoint}"),
    ):
        named, here = (
            qmoe(command, *(each.format(file=path, checkpoint=folder) for each in rest))
            for path, folder in (
                ("org/model-qmoe/m.qmoe@v1", "org/model"),
                (file, checkpoint),
            )
        )
        assert (named.code, named.err) == (0, "")
        assert named == here
    assert "org/model-qmoe@v1: good" in qmoe("verify", "org/model-qmoe@v1").out
    assert qmoe("unpack", "org/model-qmoe@v1", tmp_path / "unpacked").code == 0
    assert (tmp_path / "unpacked" / "config.json").is_file()


def test_progress_on_a_terminal(
    qmoe: Run, hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    hub.add("org/model", {file.name: file.read_bytes()})
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("qmoe_format.cli.progress_line.INTERVAL_S", 0)
    monkeypatch.setenv("COLUMNS", "200")
    assert qmoe("verify", "org/model").code == 0
    assert "\rdownload 100%" in stream.getvalue()
    assert "  m.qmoe  " in stream.getvalue()


def test_the_environment_is_obeyed(hub: Hub, file: Path, tmp_path: Path) -> None:
    hub.add("org/model", {file.name: file.read_bytes()})
    hub.private.add("org/model")
    code = (
        "import sys\nfrom qmoe_format.cli import main\ncode = main(['inspect', 'org/model'])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\nsys.exit(code)"
    )

    def run(**variables: str) -> Outcome:
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    assert run(HF_TOKEN=TOKEN).code == 0
    assert len(list((tmp_path / "home").rglob("m.qmoe"))) == 1
    offline = run(HF_HUB_OFFLINE="1")
    assert (offline.code, offline.err) == (0, "")
    assert offline.out.endswith("\n[]\n"), "neither torch nor transformers is needed to read"
