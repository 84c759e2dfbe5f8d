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
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MixtralConfig,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
)

from qmoe_format.conversion import Calibration, convert

WORDS = [f"w{number}" for number in range(60)]
SENTINELS = [f"<extra_id_{number}>" for number in reversed(range(8))]
VOCABULARY = ["<pad>", "</s>", "<unk>", *WORDS, *SENTINELS]

SWITCH: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 96,
    "num_heads": 2,
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MIXTRAL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def save_model(folder: Path, config: Any) -> Path:
    """Random weights, and experts unlike each other."""
    torch.manual_seed(1)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(torch.bfloat16).save_pretrained(folder)
    numbers = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def switch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switch")
    return save_model(folder, SwitchTransformersConfig(**SWITCH))


@pytest.fixture(scope="session")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixtral"), MixtralConfig(**MIXTRAL))


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
