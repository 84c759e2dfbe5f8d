"""Fixtures: small checkpoints, the folder with larger ones, and the ``qmoe`` command."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from qmoe_format.cli import main

# Fifty examples, not a hundred, where a test does not say how many: all tests have to be run often.
# For more, --hypothesis-profile=thorough.
settings.register_profile("quick", max_examples=50)
settings.register_profile("thorough", max_examples=500)
settings.load_profile("quick")

# Torch's threads wait for each other in busy loops, and tests run in several processes. Where
# threads matter, a test sets their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

State = dict[str, Any]  # tensors by name; torch is imported only when a test needs it


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_collect() -> None:
    """Conversions collect garbage after each block: not among all that tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models do not round activations, so that they can be compared with dequantized ones."""
    from qmoe_format.runtime import expert_memory

    monkeypatch.setattr(expert_memory, "HotExperts", lambda _: None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with switch-mini and mixtral-mini."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the checkpoints in ../shared/data are not published")
    return SHARED_DATA


def switch_config(
    experts: int = 4, rows: int = 6, columns: int = 10, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """A dense and a sparse encoder block, and a decoder without blocks."""
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "dtype": dtype,
        "vocab_size": 32,
        "d_model": columns,
        "d_ff": rows,
        "d_kv": 2,
        "num_heads": 1,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 0,
        "num_sparse_decoder_layers": 0,
        "num_experts": experts,
    }


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "float32",
    "vocab_size": 32,
    "hidden_size": 10,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "num_local_experts": 3,
}


def random_state(config: dict[str, Any], seed: int = 0, *, new_names: bool = False) -> State:
    """Random weights for a model, by the names that its authors gave them.

    Args:
        config: of the model, with ``architectures`` and ``dtype``.
        seed: of the weights.
        new_names: by the names that transformers has for them now, experts in one tensor.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(config))
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["dtype"])
    state = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    if not new_names:
        state = revert_weight_conversion(model, state)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write_checkpoint(
    folder: Path,
    state: State,
    config: dict[str, Any],
    *,
    kind: str = "safetensors",
    shards: int = 1,
) -> Path:
    """Save ``state`` as transformers would."""
    import torch
    from safetensors.torch import save_file

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
        """``config``: what is wrong in it; ``options``: of ``switch_config``."""
        good = switch_config(**options)
        state = random_state(good)
        change(state)
        return write_checkpoint(
            tmp_path / name, state, good | (config or {}), kind=kind, shards=shards
        )

    return make


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "mixtral", random_state(MIXTRAL, 1), MIXTRAL)


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of an empty folder in fsspec's file system in memory."""
    fsspec = pytest.importorskip("fsspec", reason="needs the extra 'remote'")
    yield "memory://elsewhere"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]  # folders that were made without files


def copy_elsewhere(folder: Path, url: str) -> str:
    """Copy the files of a folder; returns the URL."""
    import fsspec

    file_system, place = fsspec.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            file_system.pipe_file(f"{place}/{path.relative_to(folder)}", path.read_bytes())
    return url


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
