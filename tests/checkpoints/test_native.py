"""Which tensors are found to be packed, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the extra 'convert'")
import torch
from torch import Tensor

from qmoe_format.checkpoints.native import find_packed
from qmoe_format.checkpoints.tensor_info import TensorInfo
from tests.checkpoints.native_tensors import codes, find, infos, scales
from tests.refusals import refusal

E4M3 = torch.float8_e4m3fn
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4]}
INT4 = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8}}
    },
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}

Tensors = dict[str, Tensor]


def fp8() -> Tensors:
    return {"x.weight": codes(8, 8, dtype=E4M3), "x.weight_scale_inv": scales(2, 2)}


def int4() -> Tensors:
    return {
        "x.weight_packed": codes(6, 5, dtype=torch.int32),
        "x.weight_scale": scales(6, 5, dtype=torch.bfloat16),
        "x.weight_shape": torch.tensor([6, 40]),
    }


def nvfp4() -> Tensors:
    return {
        "x.weight": codes(6, 16),
        "x.weight_scale": scales(6, 2, dtype=E4M3),
        "x.weight_scale_2": torch.tensor(0.5),
    }


def gpt_oss() -> Tensors:
    return {"x.down_proj_blocks": codes(2, 6, 1, 16), "x.down_proj_scales": codes(2, 6, 1)}


def gptq() -> Tensors:
    return {
        "x.qweight": codes(8, 32, dtype=torch.int32),
        "x.qzeros": codes(2, 4, dtype=torch.int32),
        "x.scales": scales(2, 32, dtype=torch.float16),
        "x.g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }


def awq() -> Tensors:
    return {
        "x.qweight": codes(64, 4, dtype=torch.int32),
        "x.qzeros": codes(2, 4, dtype=torch.int32),
        "x.scales": scales(2, 32, dtype=torch.float16),
    }


FORMATS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "fp8": (FP8, fp8()),
    "int4": (INT4, int4()),
    "nvfp4": ({"quant_method": "modelopt"}, nvfp4()),
    "mxfp4": ({"quant_method": "mxfp4"}, gpt_oss()),
    "gptq int4": (GPTQ, gptq()),
    "awq int4": (AWQ, awq()),
}
PLAIN = {
    "x.bias": torch.zeros(8),
    "norm.weight": torch.zeros(8, dtype=torch.bfloat16),
    "hc.scale": torch.zeros(1),
    "attention.k_scale": torch.zeros(1),
    "gate.tid2eid": torch.zeros(9, 2, dtype=torch.int64),
    "mask": torch.ones(1, 1, 4, 4, dtype=torch.bool),
}


def refused(quantization: dict[str, Any], tensors: Tensors) -> str:
    return refusal(lambda: find(quantization, tensors), "checkpoint")


@pytest.mark.parametrize("format_", FORMATS)
def test_packed_beside_plain(format_: str) -> None:
    quantization, tensors = FORMATS[format_]
    config = {"quantization_config": quantization}
    for place in (config, {"text_config": config}, {**config, "text_config": {}}):
        (packed,) = find_packed(place, infos({**PLAIN, **tensors})).values()
        assert packed.format == format_
        assert sorted(packed.parts) == sorted(tensors)


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "hqq", "unheard-of"])
def test_a_stale_configuration(method: str) -> None:
    assert find({"quant_method": method}, PLAIN | {"x.weight": torch.zeros(8, 8)}) == {}


def test_without_configuration() -> None:
    assert find_packed({}, infos({"x.weight": torch.zeros(8, 8)})) == {}
    cast = {"x.weight": codes(8, 8, dtype=E4M3), "old.mask": codes(8, 8)}
    assert find_packed({}, infos(cast)) == {}  # FP8 as a dtype, no quantization
    assert [each.format for each in find_packed({}, infos(fp8())).values()] == ["fp8"]
    assert "is U8 [8, 8]; how config.json" in refused({}, {"x.weight": codes(8, 8)})
    assert "neither GPTQ nor AWQ" in refused({}, gptq())


@pytest.mark.parametrize("format_", FORMATS)
def test_each_part_is_needed(format_: str) -> None:
    quantization, tensors = FORMATS[format_]
    for name in tensors:
        if name == "x.g_idx":
            continue
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        assert "tensor 'x." in refused(quantization, others)


@pytest.mark.parametrize("format_", FORMATS)
def test_each_part_has_to_fit(format_: str) -> None:
    quantization, tensors = FORMATS[format_]
    for name, tensor in tensors.items():
        for longer in range(max(tensor.ndim, 1)):
            shape = list(tensor.shape) or [1]
            shape[longer] += 1
            refused(quantization, tensors | {name: torch.zeros(shape, dtype=tensor.dtype)})
        refused(quantization, tensors | {name: torch.zeros(tensor.shape, dtype=torch.int16)})


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scales_have_to_be_finite(format_: str, bad: float) -> None:
    quantization, tensors = FORMATS[format_]
    for name in tensors:
        if "scale" in name:
            tensor = tensors[name].clone()
            if tensor.dtype == torch.uint8:
                tensor.view(-1)[-1] = 255
            else:
                tensor.view(-1)[-1] = torch.nan if tensor.dtype == E4M3 else bad
            (packed,) = find(quantization, tensors).values()
            stored = tensors | {name: tensor}
            message = refusal(lambda: packed.decode(stored.__getitem__), "checkpoint")  # noqa: B023
            assert "one of its scales" in message


def test_a_global_scale_of_zero() -> None:
    tensors = nvfp4()
    packed = tensors.pop("x.weight")
    del tensors["x.weight_scale_2"]
    tensors |= {"x.weight_packed": packed, "x.weight_global_scale": torch.zeros(1)}
    (weight,) = find({"quant_method": "compressed-tensors"}, tensors).values()
    refusal(lambda: weight.decode(tensors.__getitem__), "checkpoint")


def test_fp8_without_a_scale() -> None:
    message = refused(FP8, {"model.layers.3.mlp.up_proj.weight": codes(8, 8, dtype=E4M3)})
    assert "tensor 'model.layers.3.mlp.up_proj.weight': is F8_E4M3 without a scale" in message
    assert "'model.layers.3.mlp.up_proj.weight_scale_inv'" in message
    refused({}, {**fp8(), "y.weight": codes(8, 8, dtype=E4M3)})


def test_two_scales() -> None:
    assert "there is 'x.weight_scale', too" in refused(FP8, fp8() | {"x.weight_scale": scales(1)})


def test_the_same_weight_twice() -> None:
    message = refused(INT4, int4() | {"x.weight": torch.zeros(6, 40)})
    assert "'x.weight': is stored twice, also as int4" in message


def test_a_scale_of_a_float() -> None:
    message = refused(INT4, {"x.weight": torch.zeros(6, 40), "x.weight_scale": scales(6, 1)})
    assert "'x.weight_scale': is part of a quantized weight, but there is none beside it" in message


@pytest.mark.parametrize("name", ["x.pre_quant_scale", "x.weight_scale_3", "x.weight_zero_point"])
def test_a_part_of_unknown_meaning(name: str) -> None:
    message = refused({"quant_method": "modelopt"}, nvfp4() | {name: torch.ones(32)})
    assert f"tensor {name!r}: what it does to 'x.weight' (nvfp4) is not known" in message


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ("bitsandbytes", {"x.weight": codes(32, 1), "x.weight.absmax": torch.ones(1)}),
        ("bitsandbytes", {"x.weight": codes(8, 4, dtype=torch.int8), "x.SCB": torch.ones(8)}),
        ("hqq", {"x.W_q": codes(8, 4), "x.scale": torch.ones(8, 1)}),
        ("quark", fp8()),
        ("quanto", {"x.weight._data": codes(8, 4, dtype=torch.int8)}),
        ("eetq", {"x.weight": codes(8, 4, dtype=torch.int8), "x.weight_scales": torch.ones(8)}),
        ("bitnet", {"x.weight": codes(2, 8), "x.weight_scale": torch.ones(1)}),
        ("aqlm", {"x.codes": codes(8, 4, 1, dtype=torch.int16)}),
        ("vptq", {"x.indices": codes(8, 4, 1, dtype=torch.int32)}),
        ("humming", {"x.weight": codes(8, 4, dtype=torch.int32), "x.weight_scale": scales(8, 1)}),
        ("exl3", {"x.trellis": codes(2, 2, 48, dtype=torch.int16)}),
        ("fp_quant", {"x.qweight": codes(8, 4), "x.scales": codes(8, 1)}),
        ("modelopt", {"x.weight": codes(4, 32), "x.weight_scale": scales(8, 1)}),
    ],
)
def test_methods_that_are_not_supported(method: str, tensors: Tensors) -> None:
    message = refused({"quant_method": method}, tensors)
    assert repr(method) in message
    assert "convert the model in a float type" in message


@pytest.mark.parametrize(
    ("quantization", "tensors", "said"),
    [
        (AWQ | {"version": "gemv"}, awq(), "AWQ 'gemv' of 4 bits"),
        (AWQ | {"bits": 3}, awq(), "AWQ 'gemm' of 3 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, gptq(), "calls its format 'marlin'"),
        (GPTQ | {"bits": 4, "checkpoint_format": "gptq_p"}, gptq(), "'gptq_p'"),
        (AWQ, gptq(), "do not fit each other"),
        (GPTQ, awq(), "do not make weights of 4 bits"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:x"},
            gptq(),
            "'auto_round:x'",
        ),
        (INT4 | {"config_groups": {}}, int4(), "config.json gives None as the number of its bits"),
        (INT4 | {"config_groups": {"a": {"weights": {}, "targets": 3}}}, int4(), "None as the"),
        (
            INT4 | {"config_groups": {"a": {"weights": {"num_bits": 4}, "targets": ["Linear"]}}},
            int4(),
            "which do not make rows of 4 bits a weight in groups of all columns",
        ),
        (INT4 | {"config_groups": {"a": ["Linear"]}}, int4(), "cannot be understood"),
        (FP8 | {"weight_block_size": "4x4"}, fp8(), "a block of weights has size '4x4'"),
        (FP8 | {"weight_block_size": [4, 0]}, fp8(), "a block of weights has size [4, 0]"),
        (GPTQ | {"group_size": 0}, gptq(), "'group_size' is 0"),
        (FP8 | {"weight_block_size": [3, 3]}, fp8(), "(a block of config.json has 3)"),
    ],
)
def test_what_the_configuration_says(
    quantization: dict[str, Any], tensors: Tensors, said: str
) -> None:
    assert said in refused(quantization, tensors)


def test_a_configuration_that_is_no_object() -> None:
    refusal(lambda: find_packed({"quantization_config": "fp8"}, {}), "checkpoint")


def test_asymmetric_integers_need_zero_points() -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8, "symmetric": False}}
    quantization = INT4 | {"config_groups": {"group_0": group}}
    message = refused(quantization, int4())
    assert "'x.weight_zero_point': missing, but needed to decode 'x.weight_packed'" in message


def test_many_tensors_are_no_matter() -> None:
    tensors = {}
    for expert in range(20_000):
        for leaf, dtype, shape in (
            ("weight_packed", "I32", (2048, 896)),
            ("weight_scale", "BF16", (2048, 896)),
            ("weight_shape", "I32", (2,)),
        ):
            name = f"model.layers.0.mlp.experts.{expert}.up_proj.{leaf}"
            tensors[name] = TensorInfo(name, dtype, shape, 0)
    start = time.process_time()
    assert len(find_packed({"quantization_config": INT4}, tensors)) == 20_000
    assert time.process_time() - start < 3  # a fifth of it, really
