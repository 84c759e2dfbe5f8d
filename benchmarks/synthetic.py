"""Checkpoints of large models with random weights, written without holding them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_format.dtypes import from_float32
from qmoe_format.export.safetensors_writer import OutputTensor, write_sharded
from qmoe_format.progress import Counter

SHARD_BYTES = 1_000_000_000
BLOCK = 128
POOL = from_float32(np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02, "BF16")

Config = dict[str, Any]

MIXTRAL_LIKE: Config = {
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "sliding_window": None,
    "tie_word_embeddings": True,
}


def switch_base(experts: int) -> Config:
    """A Switch Transformer of the base size; every second layer is sparse."""
    return {
        "model_type": "switch_transformers",
        "num_experts": experts,
        "d_model": 768,
        "d_ff": 3072,
        "d_kv": 64,
        "num_heads": 12,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "vocab_size": 32_128,
        "decoder_start_token_id": 0,
    }


def write_checkpoint(config: Config, folder: Path) -> list[OutputTensor]:
    """Write a folder that ``transformers`` loads; return its tensors.

    In bfloat16, but with a ``quantization_config`` experts are FP8 with a scale for each block.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    made = tensors(config)
    written = list(fp8_experts(made) if "quantization_config" in config else made)
    write_sharded(folder, written, SHARD_BYTES, Counter(None, 0))
    return written


def tensors(config: Config) -> Iterator[OutputTensor]:
    """The tensors of transformers' model of a configuration, under their names on disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    made = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
    kind = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(made)
    for seed, (name, shape) in enumerate(on_disk(model)):
        norm = name.endswith("norm.weight")
        make = partial(ones, shape) if norm else partial(weights, shape, seed)
        yield OutputTensor(name, "BF16", shape, make)


def fp8_experts(made: Iterable[OutputTensor]) -> Iterator[OutputTensor]:
    """The same tensors with experts as DeepSeek-V3 stores them."""
    for seed, each in enumerate(made):
        if ".experts." not in each.name:
            yield each
            continue
        rows, columns = (-(-side // BLOCK) for side in each.shape)
        codes = partial(fp8_codes, each.shape, seed)
        scales = partial(fp8_scales, (rows, columns))
        yield OutputTensor(each.name, "F8_E4M3", each.shape, codes)
        yield OutputTensor(f"{each.name}_scale_inv", "F32", (rows, columns), scales)


def fp8_codes(shape: tuple[int, ...], seed: int) -> Iterable[npt.NDArray[Any]]:
    """Positive and negative numbers from 2^-6 to 1.875, in pieces."""
    for piece in weights(shape, seed):
        yield (piece & 0x80 | piece % 56 + 8).astype(np.uint8)


def fp8_scales(shape: tuple[int, ...]) -> Iterable[npt.NDArray[Any]]:
    yield np.full(shape, 0.01, np.float32)


def on_disk(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's tensors: each expert separately, tied ones once."""
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name in tied:
            continue
        prefix, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), shape
            continue
        prefix = prefix.replace(".mlp.", ".block_sparse_moe.")
        experts, rows, columns = shape
        for expert in range(experts):
            if last == "down_proj":
                yield f"{prefix}.{expert}.w2.weight", (rows, columns)
            else:
                yield f"{prefix}.{expert}.w1.weight", (rows // 2, columns)
                yield f"{prefix}.{expert}.w3.weight", (rows // 2, columns)


def ones(shape: tuple[int, ...]) -> Iterable[npt.NDArray[Any]]:
    yield np.full(shape, 0x3F80, POOL.dtype)


def weights(shape: tuple[int, ...], seed: int) -> Iterable[npt.NDArray[Any]]:
    """A tensor in pieces, each a stretch of one pool of random numbers."""
    generator = np.random.default_rng(seed)
    left = int(np.prod(shape))
    while left:
        piece = min(left, POOL.size // 2)
        start = int(generator.integers(POOL.size - piece))
        yield POOL[start : start + piece]
        left -= piece
