"""How fast weights of native quantized formats become float32, beside bf16.

    python -m benchmarks.native_formats

Writes benchmarks/results/native_formats.json: weights per second on one thread, from a safetensors
mapped file in the page cache to a new float32 matrix, and the ratio to bf16 in the same run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import report
from qmoe_format.checkpoints.native import PackedTensor, find_packed
from qmoe_format.checkpoints.native.packed_tensor import row
from qmoe_format.checkpoints.tensor_info import TensorInfo
from qmoe_format.checkpoints.torch_dtypes import DTYPE_NAMES

ROWS, COLUMNS = 2048, 7168
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random bits; exponents and FP8 are moderate numbers."""
    if dtype in (E4M3, E8M0):
        return torch.randint(40, 88, shape, dtype=torch.uint8).view(dtype)
    size = torch.empty((), dtype=dtype).element_size()
    flat = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return flat.view(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random scales."""
    return (torch.rand(shape) + 0.5).to(dtype)


def integers(symmetric: bool) -> dict[str, Any]:
    """A configuration of compressed-tensors with 4-bit integers in groups of 32."""
    weights = {"num_bits": 4, "group_size": 32, "symmetric": symmetric}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def gptq() -> dict[str, Tensor]:
    """4 bits in groups of 128."""
    return {
        "x.qweight": codes(COLUMNS // 8, ROWS, dtype=torch.int32),
        "x.qzeros": codes(COLUMNS // 128, ROWS // 8, dtype=torch.int32),
        "x.scales": scales(COLUMNS // 128, ROWS, dtype=torch.float16),
        "x.g_idx": torch.arange(COLUMNS, dtype=torch.int32) // 128,
    }


def formats() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Configuration and stored tensors of one matrix in each format."""
    packed = codes(ROWS, COLUMNS // 2)
    words = {
        "x.weight_packed": codes(ROWS, COLUMNS // 8, dtype=torch.int32),
        "x.weight_scale": scales(ROWS, COLUMNS // 32),
        "x.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    in_order = gptq()
    shuffled = gptq()
    shuffled["x.g_idx"] = shuffled["x.g_idx"][torch.randperm(COLUMNS)]
    return {
        "FP8, blocks of 128 × 128": (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {
                "x.weight": codes(ROWS, COLUMNS, dtype=E4M3),
                "x.weight_scale_inv": scales(ROWS // 128, COLUMNS // 128, dtype=torch.float32),
            },
        ),
        "FP8, a scale per row": (
            {},
            {"x.weight": codes(ROWS, COLUMNS, dtype=E4M3), "x.weight_scale": scales(ROWS, 1)},
        ),
        "MXFP8": (
            {},
            {
                "x.weight": codes(ROWS, COLUMNS, dtype=E4M3),
                "x.weight_scale": codes(ROWS, COLUMNS // 32, dtype=E8M0),
            },
        ),
        "MXFP4 (DeepSeek-V4)": (
            {},
            {
                "x.weight": packed.view(torch.int8),
                "x.scale": codes(ROWS, COLUMNS // 32, dtype=E8M0),
            },
        ),
        "MXFP4, transposed (gpt-oss)": (
            {},
            {
                "x.up_blocks": packed.view(1, ROWS, COLUMNS // 32, 16),
                "x.up_scales": codes(1, ROWS, COLUMNS // 32, dtype=E8M0).view(torch.uint8),
            },
        ),
        "NVFP4": (
            {},
            {
                "x.weight": packed,
                "x.weight_scale": codes(ROWS, COLUMNS // 16, dtype=E4M3),
                "x.weight_scale_2": torch.tensor(0.01),
            },
        ),
        "int4 in groups of 32": (integers(symmetric=True), words),
        "int4 with zero points": (
            integers(symmetric=False),
            words | {"x.weight_zero_point": codes(ROWS // 8, COLUMNS // 32, dtype=torch.int32)},
        ),
        "GPTQ int4": ({"quant_method": "gptq"}, in_order),
        "GPTQ int4, columns by activation": ({"quant_method": "gptq"}, shuffled),
        "AWQ int4": (
            {"quant_method": "awq"},
            {
                "x.qweight": codes(COLUMNS, ROWS // 8, dtype=torch.int32),
                "x.qzeros": codes(COLUMNS // 128, ROWS // 8, dtype=torch.int32),
                "x.scales": scales(COLUMNS // 128, ROWS, dtype=torch.float16),
            },
        ),
    }


def found(quantization: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedTensor:
    """The packed weight that some stored tensors make."""
    infos = {
        name: TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0)
        for name, tensor in tensors.items()
    }
    (packed,) = find_packed({"quantization_config": quantization}, infos).values()
    return packed


def widen(path: Path) -> None:
    """A bf16 matrix as float32."""
    with safe_open(path, "pt") as file:
        file.get_tensor("x.weight").float()


def decode(path: Path, packed: PackedTensor) -> None:
    """A packed matrix as float32."""
    with safe_open(path, "pt") as file:
        if len(packed.shape) == 3:
            packed.decode_expert(lambda name, *which: row(file.get_tensor(name), *which), 0)
        else:
            packed.decode(file.get_tensor)


def main() -> None:
    """Run everything."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bf16.safetensors"
        save_file({"x.weight": scales(ROWS, COLUMNS)}, path)
        work: dict[str, Callable[[], None]] = {"bf16": partial(widen, path)}
        for number, (name, (quantization, tensors)) in enumerate(formats().items()):
            path = Path(folder) / f"{number}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            work[name] = partial(decode, path, found(quantization, tensors))
        seconds = report.medians(work, rounds=15)
    figures = {
        name: {
            "weights_per_second": ROWS * COLUMNS / taken["median"],
            "vs_bf16": seconds["bf16"]["median"] / taken["median"],
            "seconds": taken,
        }
        for name, taken in seconds.items()
    }
    print(json.dumps(figures, indent=1))
    report.save("native_formats", {"shape": [ROWS, COLUMNS], "formats": figures})


if __name__ == "__main__":
    main()
