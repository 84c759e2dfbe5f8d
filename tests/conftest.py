"""Fixtures: small checkpoints, the folder with larger ones, and the ``qmoe`` command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmoe_format.cli import main

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

State = dict[str, Any]  # tensors by name; torch is imported only when a test needs it


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with switch-mini and mixtral-mini."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the checkpoints in ../shared/data are not published")
    return SHARED_DATA


def switch_state(
    experts: int = 4,
    rows: int = 6,
    columns: int = 10,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> State:
    """One dense and one sparse encoder layer with random weights."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    prefix = "encoder.block.1.layer.1.mlp."
    state = {
        "shared.weight": random(32, columns),
        "encoder.block.0.layer.1.mlp.wi.weight": random(rows, columns),
        "encoder.block.1.layer.1.layer_norm.weight": random(columns),
        f"{prefix}router.classifier.weight": random(experts, columns),
    }
    for e in range(experts):
        state[f"{prefix}experts.expert_{e}.wi.weight"] = random(rows, columns)
        state[f"{prefix}experts.expert_{e}.wo.weight"] = random(columns, rows)
    return state


def mixtral_state(experts: int = 3, rows: int = 6, columns: int = 10) -> State:
    """One layer with random weights."""
    import torch

    generator = torch.Generator().manual_seed(1)
    prefix = "model.layers.0.block_sparse_moe."
    shapes = {"w1": (rows, columns), "w2": (columns, rows), "w3": (rows, columns)}
    state = {
        "model.embed_tokens.weight": torch.randn((32, columns), generator=generator),
        f"{prefix}gate.weight": torch.randn((experts, columns), generator=generator),
    }
    for e in range(experts):
        for matrix, shape in shapes.items():
            state[f"{prefix}experts.{e}.{matrix}.weight"] = torch.randn(shape, generator=generator)
    return state


def write_checkpoint(
    folder: Path,
    state: State,
    config: dict[str, Any] | None = None,
    *,
    kind: str = "safetensors",
    shards: int = 1,
) -> Path:
    """Save ``state`` as transformers would, by default as a Switch Transformer."""
    import torch
    from safetensors.torch import save_file

    if config is None:
        routers = [tensor for name, tensor in state.items() if "router" in name]
        config = {"model_type": "switch_transformers", "num_experts": routers[0].shape[0]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: state[name] for name in list(state)[number::shards]}
        infix = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
        path = folder / f"{stem}{infix}.{suffix}"
        if kind == "safetensors":
            save_file(part, path, metadata={"format": "pt"})
        else:
            torch.save(part, path)
        weight_map |= dict.fromkeys(part, path.name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def switch(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny Switch checkpoint: ``switch(change=edit_state, kind=…, shards=…)``."""

    def make(
        change: Callable[[State], object] = lambda state: None,
        *,
        name: str = "checkpoint",
        config: dict[str, Any] | None = None,
        kind: str = "safetensors",
        shards: int = 1,
        **options: Any,
    ) -> Path:
        state = switch_state(**options)
        change(state)
        return write_checkpoint(tmp_path / name, state, config, kind=kind, shards=shards)

    return make


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    config = {"model_type": "mixtral", "num_local_experts": 3}
    return write_checkpoint(tmp_path / "mixtral", mixtral_state(), config)


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def qmoe(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``qmoe("verify", path)`` in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return Outcome(code, output.out, output.err)

    return run


@pytest.fixture(scope="session")
def qmoe_process() -> Run:
    """Run ``qmoe("verify", path)`` in a process of its own."""

    def run(*arguments: str | Path) -> Outcome:
        command = [sys.executable, "-m", "qmoe_format.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
