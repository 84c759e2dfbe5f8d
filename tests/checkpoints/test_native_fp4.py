"""MXFP4 and NVFP4 beside the libraries that define them, in float32."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("compressed_tensors", reason="needs the extra 'test'")
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoints.native_tensors import codes, decode, exponents, find, same, scales

E4M3 = torch.float8_e4m3fn
COMPRESSED = {"quant_method": "compressed-tensors"}


def unpacked(packed: Tensor) -> Tensor:
    rows, half = packed.shape
    values: Tensor = unpack_fp4_from_uint8(packed, rows, 2 * half, torch.float32)
    return values


def args(group: int, strategy: str = "group") -> Any:
    return QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group)


# From less than one square of the kernel to several, whole and not.
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 64, 2), (2, 65, 5), (1, 200, 3)])
def test_gpt_oss(shape: tuple[int, int, int]) -> None:
    blocks, scale = codes(*shape, 16), exponents(*shape)
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": blocks,
        "model.layers.0.mlp.experts.gate_up_proj_scales": scale,
    }
    quantization = {"quant_method": "mxfp4"}
    (packed,) = find(quantization, tensors).values()
    assert (packed.name, packed.format) == ("model.layers.0.mlp.experts.gate_up_proj", "mxfp4")
    theirs = convert_moe_packed_tensors(blocks, scale, dtype=torch.float32)
    assert same(decode(quantization, tensors), theirs)
    for expert in range(shape[0]):
        assert same(decode(quantization, tensors, expert), theirs[expert])


@pytest.mark.parametrize("fused", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_deepseek_v4(fused: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, scale = codes(*fused, 7, 48, dtype=dtype), exponents(*fused, 7, 3)
    scale.view(-1)[:2] = torch.tensor([0, 254])
    names = ("x.w1", "x.w1_scale_inv") if fused else ("x.w1.weight", "x.w1.scale")
    tensors = dict(zip(names, (weight, scale.view(torch.float8_e8m0fnu)), strict=True))
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    ours = decode(quantization, tensors)
    theirs = Fp8Dequantize(None)._dequantize_one(weight.view(torch.int8), scale, torch.float32)
    assert same(ours, theirs)


def test_mxfp4_of_compressed_tensors() -> None:
    packed, scale = codes(5, 64), exponents(5, 4)
    ours = decode(COMPRESSED, {"x.weight_packed": packed, "x.weight_scale": scale})
    theirs = dequantize(unpacked(packed), decompress_mx_scale(scale).float(), args=args(32))
    assert same(ours, theirs)


def test_nvfp4_of_compressed_tensors() -> None:
    packed, scale, whole = codes(5, 40), scales(5, 5, dtype=E4M3), torch.tensor([1733.5])
    tensors = {
        "x.weight_packed": packed,
        "x.weight_scale": scale,
        "x.weight_global_scale": whole,
        "x.input_global_scale": torch.ones(1),
    }
    (found,) = find(COMPRESSED, tensors).values()
    assert (found.name, found.shape, found.format) == ("x.weight", (5, 80), "nvfp4")
    theirs = dequantize(
        unpacked(packed),
        scale.float(),
        args=args(16, "tensor_group"),
        global_scale=whole,
        dtype=torch.float32,
    )
    assert same(decode(COMPRESSED, tensors), theirs)


def test_nvfp4_of_modelopt() -> None:
    """The rule of ModelOpt's ``NVFP4QTensor.dequantize``; it is not installed here."""
    packed, scale, whole = codes(5, 40), scales(5, 5, dtype=E4M3), torch.tensor(0.000713)
    tensors = {
        "x.weight": packed,
        "x.weight_scale": scale,
        "x.weight_scale_2": whole,
        "x.input_scale": torch.tensor(1.0),
        "x.k_scale": torch.tensor(1.0),
    }
    blocks = unpacked(packed).view(5, 5, 16) * (scale.float() * whole)[..., None]
    assert same(decode({"quant_method": "modelopt"}, tensors), blocks.view(5, 80))
