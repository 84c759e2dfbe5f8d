"""``qmoe demo``, run like a user does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import qmoe_format
from qmoe_format.cli.demo import BITS
from qmoe_format.container.inspection import describe

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")


def test_demo(qmoe_process: Any, qmoe: Any) -> None:
    done = qmoe_process("demo")
    assert done.code == 0, done.err
    lines = [line.strip() for line in done.out.splitlines()]
    named = next(line for line in lines if line.startswith("The file is "))
    path = Path(named.removeprefix("The file is "))
    with qmoe_format.open(path) as file:
        file.verify()
        compressed = [name for name, entry in file.tensors.items() if entry.stack]
        total = describe(file)["totals"]["experts"]["total_bits_per_weight"]
    # The model's own configuration asks for a beam search, which cannot show text as it comes.
    generated = qmoe("generate", path, "The LORD is my shepherd;")
    shutil.rmtree(path.parent)
    assert (generated.code, generated.err) == (0, "")
    assert len(generated.out.split()) > 3
    assert total == pytest.approx(BITS, rel=0.02)
    assert any("relative error" in line for line in lines)
    assert compressed
    for name in compressed:
        assert any(line.startswith(name) for line in lines)
    originals = [line for line in lines if line.startswith("original:")]
    written = [line for line in lines if line.startswith("compressed:")]
    assert len(originals) == len(written) == 2
    assert all(len(line.split()) > 3 for line in originals + written)
    assert "Verify" in done.out
    assert not done.err


def test_demo_without_transformers(qmoe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = qmoe("demo")
    assert done.code == 1
    assert done.err.startswith("error[dependency]: ")
    assert "pip install 'qmoe-format[convert]'" in done.err
