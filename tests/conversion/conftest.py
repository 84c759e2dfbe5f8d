"""Tiny models with a tokenizer and some text, and a way to convert them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
from qmoe_format.conversion import Calibration, convert
from tests.tiny_models import WORDS, save_model


@pytest.fixture(scope="session")
def switch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("switch"), "switch_transformers")


@pytest.fixture(scope="session")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(params=["switch", "mixtral"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(0)
    weights = [1 / (1 + number) for number in range(len(WORDS))]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        json.dumps({"text": " ".join(chance.choices(WORDS, weights, k=chance.randrange(20, 60)))})
        for _ in range(40)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are not about how good the quantizer is."""
    monkeypatch.setattr("qmoe_format.quantize.rd.ROUNDS", 1)
    monkeypatch.setattr("qmoe_format.quantize.rd.PASSES", 2)


Convert = Callable[..., Path]


@pytest.fixture
def converted(text: Path, tmp_path: Path) -> Convert:
    """``converted(model, name="m.qmoe", **options of convert and Calibration)``, one thread."""

    def run(model: Path, name: str = "m.qmoe", **options: Any) -> Path:
        fields = Calibration.__dataclass_fields__.keys() & options.keys()
        asked = {"sequence_length": 32} | {field: options.pop(field) for field in fields}
        calibration = Calibration(asked.pop("text", text), **asked)
        every: dict[str, Any] = {"threads": 1, "calibration": calibration} | options
        return convert(model, tmp_path / name, **every)

    return run
