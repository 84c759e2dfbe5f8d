"""Tiny models with a tokenizer and some text, a way to convert them, and a block's experts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from safetensors.torch import save_file
from torch import Tensor

from qmoe_format.calibration.activations import RoutedTokens, RowFile
from qmoe_format.checkpoints import open_checkpoint
from qmoe_format.conversion import Calibration, convert
from qmoe_format.conversion.block_experts import BlockExperts
from qmoe_format.conversion.parallel import Resources
from qmoe_format.quantize import RECIPES
from qmoe_format.quantize.rd import Search, quantize_rd
from tests.tiny_models import WORDS, save_model

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 3, 8, 12, 40
NORMS = torch.arange(1.0, TOKENS + 1)[:, None]  # of the hidden states after the block
ONE_THREAD = Resources(1)


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
def _exact(exact_products: None) -> None:
    pass


quick_rd = partial(quantize_rd, search=Search(rounds=3))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are not about how good the quantizer is."""
    quick = replace(RECIPES["rd"], function=f"{__name__}:quick_rd")
    monkeypatch.setitem(RECIPES, "rd", quick)


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


@pytest.fixture
def routed(tmp_path: Path) -> RoutedTokens:
    """Random tokens of a block, each for two experts."""
    torch.manual_seed(0)

    def written(name: str, rows: Tensor) -> RowFile:
        file = RowFile(tmp_path / f"{name}.rows", TOKENS, rows.shape[1], rows.dtype)
        with file.writing() as append:
            append(rows)
        return file

    return RoutedTokens(
        written("inputs", torch.randn(TOKENS, HIDDEN)),
        written("experts", torch.rand(TOKENS, EXPERTS).topk(2).indices),
        written("weights", torch.rand(TOKENS, 2)),
        torch.rand(TOKENS) > 0.3,
        EXPERTS,
    )


Block = Callable[..., BlockExperts]


@pytest.fixture
def block(tmp_path: Path, routed: RoutedTokens) -> Block:
    """``block("mixtral" or "granitemoe", resources, **options)``, with the same weights."""
    gate, up = torch.randn(2, EXPERTS, INTERMEDIATE, HIDDEN)
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    states = {
        "mixtral": {
            f"experts.{e}.{name}.weight": matrices[e].clone()
            for e in range(EXPERTS)
            for name, matrices in (("w1", gate), ("w2", down), ("w3", up))
        },
        "granitemoe": {
            "input_linear.weight": torch.cat([gate, up], 1),
            "output_linear.weight": down,
        },
    }
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    for family, state in states.items():
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
        named = {f"model.layers.0.block_sparse_moe.{name}": each for name, each in state.items()}
        save_file(named, tmp_path / family / "model.safetensors")

    def make(family: str, resources: Resources = ONE_THREAD, **options: Any) -> BlockExperts:
        opened = open_checkpoint(tmp_path / family)
        settings: dict[str, Any] = {"token_cap": 100.0, **options}
        return BlockExperts(opened, opened.layers[0], routed, resources, **settings)

    return make
