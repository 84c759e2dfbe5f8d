"""A Mixtral run by llama.cpp, to compare the speed of whole models.

Needs the extra ``gguf``. Experts are of one of ggml's types, all other matrices bf16 as in ours.
Weights are random, and of each tensor only some rows are made and repeated: no speed depends on
them, but some types take hours to quantize.
"""

from __future__ import annotations

import ctypes
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import ggml
from qmoe_format.machine import cores

_ROWS = 16


def write(config: dict[str, Any], name: str, target: Path) -> None:
    """Write a GGUF file.

    Args:
        config: of a Mixtral with tied embeddings.
        name: ggml's type of experts, of which all rows are whole blocks.
    """
    gguf: Any = import_module("gguf")
    writer = gguf.GGUFWriter(target, "llama")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, experts = config["num_attention_heads"], config["num_local_experts"]
    keys = hidden // heads * config["num_key_value_heads"]
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(tensor: str, shape: tuple[int, ...], kind: str) -> None:
        stored = np.resize(_rows(kind, shape[-1]), (*shape[:-1], _row_bytes(kind, shape[-1])))
        writer.add_tensor(
            f"{tensor}.weight", stored, raw_dtype=gguf.GGMLQuantizationType(ggml.size(kind)[0])
        )

    def add_ones(tensor: str) -> None:
        writer.add_tensor(f"{tensor}.weight", np.ones(hidden, np.float32))

    add("token_embd", (config["vocab_size"], hidden), "BF16")
    add_ones("output_norm")
    for block in (f"blk.{number}" for number in range(config["num_hidden_layers"])):
        add_ones(f"{block}.attn_norm")
        add_ones(f"{block}.ffn_norm")
        for tensor, rows in (("q", hidden), ("k", keys), ("v", keys), ("output", hidden)):
            add(f"{block}.attn_{tensor}", (rows, hidden), "BF16")
        add(f"{block}.ffn_gate_inp", (experts, hidden), "F32")
        for tensor, shape in (
            ("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner)),
        ):  # fmt: skip
            add(f"{block}.ffn_{tensor}_exps", (experts, *shape), name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _row_bytes(kind: str, columns: int) -> int:
    _, block, size = ggml.size(kind)
    return columns // block * size


def _rows(kind: str, columns: int) -> NDArray[np.uint8]:
    values = np.random.default_rng(0).standard_normal((_ROWS, columns), np.float32) * 0.02
    return ggml.quantize(kind, values.astype(np.float32), np.ones(columns, np.float32))


def work(path: Path, prompt: NDArray[np.int64], new_tokens: int) -> dict[str, Any]:
    """Load, read a prompt and write tokens, twice, as ``runtime.work`` does."""
    llama: Any = import_module("llama_cpp")
    silent = llama.llama_log_callback(lambda *_: None)  # which has to live as long as the model
    llama.llama_log_set(silent, None)
    llama.llama_backend_init()
    started = time.perf_counter()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 512, cores(), cores()
    context = llama.llama_init_from_model(model, settings)
    loaded = time.perf_counter()
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def decode(tokens: Any) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if status := llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (vocabulary,))
        return int(logits.argmax())

    def generate() -> list[float]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        begun = time.perf_counter()
        token, times = decode(prompt), []
        for _ in range(new_tokens - 1):
            times.append(time.perf_counter() - begun)
            token = decode([token])
        return [*times, time.perf_counter() - begun]

    first, times = generate(), generate()
    return {
        "load_seconds": loaded - started,
        "first_token_seconds": first[0],
        "prefill_seconds": times[0],
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
    }
