"""A tiny model of every family that can be converted, with random weights and a tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(60)]
SENTINELS = [f"<extra_id_{number}>" for number in reversed(range(8))]
VOCABULARY = ["<pad>", "</s>", "<unk>", *WORDS, *SENTINELS]

_DECODER: Mapping[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_LATENT: Mapping[str, Any] = {  # attention, shared experts and first layers as DeepSeek has them
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 48,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {**_DECODER, **_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_DECODER, **_LATENT},
    "glm4_moe": {
        **_DECODER,
        "head_dim": 16,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        **_DECODER,
        "head_dim": 16,
        "num_local_experts": 3,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granitemoe": {
        **_DECODER,
        "num_local_experts": 3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "mixtral": {**_DECODER, "head_dim": 16, "num_local_experts": 3},
    "olmoe": {**_DECODER, "num_experts": 4},
    "phimoe": {**_DECODER, "num_local_experts": 4, "attention_bias": True},
    "qwen2_moe": {
        **_DECODER,
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 56,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        **_DECODER,
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "switch_transformers": {
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
    },
}


def save_model(
    folder: Path, model_type: str, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Experts are unlike each other, and no weight is zero. ``changes``: of the configuration."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    for tensor in (*model.parameters(), *model.buffers()):  # a router's bias is a buffer
        tensor.data += 0.1 * torch.randn(tensor.shape)
    model.to(dtype).save_pretrained(folder)
    numbers = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


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


def load_model(folder: Path) -> Any:
    """In float32; without dropping tokens."""
    config = AutoConfig.from_pretrained(folder)
    if not config.is_encoder_decoder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, expert_capacity=10**6
    ).eval()


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A checkpoint with other tensors."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
