"""Tiny models of every family, converted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch

import qmoe_format
from tests.runtime.files import KINDS, Dense, write_stacks
from tests.tiny_models import save_model


@pytest.fixture(autouse=True)
def _exact(exact_products: None) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Converted:
    """A checkpoint, its ``.qmoe`` file, the folder with compressed experts, and the same weights
    dequantized."""

    checkpoint: Path
    file: Path
    folder: Path
    dense: Path


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """``converted("mixtral")``, in float32, so that dequantized weights are exact."""
    made: dict[str, Converted] = {}

    def convert(model_type: str) -> Converted:
        if model_type not in made:
            base = tmp_path_factory.mktemp(model_type)
            checkpoint = save_model(base / "checkpoint", model_type, torch.float32)
            file = qmoe_format.convert(checkpoint, base / "m.qmoe", threads=1)
            made[model_type] = Converted(
                checkpoint,
                file,
                qmoe_format.unpack(file, base / "compressed", compressed=True),
                qmoe_format.unpack(file, base / "dense"),
            )
        return made[model_type]

    return convert


@pytest.fixture(params=["switch_transformers", "mixtral"])
def model(request: pytest.FixtureRequest, converted: Callable[[str], Converted]) -> Converted:
    """One with a module an expert in transformers, and one with fused experts."""
    return converted(request.param)


@pytest.fixture(scope="session", params=KINDS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Dense]:
    path = tmp_path_factory.mktemp("stacks") / "layer.qmoe"
    return path, write_stacks(path, request.param)


@pytest.fixture
def file(written: tuple[Path, Dense]) -> Iterator[qmoe_format.QMoEFile]:
    """The stacks of ``files.SHAPES``."""
    with qmoe_format.open(written[0]) as file:
        yield file


@pytest.fixture
def dense(written: tuple[Path, Dense]) -> Dense:
    """The weights of ``file``."""
    return written[1]
