"""A tiny model of every type that can be converted, with random weights and a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from qmoe_format.checkpoints.model import ALIASES, load_config, model_class
from tests.tiny_configs import CONFIGS, VOCABULARY, WORDS

__all__ = [
    "CONFIGS",
    "WORDS",
    "add_prediction_layer",
    "build_model",
    "changed",
    "load_model",
    "save_model",
]


def build_model(model_type: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Experts are unlike each other, and no weight is zero. ``changes``: of the configuration."""
    torch.manual_seed(1)
    known = ALIASES.get(model_type, model_type)
    config = AutoConfig.for_model(known, **{**CONFIGS[model_type], **changes})
    model = model_class(config)._from_config(config)
    for tensor in (*model.parameters(), *model.buffers()):  # a router's bias is a buffer
        if tensor.is_floating_point():
            tensor.data += 0.1 * torch.randn(tensor.shape)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # a router that looks up the experts of a token
            table.copy_(torch.rand(len(table), config.n_routed_experts).topk(table.shape[1]).indices)
    return model.to(dtype)


def save_model(
    folder: Path,
    model_type: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    original: bool = True,
    **changes: Any,
) -> Path:
    """Save a model of ``build_model`` and a tokenizer.

    Args:
        original: whether under the names of published checkpoints, not those of transformers.
    """
    build_model(model_type, dtype, **changes).save_pretrained(folder, save_original_format=original)
    if model_type in ALIASES:
        _rename_type(folder / "config.json", model_type)
    numbers = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def _rename_type(path: Path, model_type: str) -> None:
    """Let a configuration be of a type that only code beside the checkpoint knows."""
    config = json.loads(path.read_text())
    (architecture,) = config["architectures"]
    code = {"AutoModelForCausalLM": f"modeling_deepseek.{architecture}"}
    path.write_text(json.dumps(config | {"model_type": model_type, "auto_map": code}))


def add_prediction_layer(folder: Path) -> dict[str, Tensor]:
    """Give a checkpoint of ``save_model`` one layer more, for multi-token prediction.

    Returns:
        Its tensors by name.
    """
    state = load_file(folder / "model.safetensors")
    further = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in state.items()
        if "layers.1." in name
    }
    save_file(state | further, folder / "model.safetensors", metadata={"format": "pt"})
    return further


def load_model(folder: Path, **options: Any) -> Any:
    """In float32; without dropping tokens."""
    config = load_config(folder, json.loads((folder / "config.json").read_text()))
    if config.is_encoder_decoder:
        options["expert_capacity"] = 10**6
    return model_class(config).from_pretrained(folder, dtype=torch.float32, **options).eval()


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A checkpoint with other tensors."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
