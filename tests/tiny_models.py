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

from qmoe_format.checkpoints import model as transformers_model
from tests.tiny_configs import CONFIGS, VOCABULARY, WORDS, WRAPPERS

__all__ = [
    "CONFIGS",
    "WORDS",
    "WRAPPERS",
    "add_prediction_layer",
    "build_model",
    "changed",
    "load_config",
    "load_model",
    "save_model",
]


def build_model(model_type: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Experts are unlike each other, and no weight is zero. ``changes``: of the configuration."""
    torch.manual_seed(1)
    settings = (CONFIGS | WRAPPERS)[model_type]
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    model = transformers_model.model_class(config)._from_config(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.startswith("talker.") and ".experts." in name:
            tensor.data.zero_()  # transformers does not initialize them
        if tensor.is_floating_point():  # a router's bias is a buffer
            tensor.data += 0.1 * torch.randn(tensor.shape)
        elif name.endswith("tid2eid"):  # a router that looks up the experts of a token
            experts = torch.rand(len(tensor), config.n_routed_experts)
            tensor.copy_(experts.topk(tensor.shape[1]).indices)
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
    numbers = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if model_type in ("qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"):
        # Transformers reads every tokenizer of these types as theirs, of bytes.
        letters = {token: number for number, token in enumerate("w0123456789Ġ", 3)}
        tokenizer = Tokenizer(models.BPE(letters | {t: numbers[t] for t in VOCABULARY[:3]}, []))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def add_prediction_layer(
    folder: Path, last: str = "model.layers.1.", further: str = "model.layers.2."
) -> dict[str, Tensor]:
    """Give a checkpoint of ``save_model`` one layer more, for multi-token prediction.

    Args:
        last: how the names in the last layer begin.
        further: likewise, in the new one, which has the same weights.

    Returns:
        Its tensors by name.
    """
    state = load_file(folder / "model.safetensors")
    added = {
        f"{further}{name.removeprefix(last)}": tensor.clone()
        for name, tensor in state.items()
        if name.startswith(last)
    }
    save_file(state | added, folder / "model.safetensors", metadata={"format": "pt"})
    return added


def load_config(folder: Path) -> Any:
    """The configuration in a folder."""
    return transformers_model.load_config(folder, json.loads((folder / "config.json").read_text()))


def load_model(folder: Path) -> Any:
    """In float32; without dropping tokens."""
    config = load_config(folder)
    if config.is_encoder_decoder:
        config.expert_capacity = 10**6
    kind = transformers_model.model_class(config)
    return kind.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A checkpoint with other tensors."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
