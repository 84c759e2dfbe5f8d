"""FP8 and int8 with scales for blocks, beside transformers and compressed-tensors in float32."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("compressed_tensors", reason="needs the extra 'test'")
import hypothesis.strategies as st
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.checkpoints.native_tensors import codes, decode, exponents, find, same, scales

E4M3 = torch.float8_e4m3fn


def by_transformers(weight: Tensor, scale: Tensor) -> Tensor:
    decoded: Tensor = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    return decoded


@settings(deadline=None, max_examples=60)
@given(
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_blocks_that_do_not_divide(
    block: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    grid = [-(-size // edge) for size, edge in zip(shape, block, strict=True)]
    weight, scale = codes(*shape, dtype=E4M3, seed=seed), scales(*grid, dtype=dtype, seed=seed)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    ours = decode(quantization, {"x.weight": weight, "x.weight_scale_inv": scale})
    theirs = FP8BlockDequantizer(weight_block_size=block, dtype=torch.float32)
    assert same(ours, theirs._create_dequantized_weight(weight, scale))


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("grid", [(2, 3), (12, 1), (1, 1), (1, 30), (12, 6)])
def test_blocks_by_shapes(grid: tuple[int, int], dtype: torch.dtype) -> None:
    weight, scale = codes(12, 30, dtype=dtype), scales(*grid)
    ours = decode({"quant_method": "fp8"}, {"x.weight": weight, "x.weight_scale_inv": scale})
    assert same(ours, by_transformers(weight, scale))


def test_a_scale_of_deepseek_v4() -> None:
    weight, scale = codes(256, 384, dtype=E4M3), exponents(2, 3).view(torch.float8_e8m0fnu)
    ours = decode(
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"x.weight": weight, "x.scale": scale},
    )
    assert same(ours, by_transformers(weight, scale))


@pytest.mark.parametrize("fused", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp8(fused: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, scale = codes(*fused, 5, 160, dtype=E4M3), exponents(*fused, 5, 5)
    scale.view(-1)[:2] = torch.tensor([0, 254])
    names = ("x.up_proj", "x.up_proj_scale_inv") if fused else ("x.weight", "x.weight_scale")
    tensors = dict(zip(names, (weight, scale.view(dtype)), strict=True))
    quantization = {"quant_method": "mxfp8", "weight_block_size": [128, 128]}  # of other layers
    (packed,) = find(quantization, tensors).values()
    assert packed.format == "mxfp8"
    ours = decode(quantization, tensors)
    assert same(ours, by_transformers(weight, scale))
    if not fused:
        args = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32)
        theirs = dequantize(weight, decompress_mx_scale(scale).float(), args=args)
        assert same(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "strategy"),
    [((7, 1), "channel"), ((7,), "channel"), ((1,), "tensor"), ((), "tensor"), ((7, 5), "group")],
)
@pytest.mark.parametrize("kind", ["float", "int", "int with zero points"])
def test_compressed_tensors(shape: tuple[int, ...], strategy: str, kind: str) -> None:
    weight = codes(7, 40, dtype=E4M3 if kind == "float" else torch.int8)
    scale = scales(*shape, dtype=torch.bfloat16)
    args = QuantizationArgs(
        num_bits=8,
        type=kind.partition(" ")[0],
        strategy=strategy,
        group_size=8 if strategy == "group" else None,
    )
    tensors = {
        "x.weight": weight,
        "x.weight_scale": scale,
        "x.input_scale": torch.ones(1),
    }
    zero = None
    if kind.endswith("points"):
        tensors["x.weight_zero_point"] = codes(*shape, 1, dtype=torch.int8).view(shape)
        zero = tensors["x.weight_zero_point"]
        zero = zero[:, None] if shape == (7,) else zero
    scheme = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    ours = decode(
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme}}, tensors
    )
    wide = scale[:, None] if shape == (7,) else scale
    assert same(ours, dequantize(weight, wide.float(), zero, args=args))


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 8, 1), (3, 1, 1), (3,), (1,), ()])
def test_fused_experts(shape: tuple[int, ...]) -> None:
    weight, scale = codes(3, 8, 6, dtype=E4M3), scales(*shape)
    tensors = {
        "mlp.experts.up_proj": weight,
        "mlp.experts.up_proj_scale_inv": scale,
        "mlp.experts.up_proj_activation_scale": torch.ones(3),
    }
    quantization = {"quant_method": "fp8", "weight_block_size": [4, 3]}
    ours = decode(quantization, tensors)
    each = scale.expand(3) if scale.numel() == 1 else scale
    for expert in range(3):
        theirs = by_transformers(weight[expert], each[expert])
        assert same(ours[expert], theirs)
        assert same(decode(quantization, tensors, expert), theirs)


def test_one_expert_touches_no_other() -> None:
    stored = {
        "x.up_proj": codes(3, 8, 6, dtype=E4M3),
        "x.up_proj_scale_inv": scales(3, 2, 2).index_fill(0, torch.tensor([0, 2]), torch.nan),
    }
    decode({"quant_method": "fp8"}, stored, 1)


def test_gate_and_up_smaller_than_a_block() -> None:
    weight, scale = codes(2, 16, 64, dtype=E4M3), scales(2, 2, 1)
    ours = decode(
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"x.gate_up_proj": weight, "x.gate_up_proj_scale_inv": scale},
    )
    assert same(ours, by_transformers(weight, scale))


def test_experts_of_fbgemm() -> None:
    weight = codes(2, 6, 4, dtype=E4M3)
    for shape in ((2, 1, 4), (2, 4, 1)):  # gate_up_proj and down_proj, both [experts, in, out]
        scale = scales(*shape)
        tensors = {"x.down_proj": weight, "x.down_proj_scale": scale}
        ours = decode({"quant_method": "fbgemm_fp8"}, tensors)
        assert same(ours, weight.float() * scale.view(2, 1, 4))


def test_linear_layers_of_fbgemm_and_mistral() -> None:
    weight, scale = codes(6, 4, dtype=E4M3), scales(6, 1)
    tensors = {
        "x.weight": weight,
        "x.weight_scale": scale,
        "x.input_scale_ub": torch.ones(1),
    }
    assert same(decode({"quant_method": "fbgemm_fp8"}, tensors), weight.float() * scale)
    one = scales(1)[0]
    tensors = {"x.weight": weight, "x.qscale_weight": one, "x.qscale_act": one}
    assert same(decode({"quant_method": "fp8"}, tensors), weight.float() * one)


def test_scales_of_modelopt_that_kept_their_dimensions() -> None:
    weight, scale = codes(8, 6, dtype=E4M3), scales(2, 1, 3, 1)
    ours = decode({"quant_method": "modelopt"}, {"x.weight": weight, "x.weight_scale": scale})
    assert same(ours, by_transformers(weight, scale.view(2, 3)))


def test_weights_that_are_views() -> None:
    weight, scale = codes(9, 7, dtype=E4M3).T, scales(9, 7)[3:4].T
    ours = decode({"quant_method": "fp8"}, {"x.weight": weight, "x.weight_scale": scale})
    assert same(ours, weight.float() * scale)
